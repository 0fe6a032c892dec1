"""Multi-positive InfoNCE over rows x columns: the readable form that faster ones are checked against.

Shapes: R rows (of this rank), C columns (of all ranks), E embedding.
"""

import torch
from torch import Tensor


def cosine_scores(rows_RE: Tensor, cols_CE: Tensor) -> Tensor:
    """Products of unit rows, [R, C]. fp32 whatever comes in (fp64 stays fp64), and outside of any autocast."""
    dtype = torch.promote_types(torch.promote_types(rows_RE.dtype, cols_CE.dtype), torch.float32)
    with torch.autocast(rows_RE.device.type, enabled=False):
        return rows_RE.to(dtype) @ cols_CE.to(dtype).T


def weighted_sum(loss_R: Tensor, row_weight_R: Tensor) -> Tensor:
    """Scalar, in the dtype of the losses. Not a dot product: autocast would run that in bf16."""
    return (loss_R * row_weight_R.to(loss_R.dtype)).sum()


def floor_of(scores: Tensor) -> float:
    """Stands for a score that is left out. Finite, as a row of -inf alone would turn its gradient into NaN; beside any
    real score its exponential is exactly 0, and masked_fill gives it exactly no gradient."""
    return torch.finfo(scores.dtype).min / 2


def multi_positive_cross_entropy(
    scores_RC: Tensor, positives_RC: Tensor, ignored_RC: Tensor, col_log_weight_C: Tensor | None = None
) -> Tensor:
    """Loss of each row, [R], against a target spread over its positives in proportion to their multiplicity m:

        lse_j(s_j + log m_j) - sum_p m_p s_p / sum_p m_p        j: columns not ignored, p: positives

    This is the plain InfoNCE (van den Oord et al. 2018) of a matrix in which column j stands m_j times, averaged over
    the copies of the positives (Khosla et al. 2020, "L_out"), without holding the copies.

    scores_RC cosine / temperature; positives_RC, ignored_RC bool (a positive is never ignored); col_log_weight_C log m,
    None for all ones. A row without a positive yields 0 and passes no gradient on.
    """
    left_out_RC = ignored_RC & ~positives_RC
    has_positive_R = positives_RC.any(dim=1)
    if col_log_weight_C is None:
        logits_RC, target_RC = scores_RC, positives_RC.to(scores_RC.dtype)
    else:
        log_weight_C = col_log_weight_C.to(scores_RC.dtype)
        logits_RC, target_RC = scores_RC + log_weight_C, positives_RC * log_weight_C.exp()
    lse_R = logits_RC.masked_fill(left_out_RC, floor_of(scores_RC)).logsumexp(dim=1)
    total_R = target_RC.sum(dim=1).masked_fill(~has_positive_R, 1.0)
    pulled_R = (target_RC * scores_RC).sum(dim=1) / total_R
    return (lse_R - pulled_R).masked_fill(~has_positive_R, 0.0)


def multi_positive_infonce(
    rows_RE: Tensor,
    cols_CE: Tensor,
    positives_RC: Tensor,
    ignored_RC: Tensor,
    col_log_weight_C: Tensor | None,
    row_weight_R: Tensor,
    inv_temperature: Tensor,
) -> Tensor:
    """This rank's share, sum over its rows of row_weight * loss: a scalar. The weights are shares of the *global* mean,
    so that plain sums over ranks, of values and of gradients, equal the one-process loss."""
    scores_RC = cosine_scores(rows_RE, cols_CE) * inv_temperature
    loss_R = multi_positive_cross_entropy(scores_RC, positives_RC, ignored_RC, col_log_weight_C)
    return weighted_sum(loss_R, row_weight_R)
