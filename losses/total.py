"""The whole objective: local rows x gathered columns.

    total = a * audio_text + b * audio_term + c * hard (+ d * no_term)      weights in LossSettings

Every function returns this rank's *share*. Sums over ranks equal the one-process loss, in value and in gradient
(encoders and temperature alike), so gradients are summed over ranks, never averaged, and nothing is multiplied by the
world size.

No branch depends on the data: each rank's share hangs on every gathered tensor, even with no rows of its own, because
the backward pass of a gather is a collective that all ranks must enter.

Shapes: B clips of this rank, G of all ranks, U unique terms owned by this rank, N of all ranks, E embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from losses.fused import audio_term_tiled, audio_text_tiled, hard_negative_tiled, no_term_tiled
from losses.infonce import cosine_scores, multi_positive_cross_entropy, multi_positive_infonce, weighted_sum
from losses.pairs import LocalPairs, LocalRelations
from losses.scores import TermScores
from losses.settings import LossSettings
from losses.terms import BankNegatives, hard_negative_loss, no_term_loss


@dataclass(frozen=True)
class Embeddings:
    """Unit rows. `text` has a row for every clip; those of clips without text are never looked at (see `align_texts`).
    One process: `audio_GE is audio_BE` and so on."""

    audio_BE: Tensor
    text_BE: Tensor
    term_UE: Tensor
    audio_GE: Tensor
    text_GE: Tensor
    term_NE: Tensor


def align_texts(text_TE: Tensor, text_row_B: Tensor) -> Tensor:
    """Text rows [T, E] of the clips that have a text -> one row a clip [B, E], zeros where text_row_B is -1."""
    padded_TE = torch.cat([text_TE, text_TE.new_zeros(1, text_TE.shape[1])])
    return padded_TE[text_row_B]  # -1 picks the appended row


def total_loss(
    embeddings: Embeddings,
    relations: LocalRelations | LocalPairs,
    inv_temperature: Tensor,
    settings: LossSettings,
    bank: BankNegatives | None = None,
    term_scores: TermScores | None = None,
    triton: bool = False,
) -> tuple[Tensor, dict[str, Tensor]]:
    """(this rank's share of the total, a scalar; detached shares of the unweighted parts by name).

    relations: as masks (every score is held), or as pairs (none is: see losses/fused.py); the same numbers.
    inv_temperature: scalar 1/tau, which may need a gradient. bank: see `TermBank`. A part of weight 0 is left out.
    term_scores: scores of clips and terms from elsewhere (see losses/scores.py; masks only); None: products of the
    embeddings. triton: by kernels, where there is a choice.
    """
    if isinstance(relations, LocalPairs):
        assert term_scores is None
        weighted = tiled_parts(embeddings, relations, inv_temperature, settings, bank, triton)
    else:
        weighted = dense_parts(embeddings, relations, inv_temperature, settings, bank, term_scores, triton)
    total = torch.stack([weight * loss for _, weight, loss in weighted]).sum()
    return total, {name: loss.detach() for name, _, loss in weighted}


def tiled_parts(
    e: Embeddings,
    r: LocalPairs,
    inv_temperature: Tensor,
    settings: LossSettings,
    bank: BankNegatives | None,
    triton: bool,
) -> list[tuple[str, float, Tensor]]:
    """(name, weight, share) of each part, without a matrix of scores."""
    assert e.audio_BE.shape[0] == e.text_BE.shape[0] == r.audio_text_weight_B.shape[0], e.audio_BE.shape
    assert e.audio_GE.shape[0] == e.text_GE.shape[0] == r.text_id_G.shape[0], e.audio_GE.shape
    assert e.term_NE.shape[0] == r.term_log_count_N.shape[0], e.term_NE.shape
    both = (r, inv_temperature, triton)
    weighted: list[tuple[str, float, Tensor]] = []
    if settings.audio_text_loss_ratio:
        loss = audio_text_tiled(e.audio_BE, e.text_BE, e.audio_GE, e.text_GE, *both)
        weighted.append(("audio_text", settings.audio_text_loss_ratio, loss))
    if settings.audio_term_loss_ratio:
        loss = audio_term_tiled(e.audio_BE, e.term_UE, e.audio_GE, e.term_NE, *both)
        weighted.append(("audio_term", settings.audio_term_loss_ratio, loss))
    if settings.enable_hard_neg and settings.hard_neg_weight:
        k, margin = settings.hard_neg_k, settings.hard_neg_margin
        loss = hard_negative_tiled(e.audio_BE, e.term_NE, r, inv_temperature, k, margin, bank, triton)
        weighted.append(("hard", settings.hard_neg_weight, loss))
    if settings.no_term_loss_ratio:
        loss = no_term_tiled(e.audio_BE, e.term_NE, r, inv_temperature, settings.no_term_margin, triton)
        weighted.append(("no_term", settings.no_term_loss_ratio, loss))
    return weighted


def dense_parts(
    e: Embeddings,
    r: LocalRelations,
    inv_temperature: Tensor,
    settings: LossSettings,
    bank: BankNegatives | None,
    term_scores: TermScores | None,
    triton: bool,
) -> list[tuple[str, float, Tensor]]:
    """(name, weight, share) of each part, from the matrices of scores: the reference, and quicker when they are small.
    Of the kernels only the search of the bank is used."""
    assert e.audio_BE.shape[0] == e.text_BE.shape[0] == r.positives_BN.shape[0], (e.audio_BE.shape, e.text_BE.shape)
    assert e.audio_GE.shape[0] == e.text_GE.shape[0] == r.positives_UG.shape[1], (e.audio_GE.shape, e.text_GE.shape)
    assert e.term_UE.shape[0] == r.positives_UG.shape[0], (e.term_UE.shape, r.positives_UG.shape)
    assert e.term_NE.shape[0] == r.positives_BN.shape[1], (e.term_NE.shape, r.positives_BN.shape)

    weighted: list[tuple[str, float, Tensor]] = []
    if settings.audio_text_loss_ratio:
        weighted.append(("audio_text", settings.audio_text_loss_ratio, audio_text_loss(e, r, inv_temperature)))
    if settings.audio_term_loss_ratio or settings.enable_hard_neg or settings.no_term_loss_ratio:
        cosine_BN = cosine_scores(e.audio_BE, e.term_NE) if term_scores is None else term_scores.cosine_BN
    if settings.audio_term_loss_ratio:
        cosine_UG = None if term_scores is None else term_scores.cosine_UG
        loss = audio_term_loss(e, cosine_BN, r, inv_temperature, cosine_UG)
        weighted.append(("audio_term", settings.audio_term_loss_ratio, loss))
    if settings.enable_hard_neg and settings.hard_neg_weight:
        loss = hard_negative_loss(
            e.audio_BE,
            cosine_BN,
            r.positives_BN,
            r.ignored_BN,
            r.audio_term_weight_B,
            inv_temperature,
            settings.hard_neg_k,
            settings.hard_neg_margin,
            bank,
            None if term_scores is None else term_scores.clips,
            triton,
        )
        weighted.append(("hard", settings.hard_neg_weight, loss))
    if settings.no_term_loss_ratio:
        loss = no_term_loss(cosine_BN, r.ignored_BN, r.no_term_weight_B, inv_temperature, settings.no_term_margin)
        weighted.append(("no_term", settings.no_term_loss_ratio, loss))
    return weighted


def audio_text_loss(e: Embeddings, r: LocalRelations, inv_temperature: Tensor) -> Tensor:
    """Symmetric InfoNCE between clips and chunk texts, the mean of both directions; equal texts are positives of each
    other, and clips without text stand in neither rows nor columns."""
    ignored_BG = r.textless_G.expand_as(r.same_text_BG)
    directions = [
        multi_positive_infonce(rows, cols, r.same_text_BG, ignored_BG, None, r.audio_text_weight_B, inv_temperature)
        for rows, cols in ((e.audio_BE, e.text_GE), (e.text_BE, e.audio_GE))
    ]
    return torch.stack(directions).mean()


def audio_term_loss(
    e: Embeddings, cosine_BN: Tensor, r: LocalRelations, inv_temperature: Tensor, cosine_UG: Tensor | None = None
) -> Tensor:
    """Symmetric multi-positive InfoNCE between clips and unique terms, the mean of both directions.

    A term of m clips counts m times, as a column (+ log m) and as a row (weight m / sum m): exactly the loss over one
    column for each (clip, term) pair. Variants of a clip's positives are left out for that clip; clips without a term
    are negatives of every term. cosine_UG: scores of own terms with all clips, if not the products of the embeddings.

    A term that no clip carries (a mined negative that is embedded with the batch) is one more column for every clip,
    and no row: it has no clip to be pulled to. Mined negatives as further columns of the softmax are those of DPR
    (Karpukhin et al. 2020) and ANCE (Xiong et al. 2020).
    """
    loss_B = multi_positive_cross_entropy(cosine_BN * inv_temperature, r.positives_BN, r.ignored_BN, r.term_log_count_N)
    audio_to_term = weighted_sum(loss_B, r.audio_term_weight_B)
    if cosine_UG is None:
        cosine_UG = cosine_scores(e.term_UE, e.audio_GE)
    loss_U = multi_positive_cross_entropy(cosine_UG * inv_temperature, r.positives_UG, r.ignored_UG)
    term_to_audio = weighted_sum(loss_U, r.term_audio_weight_U)
    return (audio_to_term + term_to_audio) / 2
