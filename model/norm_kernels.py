"""Triton kernels of the norms: a residual sum and its norm in one pass each way, with frozen norm weights.

Forward reads x and delta and writes their sum and its norm; backward reads the sum and both gradients and writes one
that serves x and delta alike. Kept for it: the sum, which is the residual stream anyway, and one or two fp32 numbers a
row. Statistics and arithmetic are fp32; the statistics are those of the sum as rounded, as in the plain path.

Shapes: P packed tokens, Q pooled tokens, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable


def add_norm(
    x_PD: Tensor, delta_PD: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """(x + delta, norm of that): layer norm with a bias, root-mean-square norm without. No gradient of the weights."""
    if delta_PD is None:
        return x_PD, _AddNorm.apply(x_PD, None, weight_D, bias_D, eps)
    return _AddNorm.apply(x_PD, delta_PD, weight_D, bias_D, eps)


def pool_norm(
    x_PD: Tensor,
    delta_PD: Tensor,
    first_Q: Tensor,
    second_Q: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
) -> Tensor:
    """Layer norm of the mean of rows first and second of x + delta, [Q, D].

    first_Q, second_Q: int64, ascending from row 0; second is first or first + 1. Rows in no pair get no gradient.
    """
    return _PoolNorm.apply(x_PD, delta_PD, first_Q, second_Q, weight_D, bias_D, eps)


class _AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x_PD: Tensor, delta_PD: Tensor | None, weight_D: Tensor, bias_D: Tensor | None, eps: float
    ) -> Tensor | tuple[Tensor, Tensor]:
        x_PD = x_PD.contiguous()
        has_delta = delta_PD is not None
        delta_PD = delta_PD.contiguous() if delta_PD is not None else x_PD
        sum_PD = torch.empty_like(x_PD) if has_delta else x_PD
        y_PD = torch.empty_like(x_PD)
        mean_P, scale_P = _statistics(x_PD, bias_D)
        width = x_PD.shape[-1]
        _add_norm_forward[(x_PD.numel() // width,)](
            x_PD,
            delta_PD,
            weight_D,
            weight_D if bias_D is None else bias_D,
            sum_PD,
            y_PD,
            mean_P,
            scale_P,
            eps,
            WIDTH=width,
            HAS_DELTA=has_delta,
            IS_CENTRED=bias_D is not None,
            **_shape(width),
        )
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(sum_PD, weight_D, mean_P, scale_P)
        ctx.has_delta, ctx.is_centred = has_delta, bias_D is not None
        return (sum_PD, y_PD) if has_delta else y_PD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        sum_PD, weight_D, mean_P, scale_P = ctx.saved_tensors
        grad_sum_PD, grad_y_PD = grads if ctx.has_delta else (None, grads[0])
        grad_PD = grad_sum_PD
        if grad_y_PD is not None:
            grad_y_PD = grad_y_PD.contiguous()
            grad_PD = torch.empty_like(sum_PD)
            width = sum_PD.shape[-1]
            _add_norm_backward[(sum_PD.numel() // width,)](
                grad_y_PD,
                grad_y_PD if grad_sum_PD is None else grad_sum_PD.contiguous(),
                sum_PD,
                weight_D,
                mean_P,
                scale_P,
                grad_PD,
                WIDTH=width,
                HAS_GRAD_SUM=grad_sum_PD is not None,
                IS_CENTRED=ctx.is_centred,
                **_shape(width),
            )
        return grad_PD, grad_PD if ctx.has_delta else None, None, None, None


class _PoolNorm(torch.autograd.Function):
    """Keeps the pooled rows, as rounded, [Q, D]; neither x nor delta nor their sum."""

    @staticmethod
    def forward(
        ctx: Any,
        x_PD: Tensor,
        delta_PD: Tensor,
        first_Q: Tensor,
        second_Q: Tensor,
        weight_D: Tensor,
        bias_D: Tensor,
        eps: float,
    ) -> Tensor:
        width = x_PD.shape[1]
        pooled_QD = x_PD.new_empty(len(first_Q), width)
        y_QD = torch.empty_like(pooled_QD)
        mean_Q, scale_Q = _statistics(pooled_QD, bias_D)
        _pool_norm_forward[(len(first_Q),)](
            x_PD.contiguous(),
            delta_PD.contiguous(),
            first_Q,
            second_Q,
            weight_D,
            bias_D,
            pooled_QD,
            y_QD,
            mean_Q,
            scale_Q,
            eps,
            WIDTH=width,
            **_shape(width),
        )
        ctx.save_for_backward(pooled_QD, first_Q, second_Q, weight_D, mean_Q, scale_Q)
        ctx.num_rows = len(x_PD)
        return y_QD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y_QD: Tensor) -> tuple[Tensor | None, ...]:
        pooled_QD, first_Q, second_Q, weight_D, mean_Q, scale_Q = ctx.saved_tensors
        num_pooled, width = pooled_QD.shape
        grad_PD = pooled_QD.new_empty(ctx.num_rows, width)
        _pool_norm_backward[(num_pooled,)](
            grad_y_QD.contiguous(),
            pooled_QD,
            first_Q,
            second_Q,
            weight_D,
            mean_Q,
            scale_Q,
            grad_PD,
            num_pooled,
            ctx.num_rows,
            WIDTH=width,
            **_shape(width),
        )
        return grad_PD, grad_PD, None, None, None, None, None


def _statistics(x_PD: Tensor, bias_D: Tensor | None) -> tuple[Tensor, Tensor]:
    """Room for each row's mean (where it is taken off) and inverse scale, fp32."""
    num_rows = x_PD.numel() // x_PD.shape[-1]
    scale_P = torch.empty(num_rows, dtype=torch.float32, device=x_PD.device)
    return scale_P if bias_D is None else torch.empty_like(scale_P), scale_P


