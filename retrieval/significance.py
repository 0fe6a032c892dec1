"""How far a metric could be off by the luck of the test set: percentile bootstrap over clips.

Efron and Tibshirani, "An Introduction to the Bootstrap" (1993), chapter 13: draw as many clips as there are, with
replacement, measure again, and take the middle 95 % of many such results. Clips, not terms, are drawn: the terms of one
clip are found or missed together.

Every metric but the AUROC is a ratio of two sums over clips, so a resample is a vector of how often each clip was
drawn, and a thousand of them are two matrix products.

Shapes: C clips, W resamples, M metrics, G distinct scores.
"""

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from retrieval.metrics import KS
from retrieval.ranks import ClipRanks

NUM_RESAMPLES = 1000
LEVEL = 0.95
# Elements of one table of counts (32 MiB in fp64).
_TABLE_ELEMENTS = 1 << 22

Ratio = tuple[NDArray[np.float64], NDArray[np.float64]]
"""A metric as (numerator_C, denominator_C): its value is the ratio of their sums."""
Interval = tuple[float, float]


def metric_ratios(ranks: ClipRanks, ks: Sequence[int] = KS) -> dict[str, Ratio]:
    """recall@k, term_recall@k, hit@k and mrr, each as a ratio of sums over clips."""
    row_P, num_clips = ranks.row_P, ranks.num_clips
    count_C = ranks.num_positives_C.astype(np.float64)
    has_C = (count_C > 0).astype(np.float64)
    best_C = np.full(num_clips, np.inf)
    np.minimum.at(best_C, row_P, ranks.rank_P.astype(np.float64))
    ratios: dict[str, Ratio] = {}
    for k in ks:
        found_C = np.bincount(row_P, weights=ranks.rank_P <= k, minlength=num_clips).astype(np.float64)
        ratios[f"recall@{k}"] = found_C / np.maximum(1.0, count_C), has_C
        ratios[f"term_recall@{k}"] = found_C, count_C
        ratios[f"hit@{k}"] = (best_C <= k).astype(np.float64), has_C
    ratios["mrr"] = 1.0 / best_C, has_C
    return ratios


def bootstrap(
    ratios: Mapping[str, Ratio], num_resamples: int = NUM_RESAMPLES, seed: int = 0, level: float = LEVEL
) -> dict[str, Interval]:
    """The interval of each metric. Deterministic: the same clips in the same order and seed give the same bits.

    A metric whose denominator is 0 for all clips is left out. Resamples in which it happens to be 0 are not counted.
    """
    known = {name: ratio for name, ratio in ratios.items() if ratio[1].sum() > 0}
    if not known:
        return {}
    above_CM = np.stack([above for above, _ in known.values()], axis=1)
    below_CM = np.stack([below for _, below in known.values()], axis=1)
    parts = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for drawn_WC in _resamples(len(above_CM), num_resamples, seed):
            parts.append((drawn_WC @ above_CM) / (drawn_WC @ below_CM))
    return dict(zip(known, _intervals(np.concatenate(parts), level), strict=True))


def bootstrap_auroc(
    ranks: ClipRanks, num_resamples: int = NUM_RESAMPLES, seed: int = 0, level: float = LEVEL
) -> Interval | None:
    """The interval of `metrics.EvalResult.no_term_auroc`; None when there are no clips to tell apart."""
    is_term_C = ranks.num_positives_C > 0
    used_C = is_term_C | ranks.is_no_term_C
    if not is_term_C.any() or not ranks.is_no_term_C.any():
        return None
    by_score = np.argsort(ranks.top_C[used_C], kind="stable")
    chosen = np.flatnonzero(used_C)[by_score]
    scores, is_term = ranks.top_C[chosen], is_term_C[chosen].astype(np.float64)
    starts_G = np.flatnonzero(np.concatenate([[True], scores[1:] != scores[:-1]]))
    parts = []
    with np.errstate(invalid="ignore", divide="ignore"):
        for drawn_WC in _resamples(ranks.num_clips, num_resamples, seed):
            weights = drawn_WC[:, chosen]
            term_WG = np.add.reduceat(weights * is_term, starts_G, axis=1)
            without_WG = np.add.reduceat(weights * (1.0 - is_term), starts_G, axis=1)
            below_WG = np.cumsum(without_WG, axis=1) - without_WG / 2.0  # equal scores count one half
            pairs_W = term_WG.sum(axis=1) * without_WG.sum(axis=1)
            parts.append(((term_WG * below_WG).sum(axis=1) / pairs_W)[:, None])
    return _intervals(np.concatenate(parts), level)[0]


def _resamples(num_clips: int, num_resamples: int, seed: int) -> Iterator[NDArray[np.float64]]:
    """Tables [W, C] of how often each clip is drawn; all rows together are `num_resamples`."""
    generator = np.random.default_rng(seed)
    step = max(1, _TABLE_ELEMENTS // num_clips)
    for done in range(0, num_resamples, step):
        rows = min(step, num_resamples - done)
        drawn = generator.integers(0, num_clips, size=(rows, num_clips)) + num_clips * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * num_clips).reshape(rows, num_clips).astype(np.float64)


def _intervals(values_WM: NDArray[np.float64], level: float) -> list[Interval]:
    outside = (1.0 - level) / 2.0
    low_M, high_M = np.nanquantile(values_WM, [outside, 1.0 - outside], axis=0)
    return list(zip(low_M.tolist(), high_M.tolist(), strict=True))
