"""The parts of the objective without their matrices: the same numbers as in losses/total.py and losses/terms.py, from
pairs (`LocalPairs`) instead of masks, by losses/tiled.py and losses/sweep.py.

Where one process holds everything, one matrix of scores serves both directions of a symmetric loss; with several ranks
each direction is own rows x gathered columns, as a share of the loss must be.

Shapes: B clips of this rank, G of all ranks, U unique terms owned by this rank, N of all ranks, P pairs, H hard
negatives a clip, E embedding.
"""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn.functional import softplus

from losses.dots import add_at, pair_dots, statistics_dtype
from losses.infonce import floor_of, weighted_sum
from losses.pairs import LocalPairs, Pairs
from losses.scores import UnitRows
from losses.sweep import LeftOut, hardest_of_bank
from losses.terms import BankNegatives, log_sum_of, with_bank
from losses.tiled import Match, contrast


def audio_text_tiled(
    audio_BE: Tensor,
    text_BE: Tensor,
    audio_GE: Tensor,
    text_GE: Tensor,
    r: LocalPairs,
    inv_temperature: Tensor,
    triton: bool,
) -> Tensor:
    """`losses.total.audio_text_loss`."""
    bias_G = torch.zeros_like(r.text_id_G, dtype=torch.float64).masked_fill(r.text_id_G < 0, -torch.inf)
    share_G = (1.0 / r.num_same_text_G.double()).masked_fill(r.text_id_G < 0, 0.0)
    own = slice(r.first_clip, r.first_clip + audio_BE.shape[0])
    match = Match(bias_G, row_key_R=r.text_id_G[own], col_key_C=r.text_id_G, row_share_R=share_G[own])
    if r.is_whole:
        match = replace(match, row_bias_R=bias_G, col_share_C=share_G)
        losses = list(contrast(audio_BE, text_BE, inv_temperature, match, triton))
    else:
        directions = ((audio_BE, text_GE), (text_BE, audio_GE))
        losses = [contrast(rows, cols, inv_temperature, match, triton)[0] for rows, cols in directions]
    return torch.stack([weighted_sum(loss_B, r.audio_text_weight_B) for loss_B in losses]).mean()


def audio_term_tiled(
    audio_BE: Tensor,
    term_UE: Tensor,
    audio_GE: Tensor,
    term_NE: Tensor,
    r: LocalPairs,
    inv_temperature: Tensor,
    triton: bool,
) -> Tensor:
    """`losses.total.audio_term_loss`."""
    # A term's target is spread evenly over its clips.
    clip_share_N = (-r.term_log_count_N).exp()
    of_clips = Match(r.term_log_count_N, ignored=r.ignored_BN, positives=r.positives_BN, row_share_P=r.positive_share_P)
    no_bias_G = r.term_log_count_N.new_zeros(audio_GE.shape[0])
    if r.is_whole:
        both = replace(of_clips, row_bias_R=no_bias_G, col_share_P=clip_share_N[r.positives_BN.col_P])
        loss_B, loss_U = contrast(audio_BE, term_NE, inv_temperature, both, triton)
    else:
        loss_B, _ = contrast(audio_BE, term_NE, inv_temperature, of_clips, triton)
        row_share_P = clip_share_N[r.first_term + r.positives_UG.row_P.clamp(min=0)]
        of_terms = Match(no_bias_G, ignored=r.ignored_UG, positives=r.positives_UG, row_share_P=row_share_P)
        loss_U, _ = contrast(term_UE, audio_GE, inv_temperature, of_terms, triton)
    return (weighted_sum(loss_B, r.audio_term_weight_B) + weighted_sum(loss_U, r.term_audio_weight_U)) / 2


def hard_negative_tiled(
    audio_BE: Tensor,
    term_NE: Tensor,
    r: LocalPairs,
    inv_temperature: Tensor,
    k: int,
    margin: float,
    bank: BankNegatives | None,
    triton: bool,
) -> Tensor:
    """`losses.terms.hard_negative_loss`: the terms of the batch are searched as the bank is."""
    dtype = statistics_dtype(audio_BE, term_NE)
    floor = floor_of(torch.empty(0, dtype=dtype))
    row_P = r.positives_BN.row_P
    is_pair_P, row_P = row_P >= 0, row_P.clamp(min=0)
    cosine_P = pair_dots(audio_BE, term_NE, r.positives_BN)
    with torch.no_grad():
        best_B = audio_BE.new_full((audio_BE.shape[0],), floor, dtype=dtype)
        best_B.scatter_reduce_(0, row_P, cosine_P.masked_fill(~is_pair_P, floor), "amax")
        limit_B = best_B - best_B.abs() * margin
    no_negatives = Pairs(*(torch.cat(both) for both in zip(r.positives_BN, r.ignored_BN, strict=True)))
    sources = [(term_NE, LeftOut(no_negatives, row_P[:0]))]
    if bank is not None:
        sources.append((bank.embeddings_KE, bank.left_out))
    found_BH = []
    for cols_CE, left_out in sources:
        top_BH, col_BH = hardest_of_bank(UnitRows(audio_BE), cols_CE, left_out, limit_B, k, triton)
        row_BH = torch.arange(audio_BE.shape[0], device=audio_BE.device)[:, None].expand_as(col_BH)
        cosine_BH = pair_dots(audio_BE, cols_CE, Pairs(row_BH.reshape(-1), col_BH.reshape(-1))).view(col_BH.shape)
        found_BH.append(cosine_BH.masked_fill(top_BH <= floor, floor))
    negatives_BH = found_BH[0] if bank is None else with_bank(found_BH[0], found_BH[1], k)
    lse_B = log_sum_of(negatives_BH, inv_temperature)
    loss_P = softplus(lse_B[row_P] - cosine_P * inv_temperature).masked_fill(~is_pair_P, 0.0)
    loss_B = add_at(torch.zeros_like(lse_B), r.positives_BN.row_P, loss_P)
    num_positives_B = add_at(torch.zeros_like(lse_B), r.positives_BN.row_P, is_pair_P.to(dtype))
    return weighted_sum(loss_B / num_positives_B.clamp(min=1), r.audio_term_weight_B)


def no_term_tiled(
    audio_BE: Tensor, term_NE: Tensor, r: LocalPairs, inv_temperature: Tensor, margin: float, triton: bool
) -> Tensor:
    """`losses.terms.no_term_loss`: log(1 + sum exp x) is the softplus of log-sum-exp x."""
    match = Match(torch.zeros_like(r.term_log_count_N), ignored=r.ignored_BN)
    lse_B, _ = contrast(audio_BE, term_NE, inv_temperature, match, triton)
    return weighted_sum(softplus(lse_B - margin * inv_temperature), r.no_term_weight_B)