def _shape(width: int) -> dict[str, int]:
    """One program a row; 16 numbers a thread, which are two wide loads in bf16."""
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 512))}


@triton.jit
def _normed(x, weight_ptr, bias_ptr, columns, is_inside, eps, WIDTH: tl.constexpr, IS_CENTRED: tl.constexpr):
    """y, mean, inverse scale of a row x in fp32, zero outside."""
    mean = tl.sum(x, 0) / WIDTH if IS_CENTRED else 0.0
    centred = tl.where(is_inside, x - mean, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / WIDTH + eps)
    y = centred * scale * tl.load(weight_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    if IS_CENTRED:
        y += tl.load(bias_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    return y, mean, scale


@triton.jit
def _normed_gradient(
    grad_y, x, weight_ptr, columns, is_inside, mean, scale, WIDTH: tl.constexpr, IS_CENTRED: tl.constexpr
):
    """Gradient of a row before its norm: with n its normed row and g = grad_y * weight,
    scale * (g - mean(g) - n * mean(g * n)), the second term in layer norm alone."""
    g = grad_y * tl.load(weight_ptr + columns, mask=is_inside, other=0.0).to(tl.float32)
    normed = tl.where(is_inside, (x - mean) * scale, 0.0) if IS_CENTRED else x * scale
    grad = g - normed * (tl.sum(g * normed, 0) / WIDTH)
    if IS_CENTRED:
        grad -= tl.sum(g, 0) / WIDTH
    return grad * scale


@triton.jit
def _add_norm_forward(
    x_ptr, delta_ptr, weight_ptr, bias_ptr, sum_ptr, y_ptr, mean_ptr, scale_ptr, eps,
    WIDTH: tl.constexpr, HAS_DELTA: tl.constexpr, IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    at = row * WIDTH + columns
    x = tl.load(x_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    if HAS_DELTA:
        x += tl.load(delta_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=is_inside)
        x = rounded.to(tl.float32)
    y, mean, scale = _normed(x, weight_ptr, bias_ptr, columns, is_inside, eps, WIDTH, IS_CENTRED)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=is_inside)
    if IS_CENTRED:
        tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _add_norm_backward(
    grad_y_ptr, grad_sum_ptr, sum_ptr, weight_ptr, mean_ptr, scale_ptr, grad_ptr,
    WIDTH: tl.constexpr, HAS_GRAD_SUM: tl.constexpr, IS_CENTRED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    at = row * WIDTH + columns
    x = tl.load(sum_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    mean = tl.load(mean_ptr + row) if IS_CENTRED else 0.0
    scale = tl.load(scale_ptr + row)
    grad = _normed_gradient(grad_y, x, weight_ptr, columns, is_inside, mean, scale, WIDTH, IS_CENTRED)
    if HAS_GRAD_SUM:
        grad += tl.load(grad_sum_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    tl.store(grad_ptr + at, grad.to(grad_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _pool_norm_forward(
    x_ptr, delta_ptr, first_ptr, second_ptr, weight_ptr, bias_ptr, pooled_ptr, y_ptr, mean_ptr, scale_ptr, eps,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    first = tl.load(first_ptr + row) * WIDTH + columns
    second = tl.load(second_ptr + row) * WIDTH + columns
    x = tl.load(x_ptr + first, mask=is_inside, other=0.0).to(tl.float32)
    x += tl.load(delta_ptr + first, mask=is_inside, other=0.0).to(tl.float32)
    x += tl.load(x_ptr + second, mask=is_inside, other=0.0).to(tl.float32)
    x += tl.load(delta_ptr + second, mask=is_inside, other=0.0).to(tl.float32)
    at = row * WIDTH + columns
    rounded = (x * 0.5).to(pooled_ptr.dtype.element_ty)
    tl.store(pooled_ptr + at, rounded, mask=is_inside)
    y, mean, scale = _normed(rounded.to(tl.float32), weight_ptr, bias_ptr, columns, is_inside, eps, WIDTH, True)
    tl.store(y_ptr + at, y.to(y_ptr.dtype.element_ty), mask=is_inside)
    tl.store(mean_ptr + row, mean)
    tl.store(scale_ptr + row, scale)


@triton.jit
def _pool_norm_backward(
    grad_y_ptr, pooled_ptr, first_ptr, second_ptr, weight_ptr, mean_ptr, scale_ptr, grad_ptr, num_pooled, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    at = row * WIDTH + columns
    x = tl.load(pooled_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    grad_y = tl.load(grad_y_ptr + at, mask=is_inside, other=0.0).to(tl.float32)
    mean, scale = tl.load(mean_ptr + row), tl.load(scale_ptr + row)
    grad = _normed_gradient(grad_y, x, weight_ptr, columns, is_inside, mean, scale, WIDTH, True)
    first, second = tl.load(first_ptr + row), tl.load(second_ptr + row)
    grad = (grad * tl.where(first == second, 1.0, 0.5)).to(grad_ptr.dtype.element_ty)
    tl.store(grad_ptr + first * WIDTH + columns, grad, mask=is_inside)
    tl.store(grad_ptr + second * WIDTH + columns, grad, mask=is_inside)
    # The odd last token of a clip is in no pair: whoever comes before it writes its zeros.
    end = tl.load(first_ptr + row + 1, mask=row + 1 < num_pooled, other=num_rows)
    unpaired = second + 1
    while unpaired < end:  # the interpreter takes no loaded numbers as the bounds of a range
        tl.store(grad_ptr + unpaired * WIDTH + columns, tl.zeros_like(grad), mask=is_inside)
        unpaired += 1
