"""The terms of the objective beyond plain InfoNCE: hard negatives and clips without a term.

Shapes: B clips of this rank, N unique terms of the global batch, K bank entries, H hard negatives a clip, E embedding.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from losses.infonce import floor_of, weighted_sum
from losses.pairs import Pairs, SortedKeys, ship
from losses.relations import Relations
from losses.scores import ClipScorer, UnitRows
from losses.sweep import LeftOut, hardest_of_bank


@dataclass(frozen=True)
class TermBank:
    """Glossary terms embedded some steps ago: negatives from outside the batch. They are constants, yet the *audio*
    side of their scores is live, so they do train it."""

    embeddings_KE: Tensor  # unit rows, on the device
    keys_K: Tensor  # int64, CPU
    groups_K: Tensor  # int64, CPU

    def against(self, relations: Relations, rank: int) -> "BankNegatives":
        """The bank as the clips of `rank` see it. Left out are entries that are no negative of a clip (a positive, a
        variant of one or of a cut term), and entries that the batch itself embeds, which stand there fresh."""
        device, clips = self.embeddings_KE.device, relations.clips_of(rank)
        mine = (relations.clip_Q >= clips.start) & (relations.clip_Q < clips.stop)
        query, entry_Q = self._by_group.matches(relations.group_Q[mine])
        row_Q = relations.clip_Q[mine][query] - clips.start
        _, in_batch_J = self._by_key.matches(relations.term_keys_N)
        left_out = LeftOut(Pairs(row_Q, entry_Q).to(device), ship(in_batch_J, device))
        return BankNegatives(self.embeddings_KE.detach(), left_out)

    @cached_property
    def _by_group(self) -> SortedKeys:
        return SortedKeys.of(self.groups_K)

    @cached_property
    def _by_key(self) -> SortedKeys:
        return SortedKeys.of(self.keys_K)


@dataclass(frozen=True)
class BankNegatives:
    """A bank, and what in it is no negative of this rank's clips."""

    embeddings_KE: Tensor
    left_out: LeftOut


def hard_negative_loss(
    audio_BE: Tensor,
    cosine_BN: Tensor,
    positives_BN: Tensor,
    ignored_BN: Tensor,
    row_weight_B: Tensor,
    inv_temperature: Tensor,
    k: int,
    margin: float,
    bank: BankNegatives | None = None,
    clips: ClipScorer | None = None,
    triton: bool = False,
) -> Tensor:
    """This rank's share, a scalar: per clip with positives, the mean over its positives p of

        softplus(lse_h(s_h) - s_p)          h: the k highest scoring negatives of batch and bank

    Candidates with cosine above pos - |pos| * margin, pos being the clip's best positive, are taken for false negatives
    (TopK-MarginPos: Moreira et al. 2024, "NV-Retriever"). Which k are hardest is decided without gradient; their scores
    carry it to the audio and, for terms of the batch, to the term side. A clip with no candidate left contributes 0.
    `clips` scores the bank; None: by the product with audio_BE. triton: search it with kernels.
    """
    clips = clips or UnitRows(audio_BE)
    with torch.no_grad():
        floor = floor_of(cosine_BN)
        best_B = cosine_BN.masked_fill(~positives_BN, floor).amax(dim=1) if cosine_BN.shape[1] else cosine_BN.sum(dim=1)
        limit_B1 = (best_B - best_B.abs() * margin)[:, None]
        open_BN = ~positives_BN & ~ignored_BN & (cosine_BN <= limit_B1)
        hardest_BH = cosine_BN.masked_fill(~open_BN, floor).topk(min(k, cosine_BN.shape[1]), dim=1).indices
        usable_BH = open_BN.gather(1, hardest_BH)
    negatives_BH = cosine_BN.gather(1, hardest_BH).masked_fill(~usable_BH, floor)

    if bank is not None:
        # Only the chosen entries are scored with gradient: [B, K] scores of a large bank would not be worth saving.
        top_BH, hardest_BH = hardest_of_bank(clips, bank.embeddings_KE, bank.left_out, limit_B1[:, 0], k, triton)
        bank_BH = clips.against_own(bank.embeddings_KE[hardest_BH].to(cosine_BN.dtype))
        negatives_BH = with_bank(negatives_BH, bank_BH.masked_fill(top_BH <= floor, floor), k)
    lse_B1 = log_sum_of(negatives_BH, inv_temperature)[:, None]
    loss_BN = torch.nn.functional.softplus(lse_B1 - cosine_BN * inv_temperature).masked_fill(~positives_BN, 0.0)
    loss_B = loss_BN.sum(dim=1) / positives_BN.sum(dim=1).clamp(min=1)
    return weighted_sum(loss_B, row_weight_B)


def with_bank(negatives_BH: Tensor, bank_BH: Tensor, k: int) -> Tensor:
    """The k hardest of both, cosines [B, H]."""
    both_BH = torch.cat([negatives_BH, bank_BH], dim=1)
    return both_BH.topk(min(k, both_BH.shape[1]), dim=1).values


def log_sum_of(negatives_BH: Tensor, inv_temperature: Tensor) -> Tensor:
    """Log-sum-exp of the scores of these cosines, [B]; those at the floor are none."""
    floor = floor_of(negatives_BH)
    scores_BH = (negatives_BH * inv_temperature).masked_fill(negatives_BH <= floor, floor)
    return scores_BH.logsumexp(dim=1).clamp(min=floor)  # no column at all: logsumexp over nothing is -inf


def no_term_loss(
    cosine_BN: Tensor, ignored_BN: Tensor, row_weight_B: Tensor, inv_temperature: Tensor, margin: float
) -> Tensor:
    """This rank's share, a scalar: mean over clips without a term of log(1 + sum_j exp((cos_j - margin) / tau)).

    It is InfoNCE against one extra "no term here" column that always scores `margin`; its gradient only pushes.
    row_weight_B is 0 for clips with a term; ignored terms (cut ones, for these clips) are left out.
    """
    scores_BN = (cosine_BN - margin) * inv_temperature
    scores_BN = scores_BN.masked_fill(ignored_BN, floor_of(cosine_BN))
    loss_B = torch.cat([scores_BN.new_zeros(scores_BN.shape[0], 1), scores_BN], dim=1).logsumexp(dim=1)
    return weighted_sum(loss_B, row_weight_B)
