"""One sweep of clips over a frozen bank of terms: log-sum-exp, its gradient, and the hardest negatives of each clip,
while the scores live only as long as their chunk of the bank.

A bank entry is a *candidate* of a clip unless it is left out by name (a positive, a variant of one, a term that the
batch embeds itself) or scores above the clip's limit (taken for a false negative: Moreira et al. 2024, "NV-Retriever").

The bank is a constant: gradients go to the clips and the temperature. As the gradient of a log-sum-exp is the mean of
the columns weighted by their softmax, it is summed up during the same sweep (the running maximum and rescaling of
Milakov and Gimelshein 2018, "Online normalizer calculation for softmax"); the backward pass multiplies by one number a
row.

Two ways: torch (any device and dtype), and Triton (losses/sweep_triton.py).

Shapes: B clips, K bank entries, E embedding, H hardest, Q (clip, entry) pairs, J entries.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from losses.dots import statistics_dtype
from losses.infonce import floor_of
from losses.pairs import Pairs
from losses.scores import ClipScorer, UnitRows

CHUNK_NUMBERS = 2**22  # scores that the torch way holds at once


@dataclass(frozen=True)
class LeftOut:
    """Bank entries that are no negatives, on the bank's device."""

    pairs_Q: Pairs  # (clip, entry)
    entry_J: Tensor  # int64: left out for every clip


@dataclass(frozen=True)
class Swept:
    """top_BH, index_BH: the highest candidates' cosines, in descending order, and their places in the bank; at or
    below `floor_of` where a clip has no further candidate (its place then says nothing). lse_B: log-sum-exp of the
    candidates' scores (-inf of none); mean_BE: the candidates' mean embedding weighted by their softmax, which times
    1 / temperature is d lse / d audio. None where not asked for."""

    top_BH: Tensor | None
    index_BH: Tensor | None
    lse_B: Tensor | None
    mean_BE: Tensor | None


@torch.no_grad()
def hardest_of_bank(
    clips: ClipScorer, bank_KE: Tensor, left_out: LeftOut, limit_B: Tensor, k: int, triton: bool = False
) -> tuple[Tensor, Tensor]:
    """(cosines [B, H], places [B, H] int64) of each clip's H = min(k, K) hardest candidates; see `Swept`. limit_B: the
    highest cosine of a candidate."""
    if triton and isinstance(clips, UnitRows):
        from losses import sweep_triton  # only where there is Triton

        swept = sweep_triton.sweep(clips.audio_BE, bank_KE, left_out, limit_B, k, None)
    else:
        swept = sweep(clips, bank_KE, left_out, limit_B, k, None)
    assert swept.top_BH is not None
    assert swept.index_BH is not None
    return swept.top_BH, swept.index_BH


