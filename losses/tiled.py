"""Multi-positive InfoNCE over rows x columns that never holds the matrix: scores are made tile by tile, and made again
in the backward pass.

What is kept are the log-sum-exps, one number a row (and a column). With G = d loss / d scores of a tile, which the
backward pass builds from those numbers,

    d rows = G cols / tau        d cols = G^T rows / tau        d (1 / tau) = <d rows, rows> tau

so the temperature's gradient needs no product of its own. Where one process holds all rows and all columns, the same
scores serve both directions (rows over columns, columns over rows); G is then the sum of both.

`losses/infonce.py` is the reference. Here the masks are sparse: a column that nobody sees has a bias of -inf, single
pairs are listed, and positives are pairs, or rows and columns with equal keys. The scheme is that of FlashAttention
(Dao et al. 2022) with the products of the backward pass left to the matrix library, panel by panel.

Two ways: torch (any device and dtype, in fp32 or fp64), and Triton (losses/tiled_triton.py: CUDA; bf16 and fp32).

Shapes: R rows, C columns, E embedding, P pairs, V values of a key.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.dots import DOTS_AT_ONCE, add_at, row_dots, statistics_dtype
from losses.infonce import floor_of
from losses.pairs import Pairs

PANEL_NUMBERS = 2**22  # scores that the torch way holds at once


@dataclass(frozen=True)
class Match:
    """Which columns count for which row. A positive is never ignored; all on the device of the embeddings.

    Positives are `positives` (each pair's share in its row's target, and in its column's) or `row_key_R`, `col_key_C`
    (int32 below C and below R, -1: none; equal keys are positives, and share a target evenly: `1 / num equal`).
    """

    col_bias_C: Tensor  # added to a column's scores in the rows' denominators: log m; -inf: it is in none
    row_bias_R: Tensor | None = None  # the same for the columns' denominators; None: only the rows have a loss
    ignored: Pairs | None = None  # in no denominator of either direction
    positives: Pairs | None = None
    row_share_P: Tensor | None = None
    col_share_P: Tensor | None = None
    row_key_R: Tensor | None = None
    col_key_C: Tensor | None = None
    row_share_R: Tensor | None = None  # 1 / number of columns with the row's key (0 for key -1)
    col_share_C: Tensor | None = None

    @property
    def is_symmetric(self) -> bool:
        return self.row_bias_R is not None


def contrast(
    rows_RE: Tensor, cols_CE: Tensor, inv_temperature: Tensor, match: Match, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """(loss of each row [R], loss of each column [C]; the latter empty unless `match` is symmetric): log-sum-exp of the
    scores less the mean score of the positives, as `multi_positive_cross_entropy` has it. A row without a positive must
    be given the weight 0 by the caller; its number is finite. fp32, or fp64 where an input is fp64 (torch only).

    Differentiable in rows, columns and inv_temperature (a scalar). triton: by kernels instead of torch.
    """
    assert rows_RE.shape[1] == cols_CE.shape[1], (rows_RE.shape, cols_CE.shape)
    assert match.col_bias_C.shape == cols_CE.shape[:1], (match.col_bias_C.shape, cols_CE.shape)
    row_lse_R, row_pull_R, col_lse_C, col_pull_C = _Contrast.apply(rows_RE, cols_CE, inv_temperature, match, triton)
    return row_lse_R - row_pull_R, col_lse_C - col_pull_C


class _Contrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows_RE: Tensor, cols_CE: Tensor, inv_temperature: Tensor, match: Match, triton: bool
    ) -> tuple[Tensor, ...]:
        dtype = statistics_dtype(rows_RE, cols_CE)
        inv_t = inv_temperature.detach().to(dtype)
        with torch.autocast(rows_RE.device.type, enabled=False):
            if triton:
                from losses import tiled_triton  # only where there is Triton

                row_lse_R, col_lse_C, ctx.tiles = tiled_triton.log_sum_exps(rows_RE, cols_CE, inv_t, match)
            else:
                row_lse_R, col_lse_C = _log_sum_exps(rows_RE, cols_CE, inv_t, match)
            row_pull_R, col_pull_C = _pulls(rows_RE, cols_CE, inv_t, match)
        # A row all of whose columns are left out: exp(s - inf) is 0 in the backward pass, and the loss is finite.
        lses = [_empty_as(lse, torch.inf) for lse in (row_lse_R, col_lse_C)]
        ctx.save_for_backward(rows_RE, cols_CE, inv_temperature, *lses)
        ctx.match, ctx.triton = match, triton
        floor = floor_of(row_lse_R)
        return _empty_as(row_lse_R, floor), row_pull_R, _empty_as(col_lse_C, floor), col_pull_C

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows_RE, cols_CE, inv_temperature, row_lse_R, col_lse_C = ctx.saved_tensors
        match: Match = ctx.match
        inv_t = inv_temperature.to(row_lse_R.dtype)
        slopes = Slopes(row_lse_R, col_lse_C, *grads)
        with torch.autocast(rows_RE.device.type, enabled=False):
            if ctx.triton:
                from losses import tiled_triton

                found = tiled_triton.gradients(rows_RE, cols_CE, inv_t, match, slopes, ctx.tiles)
            else:
                found = _gradients(rows_RE, cols_CE, inv_t, match, slopes)
        d_rows_RE, d_cols_CE, d_scores_scores = found
        d_inv_t = (d_scores_scores / inv_t).to(inv_temperature.dtype) if ctx.needs_input_grad[2] else None
        return d_rows_RE.to(rows_RE.dtype), d_cols_CE.to(cols_CE.dtype), d_inv_t, None, None


@dataclass(frozen=True)
class Slopes:
    """The log-sum-exps (+inf: of nothing), and d loss / d of each output of the forward pass."""

    row_lse_R: Tensor
    col_lse_C: Tensor
    d_row_lse_R: Tensor
    d_row_pull_R: Tensor
    d_col_lse_C: Tensor
    d_col_pull_C: Tensor

    def of_pairs(self, match: Match) -> Tensor:
        """d loss / d score of each positive pair, through the pulled terms, [P]."""
        assert match.positives is not None
        assert match.row_share_P is not None
        row_P, col_P = (x.clamp(min=0) for x in match.positives)
        slope_P = self.d_row_pull_R[row_P] * match.row_share_P.to(self.d_row_pull_R.dtype)
        if match.is_symmetric:
            assert match.col_share_P is not None
            slope_P = slope_P + self.d_col_pull_C[col_P] * match.col_share_P.to(slope_P.dtype)
        return slope_P.masked_fill(match.positives.row_P < 0, 0.0)

    def of_keys(self, match: Match) -> tuple[Tensor, Tensor]:
        """The same for equal keys: the sum of a number of the row [R] and one of the column [C]."""
        assert match.row_share_R is not None
        row_R = self.d_row_pull_R * match.row_share_R.to(self.d_row_pull_R.dtype)
        if not match.is_symmetric:
            assert match.col_key_C is not None
            return row_R, row_R.new_zeros(match.col_key_C.numel())
        assert match.col_share_C is not None
        return row_R, self.d_col_pull_C * match.col_share_C.to(row_R.dtype)


def _empty_as(lse: Tensor, value: float) -> Tensor:
    return lse.masked_fill(lse == -torch.inf, value)


# --- the torch way ------------------------------------------------------------------------------------------------


class _Panels:
    """Scores of a few rows with all columns, one panel after another in the same buffer."""

    def __init__(self, rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> None:
        self.rows_RE, self.cols_CE, self.inv_t = rows_RE, cols_CE.to(inv_t.dtype), inv_t
        num_rows, num_cols = rows_RE.shape[0], cols_CE.shape[0]
        self.height = max(1, min(num_rows, PANEL_NUMBERS // max(1, num_cols)))
        # One number more: pairs of other panels are written there, which spares a look at where they are.
        self.buffer = inv_t.new_empty(self.height * num_cols + 1)

    def __iter__(self) -> Any:
        for start in range(0, self.rows_RE.shape[0], self.height):
            rows_SE = self.rows_RE[start : start + self.height].to(self.inv_t.dtype)
            num_cols = self.cols_CE.shape[0]
            scores_SC = self.buffer[: rows_SE.shape[0] * num_cols].view(len(rows_SE), num_cols)
            torch.mm(rows_SE, self.cols_CE.T, out=scores_SC)
            yield slice(start, start + rows_SE.shape[0]), rows_SE, scores_SC.mul_(self.inv_t)

    def places(self, pairs: Pairs, rows: slice) -> Tensor:
        """Where in the buffer the pairs of these rows are; the last place for all others."""
        inside_P = (pairs.row_P >= rows.start) & (pairs.row_P < rows.stop)
        flat_P = (pairs.row_P - rows.start) * self.cols_CE.shape[0] + pairs.col_P
        return flat_P.masked_fill(~inside_P, self.buffer.numel() - 1)


def _log_sum_exps(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """(of each row, of each column); -inf where nothing is in the sum."""
    panels, bias_C = _Panels(rows_RE, cols_CE, inv_t), match.col_bias_C.to(inv_t.dtype)
    row_lses = [inv_t.new_zeros(0)]
    col_lse_C = inv_t.new_full((cols_CE.shape[0] if match.is_symmetric else 0,), -torch.inf)
    for rows, _, scores_SC in panels:
        if match.ignored is not None:
            panels.buffer.index_fill_(0, panels.places(match.ignored, rows), -torch.inf)
        row_lses.append((scores_SC + bias_C).logsumexp(dim=1))
        if match.row_bias_R is not None:
            bias_S1 = match.row_bias_R[rows].to(inv_t.dtype)[:, None]
            col_lse_C = torch.logaddexp(col_lse_C, (scores_SC + bias_S1).logsumexp(dim=0))
    return torch.cat(row_lses), col_lse_C


def _gradients(
    rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor, match: Match, slopes: Slopes
) -> tuple[Tensor, Tensor, Tensor]:
    """(d rows, d cols, sum over the matrix of d score * score)."""
    panels, bias_C = _Panels(rows_RE, cols_CE, inv_t), match.col_bias_C.to(inv_t.dtype)
    d_rows_RE = torch.zeros_like(rows_RE, dtype=inv_t.dtype)
    d_cols_CE = torch.zeros_like(cols_CE, dtype=inv_t.dtype)
    total = inv_t.new_zeros(())
    for rows, rows_SE, scores_SC in panels:
        d_SC = (scores_SC + (bias_C - slopes.row_lse_R[rows, None])).exp_().mul_(slopes.d_row_lse_R[rows, None])
        if match.row_bias_R is not None:
            shift_S1 = match.row_bias_R[rows].to(inv_t.dtype)[:, None]
            d_SC += (scores_SC + (shift_S1 - slopes.col_lse_C)).exp_().mul_(slopes.d_col_lse_C)
        flat = panels.buffer  # the scores are no longer needed
        scores_SC.copy_(d_SC)
        if match.ignored is not None:
            flat.index_fill_(0, panels.places(match.ignored, rows), 0.0)
        if match.positives is not None:
            flat.index_add_(0, panels.places(match.positives, rows), slopes.of_pairs(match))
        if match.row_key_R is not None:
            assert match.col_key_C is not None
            row_R, col_C = slopes.of_keys(match)
            key_S1 = match.row_key_R[rows, None]
            scores_SC += torch.where((key_S1 == match.col_key_C) & (key_S1 >= 0), row_R[rows, None] + col_C, 0.0)
        torch.mm(scores_SC, panels.cols_CE, out=d_rows_RE[rows])
        d_cols_CE.addmm_(scores_SC.T, rows_SE)
        total += (d_rows_RE[rows] * rows_SE).sum()
    return d_rows_RE.mul_(inv_t), d_cols_CE.mul_(inv_t), total * inv_t


# --- the pulled terms: one number a row, from its positives ----------------------------------------------------------


def _pulls(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor, match: Match) -> tuple[Tensor, Tensor]:
    """Mean score of each row's positives, and of each column's (empty if not symmetric); 0 without a positive."""
    pull_R = inv_t.new_zeros(rows_RE.shape[0])
    pull_C = inv_t.new_zeros(cols_CE.shape[0] if match.is_symmetric else 0)
    if match.positives is not None:
        assert match.row_share_P is not None
        row_P, col_P = match.positives
        scores_P = row_dots(rows_RE, row_P, cols_CE, col_P, inv_t.dtype) * inv_t
        add_at(pull_R, row_P, scores_P * match.row_share_P.to(inv_t.dtype))
        if match.is_symmetric:
            assert match.col_share_P is not None
            at_P = col_P.masked_fill(row_P < 0, -1)
            add_at(pull_C, at_P, scores_P * match.col_share_P.to(inv_t.dtype))
    if match.row_key_R is not None:
        assert match.col_key_C is not None
        assert match.row_share_R is not None
        pull_R = _dots_with_equal(rows_RE, match.row_key_R, cols_CE, match.col_key_C, match.row_share_R, inv_t)
        if match.is_symmetric:
            assert match.col_share_C is not None
            pull_C = _dots_with_equal(cols_CE, match.col_key_C, rows_RE, match.row_key_R, match.col_share_C, inv_t)
    return pull_R, pull_C


def _dots_with_equal(
    own_RE: Tensor, own_key_R: Tensor, other_CE: Tensor, other_key_C: Tensor, share_R: Tensor, inv_t: Tensor
) -> Tensor:
    """share * <row, sum of the columns with its key> / tau, [R]: through one sum a key, however many are equal."""
    num_keys = max(own_RE.shape[0], other_CE.shape[0])
    sum_VE = inv_t.new_zeros(num_keys, own_RE.shape[1])
    for start in range(0, other_CE.shape[0], DOTS_AT_ONCE):
        part = slice(start, start + DOTS_AT_ONCE)
        add_at(sum_VE, other_key_C[part].long(), other_CE[part].to(inv_t.dtype))
    every_R = torch.arange(own_RE.shape[0], device=own_RE.device)
    dots_R = row_dots(own_RE, every_R, sum_VE, own_key_R.long(), inv_t.dtype)
    return (dots_R * share_R.to(inv_t.dtype) * inv_t).masked_fill(own_key_R < 0, 0.0)
