"""The best k of up to millions of terms for each query, exactly, in the order that `retrieval.metrics` ranks by.

A plain topk reads and sorts far more than it must, and picks any of equal scores. Here the scores of a slice of terms
are cut into blocks, and only the blocks with the highest maxima are looked into: the best c scores all lie in the c
blocks of the highest maxima (each other block's scores are at most its maximum, which c scores reach or pass).

    k = 3, blocks of 4      .1 .9 .2 .0 | .3 .1 .2 .1 | .8 .7 .1 .2 | .4 .2 .6 .1
    maxima                  .9            .3            .8            .6              blocks 0, 2, 3 hold the best 3

On the CPU only the product runs in several threads: what follows is little work, and every further start of all threads
waits for the slowest.

A few candidates more than k are taken. Where the last of them scores less than the k-th, every term that ties for the
k-th place is among them, and a sort by (score, order) settles it; a query for which that fails is ranked in full.

Shapes: B queries, N terms, E embedding, C terms of a slice, K candidates or results.
"""

from collections.abc import Iterator
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

SPARE = 8
"""Candidates beyond k."""
BLOCK_TERMS = 256
# Scores of a slice, over all queries (64 MiB, 1 GiB in fp32): what bounds the memory of a search.
_CPU_SLICE, _GPU_SLICE = 1 << 24, 1 << 28

Scores: TypeAlias = NDArray[np.float32]
Places: TypeAlias = NDArray[np.int64]


def best_rows(query_BE: Tensor, term_NE: Tensor, k: int, order_N: Places) -> tuple[Scores, Places]:
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
    query_BE = query_BE.detach().to(term_NE.device, term_NE.dtype)
    best_of = _best_on_host if term_NE.device.type == "cpu" else _best_on_device
    scores_BK, places_BK = best_of(query_BE, term_NE.detach(), k + SPARE)
    best_BK = np.lexsort((order_N[places_BK], -scores_BK))[:, :k]
    last_B = scores_BK.min(axis=1)
    scores, places = np.take_along_axis(scores_BK, best_BK, 1), np.take_along_axis(places_BK, best_BK, 1)
    if scores_BK.shape[1] < len(term_NE):
        for query in np.flatnonzero(scores[:, -1] <= last_B):
            scores[query], places[query] = _full_ranking(query_BE[query], term_NE, k, order_N)
    return scores, places


def _slices(query_BE: Tensor, term_NE: Tensor, slice_scores: int) -> Iterator[tuple[int, Tensor]]:
    """(first term, score_BC) of slices that hold a whole number of blocks."""
    step = max(64, slice_scores // len(query_BE) // BLOCK_TERMS) * BLOCK_TERMS
    for start in range(0, len(term_NE), step):
        term_CE = term_NE[start : start + step]
        if len(query_BE) == 1 and term_CE.device.type == "cpu" and term_CE.dtype == torch.float32:
            # One query is bound by memory, and numpy's matrix-vector product reads about twice as fast as torch's.
            yield start, torch.from_numpy(term_CE.numpy() @ query_BE[0].numpy())[None]
        else:
            yield start, query_BE @ term_CE.T


def _best_on_host(query_BE: Tensor, term_NE: Tensor, count: int) -> tuple[Scores, Places]:
    """The highest `count` scores of each query and their places, in any order."""
    parts = []
    for start, score_BC in _slices(query_BE, term_NE, _CPU_SLICE):
        scores_BC = score_BC.float().numpy()
        num_blocks = scores_BC.shape[1] // BLOCK_TERMS
        if num_blocks <= 2 * count:
            column_BK = _highest(scores_BC, count)
        else:
            whole = num_blocks * BLOCK_TERMS
            blocks_BK = _highest(scores_BC[:, :whole].reshape(-1, num_blocks, BLOCK_TERMS).max(axis=2), count)
            column_BC = (blocks_BK[:, :, None] * BLOCK_TERMS + np.arange(BLOCK_TERMS)).reshape(len(scores_BC), -1)
            tail_BC = np.broadcast_to(
                np.arange(whole, scores_BC.shape[1]), (len(scores_BC), scores_BC.shape[1] - whole)
            )
            column_BC = np.concatenate((column_BC, tail_BC), axis=1)
            chosen_BK = _highest(np.take_along_axis(scores_BC, column_BC, 1), count)
            column_BK = np.take_along_axis(column_BC, chosen_BK, 1)
        parts.append((np.take_along_axis(scores_BC, column_BK, 1), column_BK + start))
    scores_BK, places_BK = (np.concatenate(both, axis=1) for both in zip(*parts, strict=True))
    chosen_BK = _highest(scores_BK, count)
    return np.take_along_axis(scores_BK, chosen_BK, 1), np.take_along_axis(places_BK, chosen_BK, 1)


def _highest(scores_BC: NDArray[np.float32], count: int) -> Places:
    """Columns of the highest `count` scores of each row, in any order."""
    if scores_BC.shape[1] <= count:
        return np.broadcast_to(np.arange(scores_BC.shape[1]), scores_BC.shape)
    return np.argpartition(scores_BC, -count, axis=1)[:, -count:]


def _best_on_device(query_BE: Tensor, term_NE: Tensor, count: int) -> tuple[Scores, Places]:
    """The same with all work on the device, and one copy to the host at the end."""
    parts = []
    for start, score_BC in _slices(query_BE, term_NE, _GPU_SLICE):
        num_blocks = score_BC.shape[1] // BLOCK_TERMS
        if num_blocks <= 2 * count:
            top = score_BC.topk(min(count, score_BC.shape[1]), dim=1)
            parts.append((top.values, top.indices + start))
            continue
        whole = num_blocks * BLOCK_TERMS
        blocks_BK = score_BC[:, :whole].unflatten(1, (num_blocks, BLOCK_TERMS)).amax(2).topk(count, dim=1).indices
        in_block_C = torch.arange(BLOCK_TERMS, device=score_BC.device)
        column_BC = (blocks_BK[:, :, None] * BLOCK_TERMS + in_block_C).flatten(1)
        if whole < score_BC.shape[1]:  # terms after the last whole block
            tail_C = torch.arange(whole, score_BC.shape[1], device=score_BC.device)
            column_BC = torch.cat((column_BC, tail_C.expand(len(score_BC), -1)), 1)
        top = score_BC.gather(1, column_BC).topk(count, dim=1)
        parts.append((top.values, column_BC.gather(1, top.indices) + start))
    score_BK, place_BK = (torch.cat(both, 1) for both in zip(*parts, strict=True))
    if len(parts) > 1:
        top = score_BK.topk(min(count, score_BK.shape[1]), dim=1)
        score_BK, place_BK = top.values, place_BK.gather(1, top.indices)
    both_2BK = torch.stack((score_BK.double(), place_BK.double())).cpu().numpy()  # exact: fp32, and integers < 2^53
    return both_2BK[0].astype(np.float32), both_2BK[1].astype(np.int64)


def _full_ranking(query_E: Tensor, term_NE: Tensor, k: int, order_N: Places) -> tuple[Scores, Places]:
    """For a query of which more terms tie than there are candidates."""
    scores_N = (term_NE @ query_E).float().cpu().numpy()
    reached = np.flatnonzero(scores_N >= np.partition(scores_N, -k)[-k])
    best = reached[np.lexsort((order_N[reached], -scores_N[reached]))[:k]]
    return scores_N[best], best
