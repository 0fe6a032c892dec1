"""Products of single rows with single columns, a few at a time, with gradient.

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
        d_P = d_P.masked_fill(row_P < 0, 0.0)
        found: list[Tensor | None] = []
        sides = ((rows_RE, row_P, cols_CE, col_P), (cols_CE, col_P, rows_RE, row_P))
        for is_needed, (own, at_P, other, of_P) in zip(ctx.needs_input_grad, sides, strict=False):
            if not is_needed:
                found.append(None)
                continue
            d_own = torch.zeros_like(own, dtype=d_P.dtype)
            for start in range(0, row_P.numel(), DOTS_AT_ONCE):
                part = slice(start, start + DOTS_AT_ONCE)
                terms_PE = other[of_P[part].clamp(min=0)].to(d_P.dtype) * d_P[part, None]
                d_own.index_add_(0, at_P[part].clamp(min=0), terms_PE)
            found.append(d_own.to(own.dtype))
        return *found, None, None
