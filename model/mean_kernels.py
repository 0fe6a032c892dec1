"""Triton kernel of the mean over each sequence of a pack: one pass, always in the same order.

Shapes: B sequences, P packed tokens, D width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_ROWS, _BLOCK = 8, 256


def sequence_mean(x_PD: Tensor, cu_seqlens: Tensor, owner_P: Tensor) -> Tensor:
    """[B, D] in fp32. Keeps nothing but the tables; the gradient is a gather of rows."""
    return _SequenceMean.apply(x_PD, cu_seqlens, owner_P)


class _SequenceMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, cu_seqlens: Tensor, owner_P: Tensor) -> Tensor:
        num_sequences, width = len(cu_seqlens) - 1, x_PD.shape[1]
        mean_BD = torch.empty(num_sequences, width, dtype=torch.float32, device=x_PD.device)
        grid = (num_sequences, triton.cdiv(width, _BLOCK))
        _sequence_mean[grid](x_PD.contiguous(), cu_seqlens, mean_BD, WIDTH=width, ROWS=_ROWS, BLOCK=_BLOCK)
        ctx.save_for_backward(cu_seqlens, owner_P)
        ctx.dtype = x_PD.dtype
        return mean_BD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BD: Tensor) -> tuple[Tensor, None, None]:
        cu_seqlens, owner_P = ctx.saved_tensors
        return (grad_BD / cu_seqlens.diff()[:, None]).to(ctx.dtype).index_select(0, owner_P), None, None


@triton.jit
def _sequence_mean(x_ptr, cu_ptr, mean_ptr, WIDTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    sequence = tl.program_id(0)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    start, end = tl.load(cu_ptr + sequence), tl.load(cu_ptr + sequence + 1)
    length = (end - start).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], dtype=tl.float32)
    while start < end:  # the interpreter takes no loaded numbers as the bounds of a range
        rows = start + tl.arange(0, ROWS)
        at = rows.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        sums += tl.load(x_ptr + at, mask=(rows < end)[:, None] & is_inside[None, :], other=0.0).to(tl.float32)
        start += ROWS
    mean = tl.sum(sums, 0) / length
    tl.store(mean_ptr + sequence.to(tl.int64) * WIDTH + columns, mean, mask=is_inside)
