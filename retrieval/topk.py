"""The best k of up to millions of terms for each query, exactly, in the order that `retrieval.metrics` ranks by.

A plain topk reads and sorts far more than it must, and picks any of equal scores. Here the scores of a slice of terms
are cut into blocks, and only the blocks with the highest maxima are looked into: the best c scores all lie in the c
blocks of the highest maxima (each other block's scores are at most its maximum, which c scores reach or pass).

    k = 3, blocks of 4      .1 .9 .2 .0 | .3 .1 .2 .1 | .8 .7 .1 .2 | .4 .2 .6 .1
    maxima                  .9            .3            .8            .6              blocks 0, 2, 3 hold the best 3

A few candidates more than k are taken. Where the last of them scores less than the k-th, every term that ties for the
k-th place is among them, and a sort by (score, order) settles it; a query for which that fails is ranked in full.

Shapes: B queries, N terms, E embedding, C terms of a slice, K candidates or results.
"""

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPARE = 8
"""Candidates beyond k."""
BLOCK_TERMS = 256
# Scores of a slice, over all queries (16 MiB, 1 GiB in fp32): what bounds the memory of a search.
_CPU_SLICE, _GPU_SLICE = 1 << 22, 1 << 28


def best_rows(
    query_BE: Tensor, term_NE: Tensor, k: int, order_N: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Scores and places of the best k terms (all when there are fewer) of each query, each [B, K], best first.

    The product runs on the device of `term_NE`, in its dtype; one copy of the candidates comes back to the host.

    Args:
        query_BE: finite, on any device.
        order_N: what breaks ties, ascending; distinct.

    Raises:
        ValueError: k below 1.
    """
    if k < 1:
        raise ValueError(f"k: got {k}; allowed: at least 1")
    k = min(k, len(term_NE))
    if not len(query_BE) or not k:
        return np.empty((len(query_BE), k), np.float32), np.empty((len(query_BE), k), np.int64)
    query_BE = query_BE.to(term_NE.device, term_NE.dtype)
    score_BK, place_BK = _candidates(query_BE, term_NE, k + SPARE)
    both_2BK = torch.stack((score_BK.double(), place_BK.double())).cpu().numpy()  # exact: fp32, and integers < 2^53
    scores_BK, places_BK = both_2BK[0].astype(np.float32), both_2BK[1].astype(np.int64)
    best_BK = np.lexsort((order_N[places_BK], -scores_BK))[:, :k]
    last_B = scores_BK[:, -1]
    scores, places = np.take_along_axis(scores_BK, best_BK, 1), np.take_along_axis(places_BK, best_BK, 1)
    if scores_BK.shape[1] < len(term_NE):
        for query in np.flatnonzero(scores[:, -1] <= last_B):
            scores[query], places[query] = _full_ranking(query_BE[query], term_NE, k, order_N)
    return scores, places


def _candidates(query_BE: Tensor, term_NE: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` scores of each query and their places, slice by slice."""
    slice_scores = _GPU_SLICE if term_NE.is_cuda else _CPU_SLICE
    step = max(64 * BLOCK_TERMS, slice_scores // len(query_BE) // BLOCK_TERMS * BLOCK_TERMS)
    parts = []
    for start in range(0, len(term_NE), step):
        score_BK, place_BK = _best_of_slice(query_BE @ term_NE[start : start + step].T, count)
        parts.append((score_BK, place_BK + start))
    if len(parts) == 1:
        return parts[0]
    score_BK, place_BK = torch.cat([s for s, _ in parts], 1), torch.cat([p for _, p in parts], 1)
    top = score_BK.topk(min(count, score_BK.shape[1]), dim=1)
    return top.values, place_BK.gather(1, top.indices)


def _best_of_slice(score_BC: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The highest `count` scores of each row and their columns."""
    num_blocks = score_BC.shape[1] // BLOCK_TERMS
    if num_blocks <= 2 * count:
        return score_BC.topk(min(count, score_BC.shape[1]), dim=1)
    whole = num_blocks * BLOCK_TERMS
    blocks_BNC = score_BC[:, :whole].unflatten(1, (num_blocks, BLOCK_TERMS))
    block_BK = blocks_BNC.amax(2).topk(count, dim=1).indices
    column_BC = (block_BK[:, :, None] * BLOCK_TERMS + torch.arange(BLOCK_TERMS, device=score_BC.device)).flatten(1)
    if whole < score_BC.shape[1]:  # terms after the last whole block
        tail_C = torch.arange(whole, score_BC.shape[1], device=score_BC.device)
        column_BC = torch.cat((column_BC, tail_C.expand(len(score_BC), -1)), 1)
    top = score_BC.gather(1, column_BC).topk(count, dim=1)
    return top.values, column_BC.gather(1, top.indices)


def _full_ranking(
    query_E: Tensor, term_NE: Tensor, k: int, order_N: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """For a query of which more terms tie than there are candidates."""
    scores_N = (term_NE @ query_E).float().cpu().numpy()
    least = np.partition(scores_N, -k)[-k]
    reached = np.flatnonzero(scores_N >= least)
    best = reached[np.lexsort((order_N[reached], -scores_N[reached]))[:k]]
    return scores_N[best], best
