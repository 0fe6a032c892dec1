"""The Triton kernels that quantise rows to fp8: rows that are there, and an activation's, never made in bf16.

A row is held in registers: read once, its largest magnitude found, written once.

Shapes: P rows, I their width, F feed-forward width, G = F, or 2 F for gate and up side by side.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import LARGEST, LEAST_AMAX, filled


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
        LARGEST=LARGEST,
        LEAST=LEAST_AMAX,
        **_pieces(width),
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
        LARGEST=LARGEST,
        LEAST=LEAST_AMAX,
        **_pieces(width),
    )
    return quantised_PG, scale_P1


def _pieces(width: int) -> dict[str, int]:
    """A row as two pieces, each a power of two: 5,120 columns are 4,096 and 1,024, where one power takes 8,192."""
    head = triton.next_power_of_2(width) // 2
    tail = triton.next_power_of_2(width - head)
    return {"HEAD": head, "TAIL": tail, "num_warps": min(32, max(2, head // 512))}


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
def _gauss(x):
    """(the normal distribution's share below x, exp(-x^2 / 2)): erf from one exponential, off by 1.5e-7 at most
    (Abramowitz and Stegun 1964, 7.1.26)."""
    bell = tl.exp(-0.5 * x * x)
    t = 1.0 / (1.0 + 0.3275911 * 0.7071067811865476 * tl.abs(x))
    polynomial = 1.421413741 + t * (-1.453152027 + t * 1.061405429)
    polynomial = t * (0.254829592 + t * (-0.284496736 + t * polynomial))
    beyond = 0.5 * polynomial * bell
    return tl.where(x < 0, beyond, 1.0 - beyond), bell


@triton.jit
def _activated(pre_ptr, column, is_inside, WIDTH: tl.constexpr, GATED: tl.constexpr):
    x = tl.load(pre_ptr + column, mask=is_inside, other=0.0).to(tl.float32)
    if GATED:
        up = tl.load(pre_ptr + WIDTH + column, mask=is_inside, other=0.0).to(tl.float32)
        value = x * tl.sigmoid(x) * up
    else:
        share, _ = _gauss(x)
        value = x * share
    return value


@triton.jit(do_not_specialize=["num_rows"])
def _activate(
    pre_ptr, quantised_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, GATED: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    if GATED:
        pre_ptr += row * (2 * WIDTH)
    else:
        pre_ptr += row * WIDTH
    quantised_ptr += row * WIDTH
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head_value = _activated(pre_ptr, head, (head < WIDTH) & (row < num_rows), WIDTH, GATED)
    tail_value = _activated(pre_ptr, tail, (tail < WIDTH) & (row < num_rows), WIDTH, GATED)
    amax = tl.maximum(tl.max(tl.abs(head_value), axis=0), tl.max(tl.abs(tail_value), axis=0))
    amax = tl.maximum(amax, LEAST)
    factor = LARGEST / amax
    kind: tl.constexpr = quantised_ptr.dtype.element_ty
    tl.store(quantised_ptr + head, (head_value * factor).to(kind), mask=head < WIDTH)
    tl.store(quantised_ptr + tail, (tail_value * factor).to(kind), mask=tail < WIDTH)
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
        share, bell = _gauss(x)
        first = grad * (share + x * 0.3989422804014327 * bell)
        second = first
    return first, second


@triton.jit(do_not_specialize=["num_rows"])
def _activate_backward(
    grad_ptr, pre_ptr, quantised_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, GATED: tl.constexpr, HEAD: tl.constexpr, TAIL: tl.constexpr,
    LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    grad_ptr += row * WIDTH
    if GATED:
        pre_ptr += row * (2 * WIDTH)
        quantised_ptr += row * (2 * WIDTH)
    else:
        pre_ptr += row * WIDTH
        quantised_ptr += row * WIDTH
    head, tail = tl.arange(0, HEAD), HEAD + tl.arange(0, TAIL)
    head_first, head_second = _backward(grad_ptr, pre_ptr, head, (head < WIDTH) & (row < num_rows), WIDTH, GATED)
    tail_first, tail_second = _backward(grad_ptr, pre_ptr, tail, (tail < WIDTH) & (row < num_rows), WIDTH, GATED)
    amax = tl.maximum(tl.max(tl.abs(head_first), axis=0), tl.max(tl.abs(tail_first), axis=0))
    if GATED:
        amax = tl.maximum(amax, tl.max(tl.abs(head_second), axis=0))
        amax = tl.maximum(amax, tl.max(tl.abs(tail_second), axis=0))
    amax = tl.maximum(amax, LEAST)
    factor = LARGEST / amax
    kind: tl.constexpr = quantised_ptr.dtype.element_ty
    tl.store(quantised_ptr + head, (head_first * factor).to(kind), mask=head < WIDTH)
    tl.store(quantised_ptr + tail, (tail_first * factor).to(kind), mask=tail < WIDTH)
    if GATED:
        tl.store(quantised_ptr + WIDTH + head, (head_second * factor).to(kind), mask=head < WIDTH)
        tl.store(quantised_ptr + WIDTH + tail, (tail_second * factor).to(kind), mask=tail < WIDTH)
    tl.store(scale_ptr + row, amax / LARGEST)