def bank_contrast(
    audio_BE: Tensor,
    bank_KE: Tensor,
    left_out: LeftOut,
    limit_B: Tensor,
    inv_temperature: Tensor,
    k: int,
    triton: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """(lse_B with gradient to audio_BE and inv_temperature, top_BH, index_BH): see `Swept`. A clip without a candidate
    has the lse `floor_of` and no gradient."""
    return _BankContrast.apply(audio_BE, inv_temperature, bank_KE.detach(), left_out, limit_B, k, triton)


class _BankContrast(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        audio_BE: Tensor,
        inv_temperature: Tensor,
        bank_KE: Tensor,
        left_out: LeftOut,
        limit_B: Tensor,
        k: int,
        triton: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        inv_t = inv_temperature.detach().to(statistics_dtype(audio_BE))
        if triton:
            from losses import sweep_triton

            swept = sweep_triton.sweep(audio_BE, bank_KE, left_out, limit_B, k, inv_t)
        else:
            swept = sweep(UnitRows(audio_BE), bank_KE, left_out, limit_B, k, inv_t)
        assert swept.lse_B is not None
        ctx.save_for_backward(audio_BE, inv_temperature, swept.mean_BE)
        ctx.mark_non_differentiable(swept.top_BH, swept.index_BH)
        lse_B = swept.lse_B.clamp(min=floor_of(swept.lse_B))
        assert swept.top_BH is not None
        assert swept.index_BH is not None
        return lse_B, swept.top_BH, swept.index_BH

    @staticmethod
    def backward(ctx: Any, d_lse_B: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        audio_BE, inv_temperature, mean_BE = ctx.saved_tensors
        d_audio_BE = mean_BE * d_lse_B[:, None]
        d_inv_t = (d_audio_BE * audio_BE).sum().to(inv_temperature.dtype)
        d_audio_BE = d_audio_BE * inv_temperature.to(d_audio_BE.dtype)
        return d_audio_BE.to(audio_BE.dtype), d_inv_t, None, None, None, None, None


@torch.no_grad()
def sweep(
    clips: ClipScorer, bank_KE: Tensor, left_out: LeftOut, limit_B: Tensor, k: int, inv_t: Tensor | None
) -> Swept:
    """The torch way. inv_t: 1 / temperature, for lse_B and mean_BE (None: without them); k: 0 for no top."""
    num_clips, num_entries = limit_B.numel(), bank_KE.shape[0]
    width = max(1, min(num_entries, CHUNK_NUMBERS // max(1, num_clips)))
    dtype = statistics_dtype(limit_B)
    floor, num_top = floor_of(limit_B.to(dtype)), min(k, num_entries)
    top_BH = limit_B.new_zeros(num_clips, 0, dtype=dtype)
    index_BH = torch.zeros(num_clips, 0, dtype=torch.int64, device=limit_B.device)
    lse_B = limit_B.new_full((num_clips,), -torch.inf, dtype=dtype)
    mean_BE = limit_B.new_zeros(num_clips, bank_KE.shape[1], dtype=dtype)
    for start in range(0, num_entries, width):
        chunk_WE = bank_KE[start : start + width]
        cosine_BW = clips.against(chunk_WE)
        out_BW = _places(left_out, start, num_clips, chunk_WE.shape[0])
        cosine_BW.masked_fill_(out_BW | (cosine_BW > limit_B[:, None]), floor)
        if num_top:
            here_BH, at_BH = cosine_BW.topk(min(num_top, chunk_WE.shape[0]), dim=1)
            both_BH, at_BH = torch.cat([top_BH, here_BH], dim=1), torch.cat([index_BH, at_BH + start], dim=1)
            top_BH, chosen_BH = both_BH.topk(min(num_top, both_BH.shape[1]), dim=1)
            index_BH = at_BH.gather(1, chosen_BH)
        if inv_t is not None:
            scores_BW = (cosine_BW * inv_t).masked_fill(cosine_BW <= floor, -torch.inf)
            before_B, lse_B = lse_B, torch.logaddexp(lse_B, scores_BW.logsumexp(dim=1))
            of_B = lse_B.masked_fill(lse_B == -torch.inf, 0.0)  # of nothing so far
            mean_BE *= (before_B - of_B).exp()[:, None]
            mean_BE += (scores_BW - of_B[:, None]).exp() @ chunk_WE.to(dtype)
    top = (top_BH, index_BH) if k else (None, None)
    return Swept(*top, *((lse_B, mean_BE) if inv_t is not None else (None, None)))


def _places(left_out: LeftOut, start: int, num_clips: int, width: int) -> Tensor:
    """bool [B, W]: what is left out among the entries from `start`. Other pairs are written to one place too many."""
    (row_Q, entry_Q), entry_J = left_out.pairs_Q, left_out.entry_J
    out = torch.zeros(num_clips * width + 1, dtype=torch.bool, device=row_Q.device)
    inside_Q = (entry_Q >= start) & (entry_Q < start + width) & (row_Q >= 0)
    out.index_fill_(0, (row_Q * width + entry_Q - start).masked_fill(~inside_Q, num_clips * width), True)
    out_of_all_W = torch.zeros(width + 1, dtype=torch.bool, device=row_Q.device)
    inside_J = (entry_J >= start) & (entry_J < start + width)
    out_of_all_W.index_fill_(0, (entry_J - start).masked_fill(~inside_J, width), True)
    return out[:-1].view(num_clips, width) | out_of_all_W[:-1]
