"""The Triton kernels that quantise rows to fp8: rows that are there, and an activation's, never made in bf16.

Rows as they are, are held in registers: one read, one write. Those of an activation are computed twice, once for their
largest magnitude, once to be written; what they are computed from comes out of the cache the second time.

Shapes: P rows, I their width, F feed-forward width, G = F, or 2 F for gate and up side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import LARGEST, LEAST_AMAX, filled

_BLOCK = 2048
_NUM_WARPS = 8


def quantise_rows(x_PI: Tensor) -> tuple[Tensor, Tensor]:
    """As model.fp8.quantise_rows, for contiguous rows of at most 65,536."""
    num_rows, width = x_PI.shape
    quantised_PI, scale_P1 = _make(num_rows, width, x_PI.device)
    block = triton.next_power_of_2(width)
    _quantise_rows[(len(quantised_PI),)](
        *(x_PI, quantised_PI, scale_P1, num_rows),
        WIDTH=width,
        BLOCK=block,
        LARGEST=LARGEST,
        LEAST=LEAST_AMAX,
        num_warps=min(16, max(2, block // 1024)),
    )
    return quantised_PI, scale_P1


def activate(pre_PG: Tensor, is_gated: bool) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of GELU, or SwiGLU, of contiguous rows."""
    num_rows, width = pre_PG.shape[0], pre_PG.shape[1] // (2 if is_gated else 1)
    quantised_PF, scale_P1 = _make(num_rows, width, pre_PG.device)
    _activate[(len(quantised_PF),)](
        *(pre_PG, quantised_PF, scale_P1, num_rows),
        WIDTH=width,
        GATED=is_gated,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        LARGEST=LARGEST,
        LEAST=LEAST_AMAX,
        num_warps=_NUM_WARPS,
    )
    return quantised_PF, scale_P1


def activate_backward(grad_PF: Tensor, pre_PG: Tensor, is_gated: bool) -> tuple[Tensor, Tensor]:
    """`quantise_rows` of the gradient of pre, [P', G], from that of the activation; both contiguous."""
    num_rows, width = grad_PF.shape
    quantised_PG, scale_P1 = _make(num_rows, pre_PG.shape[1], pre_PG.device)
    _activate_backward[(len(quantised_PG),)](
        *(grad_PF, pre_PG, quantised_PG, scale_P1, num_rows),
        WIDTH=width,
        GATED=is_gated,
        BLOCK=min(_BLOCK, triton.next_power_of_2(width)),
        LARGEST=LARGEST,
        LEAST=LEAST_AMAX,
        num_warps=_NUM_WARPS,
    )
    return quantised_PG, scale_P1


def _make(num_rows: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    num_filled = filled(num_rows)
    quantised = torch.empty(num_filled, width, dtype=torch.float8_e4m3fn, device=device)
    return quantised, torch.empty(num_filled, 1, dtype=torch.float32, device=device)


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_rows(
    x_ptr, quantised_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_inside = column < WIDTH
    x = tl.load(x_ptr + row * WIDTH + column, mask=is_inside & (row < num_rows), other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST)
    value = x * (LARGEST / amax)
    tl.store(quantised_ptr + row * WIDTH + column, value.to(quantised_ptr.dtype.element_ty), mask=is_inside)
    tl.store(scale_ptr + row, amax / LARGEST)


@triton.jit
def _normal_cdf(x):
    return 0.5 * (1.0 + tl.erf(x * 0.7071067811865476))


@triton.jit
def _activated(pre_ptr, column, is_inside, WIDTH: tl.constexpr, GATED: tl.constexpr):
    x = tl.load(pre_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(pre_ptr + WIDTH + column, mask=is_inside, other=0.0).to(tl.float32)
        value = x * tl.sigmoid(x) * up
    else:
        value = x * _normal_cdf(x)
    return value


@triton.jit(do_not_specialize=["num_rows"])
def _activate(
    pre_ptr, quantised_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if GATED:
        pre_ptr += row * (2 * WIDTH)
    else:
        pre_ptr += row * WIDTH
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = (column < WIDTH) & (row < num_rows)
        largest = tl.maximum(largest, tl.abs(_activated(pre_ptr, column, is_inside, WIDTH, GATED)))
    amax = tl.maximum(tl.max(largest, axis=0), LEAST)
    factor = LARGEST / amax
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        value = _activated(pre_ptr, column, (column < WIDTH) & (row < num_rows), WIDTH, GATED) * factor
        target = quantised_ptr + row * WIDTH + column
        tl.store(target, value.to(quantised_ptr.dtype.element_ty), mask=column < WIDTH)
    tl.store(scale_ptr + row, amax / LARGEST)


@triton.jit
def _backward(grad_ptr, pre_ptr, column, is_inside, WIDTH: tl.constexpr, GATED: tl.constexpr):
    """Gradients of gate and up; of GELU's input twice."""
    grad = tl.load(grad_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    x = tl.load(pre_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(pre_ptr + WIDTH + column, mask=is_inside, other=0.0).to(tl.float32)
        sigmoid = tl.sigmoid(x)
        silu = x * sigmoid
        first = grad * up * (sigmoid + silu * (1.0 - sigmoid))
        second = grad * silu
    else:
        density = 0.3989422804014327 * tl.exp(-0.5 * x * x)
        first = grad * (_normal_cdf(x) + x * density)
        second = first
    return first, second


@triton.jit(do_not_specialize=["num_rows"])
def _activate_backward(
    grad_ptr, pre_ptr, quantised_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, GATED: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * WIDTH
    if GATED:
        pre_ptr += row * (2 * WIDTH)
        quantised_ptr += row * (2 * WIDTH)
    else:
        pre_ptr += row * WIDTH
        quantised_ptr += row * WIDTH
    largest = tl.zeros([BLOCK], tl.float32)
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = (column < WIDTH) & (row < num_rows)
        first, second = _backward(grad_ptr, pre_ptr, column, is_inside, WIDTH, GATED)
        largest = tl.maximum(largest, tl.maximum(tl.abs(first), tl.abs(second)))
    amax = tl.maximum(tl.max(largest, axis=0), LEAST)
    factor = LARGEST / amax
    for start in range(0, WIDTH, BLOCK):
        column = start + tl.arange(0, BLOCK)
        is_inside = (column < WIDTH) & (row < num_rows)
        first, second = _backward(grad_ptr, pre_ptr, column, is_inside, WIDTH, GATED)
        kind = quantised_ptr.dtype.element_ty
        tl.store(quantised_ptr + column, (first * factor).to(kind), mask=column < WIDTH)
        if GATED:
            tl.store(quantised_ptr + WIDTH + column, (second * factor).to(kind), mask=column < WIDTH)
    tl.store(scale_ptr + row, amax / LARGEST)
