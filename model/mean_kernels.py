"""Triton kernels of the mean over each sequence of a pack: one pass each way, always in the same order.

A program has one sequence and a block of columns. It reads several rows before it adds them, so that a short sequence
waits for memory once; the gradient is read once and written to every row.

Shapes: B sequences, P packed tokens, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS = 8
_BLOCK, _NUM_WARPS = 512, 2  # 8 numbers a thread: one wide load in bf16


def sequence_mean(x_PD: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[B, D] in fp32, zero for an empty sequence; the sequences cover all rows. Keeps cu_seqlens alone."""
    return _SequenceMean.apply(x_PD, cu_seqlens)


class _SequenceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, cu_seqlens: Tensor) -> Tensor:
        num_sequences, width = len(cu_seqlens) - 1, x_PD.shape[1]
        mean_BD = torch.empty(num_sequences, width, dtype=torch.float32, device=x_PD.device)
        grid = (num_sequences, triton.cdiv(width, _BLOCK))
        _sequence_mean[grid](
            x_PD.contiguous(), cu_seqlens, mean_BD, WIDTH=width, ROWS=_ROWS, BLOCK=_BLOCK, num_warps=_NUM_WARPS
        )
        ctx.save_for_backward(cu_seqlens)
        ctx.num_rows, ctx.dtype = len(x_PD), x_PD.dtype
        return mean_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None]:
        (cu_seqlens,) = ctx.saved_tensors
        num_sequences, width = grad_BD.shape
        grad_PD = torch.empty(ctx.num_rows, width, dtype=ctx.dtype, device=grad_BD.device)
        grid = (num_sequences, triton.cdiv(width, _BLOCK))
        _sequence_mean_backward[grid](
            grad_BD.contiguous(), cu_seqlens, grad_PD, WIDTH=width, BLOCK=_BLOCK, num_warps=_NUM_WARPS
        )
        return grad_PD, None


# The interpreter takes no loaded numbers as the bounds of a range, hence `while`.


@triton.jit
def _sequence_mean(x_ptr, cu_ptr, mean_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    row, end = tl.load(cu_ptr + sequence).to(tl.int64), tl.load(cu_ptr + sequence + 1).to(tl.int64)
    length = tl.maximum(end - row, 1).to(tl.float32)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    while row < end:
        for i in tl.static_range(ROWS):
            at = x_ptr + (row + i) * WIDTH + columns
            total += tl.load(at, mask=is_inside & (row + i < end), other=0.0).to(tl.float32)
        row += ROWS
    tl.store(mean_ptr + sequence.to(tl.int64) * WIDTH + columns, total / length, mask=is_inside)


@triton.jit
def _sequence_mean_backward(grad_ptr, cu_ptr, grad_x_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    row, end = tl.load(cu_ptr + sequence).to(tl.int64), tl.load(cu_ptr + sequence + 1).to(tl.int64)
    length = tl.maximum(end - row, 1).to(tl.float32)
    grad = tl.load(grad_ptr + sequence.to(tl.int64) * WIDTH + columns, mask=is_inside, other=0.0)
    grad = (grad / length).to(grad_x_ptr.dtype.element_ty)
    while row < end:
        tl.store(grad_x_ptr + row * WIDTH + columns, grad, mask=is_inside)
        row += 1
