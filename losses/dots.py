"""Products of single rows with single columns, a few at a time, with gradient; and sums into listed places.

Shapes: R rows, C columns, E embedding, P pairs.
"""

from typing import Any

import torch
from torch import Tensor

from losses.pairs import Pairs

DOTS_AT_ONCE = 4096  # pairs of embeddings multiplied and summed at once


def statistics_dtype(*tensors: Tensor) -> torch.dtype:
    """fp32, or fp64 where one of them is fp64."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


def row_dots(rows_RE: Tensor, row_P: Tensor, cols_CE: Tensor, col_P: Tensor, dtype: torch.dtype) -> Tensor:
    """<row, column> of each pair, [P]; places below 0 are read as 0."""
    parts = [torch.zeros(0, dtype=dtype, device=rows_RE.device)]
    for at_P, of_P in zip(row_P.clamp(min=0).split(DOTS_AT_ONCE), col_P.clamp(min=0).split(DOTS_AT_ONCE), strict=True):
        parts.append((rows_RE[at_P].to(dtype) * cols_CE[of_P].to(dtype)).sum(dim=1))
    return torch.cat(parts)


def add_at(sum_R: Tensor, at_P: Tensor, terms_P: Tensor) -> Tensor:
    """sum[at] += terms, in place, for vectors or rows; returns sum. Places below 0 are padding: nothing is added.

    The same bits every time: index_add_ on CUDA adds as its atomics happen to arrive, and a run could not be resumed
    to the last bit. Accumulating index_put_ sorts by place there, and adds in that order.
    """
    if sum_R.shape[0] == 0:
        return sum_R
    is_padding_P = at_P < 0
    terms_P = terms_P.masked_fill(is_padding_P.view(-1, *[1] * (terms_P.dim() - 1)), 0.0)
    # Padding is spread out: one place for all of it would be a long chain of additions.
    spread_P = torch.arange(at_P.numel(), device=at_P.device) % sum_R.shape[0]
    at_P = torch.where(is_padding_P, spread_P, at_P)
    if sum_R.is_cuda:
        return sum_R.index_put_((at_P,), terms_P, accumulate=True)
    return sum_R.index_add_(0, at_P, terms_P)


def pair_dots(rows_RE: Tensor, cols_CE: Tensor, pairs: Pairs) -> Tensor:
    """<row, column> of each pair, [P], fp32 or fp64, differentiable in both. Padding (row -1) gives 0 and no gradient.
    Neither direction holds [P, E]."""
    return _PairDots.apply(rows_RE, cols_CE, *pairs)


class _PairDots(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_RE: Tensor, cols_CE: Tensor, row_P: Tensor, col_P: Tensor) -> Tensor:
        ctx.save_for_backward(rows_RE, cols_CE, row_P, col_P)
        dots_P = row_dots(rows_RE, row_P, cols_CE, col_P, statistics_dtype(rows_RE, cols_CE))
        return dots_P.masked_fill(row_P < 0, 0.0)

    @staticmethod
    def backward(ctx: Any, d_P: Tensor) -> tuple[Tensor | None, ...]:
        rows_RE, cols_CE, row_P, col_P = ctx.saved_tensors
        is_padding_P = row_P < 0
        found: list[Tensor | None] = []
        sides = ((rows_RE, row_P, cols_CE, col_P), (cols_CE, col_P, rows_RE, row_P))
        for is_needed, (own, at_P, other, of_P) in zip(ctx.needs_input_grad, sides, strict=False):
            if not is_needed:
                found.append(None)
                continue
            d_own, at_P = torch.zeros_like(own, dtype=d_P.dtype), at_P.masked_fill(is_padding_P, -1)
            for start in range(0, row_P.numel(), DOTS_AT_ONCE):
                part = slice(start, start + DOTS_AT_ONCE)
                terms_PE = other[of_P[part].clamp(min=0)].to(d_P.dtype) * d_P[part, None]
                add_at(d_own, at_P[part], terms_PE)
            found.append(d_own.to(own.dtype))
        return *found, None, None
