"""The score from which on a term is reported: chosen on dev clips for a target, and what it costs on others.

A search reports, of a clip's k best terms, those with score >= threshold. Over all clips, those without a term too:

    precision         right reports / reports
    recall            right reports / positives
    false_alarm       share of no-term clips with at least one report

Both targets only bound the threshold from below, so the lowest one that meets the target is taken: it finds the most.
Terms that are neither right nor wrong for a clip are not in its ranking, so they count as no report at all.

Shapes: C clips, T best terms kept of each, R reports.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from retrieval.ranks import ClipRanks
from retrieval.significance import Ratio

TARGETS = ("precision", "false_alarm")


@dataclass(frozen=True)
class Target:
    """What a threshold must achieve: `precision=0.9` or `false_alarm=0.05`."""

    name: Literal["precision", "false_alarm"]
    value: float

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Raises ValueError naming what is allowed."""
        name, _, number = text.partition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if name not in TARGETS or not 0.0 <= value <= 1.0:
            raise ValueError(f"calibrate: got {text!r}; allowed: precision=P or false_alarm=R, with a number of 0 to 1")
        return cls(name, value)  # type: ignore[arg-type]

    def __str__(self) -> str:
        return f"{self.name}={self.value:g}"


@dataclass(frozen=True)
class OperatingPoint:
    """What a threshold does to some clips. A share with nothing to divide by is None, never 0 or 1."""

    threshold: float
    k: int
    num_reports: int
    precision: float | None
    recall: float | None
    false_alarm: float | None
    reports_per_clip: float

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


def report_ratios(ranks: ClipRanks, threshold: float, k: int) -> dict[str, Ratio]:
    """precision, recall and false_alarm at a threshold as ratios of sums over clips, for points and bootstrap alike.

    Raises ValueError when fewer than k terms of each clip were kept.
    """
    is_reported_CT = _first(ranks.top_score_CT, k) >= threshold
    right_C = (is_reported_CT & _first(ranks.is_right_CT, k)).sum(axis=1).astype(np.float64)
    reports_C = is_reported_CT.sum(axis=1).astype(np.float64)
    no_term_C = ranks.is_no_term_C.astype(np.float64)
    return {
        "precision": (right_C, reports_C),
        "recall": (right_C, ranks.num_positives_C.astype(np.float64)),
        "false_alarm": ((reports_C > 0) * no_term_C, no_term_C),
    }


def operating_point(ranks: ClipRanks, threshold: float, k: int) -> OperatingPoint:
    """What the threshold does to these clips when the best k terms are asked for."""
    ratios = report_ratios(ranks, threshold, k)
    shares = {
        name: float(above.sum() / below.sum()) if below.sum() else None for name, (above, below) in ratios.items()
    }
    num_reports = int(ratios["precision"][1].sum())
    return OperatingPoint(threshold, k, num_reports, **shares, reports_per_clip=num_reports / max(1, ranks.num_clips))


def calibrate(ranks: ClipRanks, target: Target, k: int) -> OperatingPoint:
    """The lowest threshold that meets the target on these clips, half-way to the next score below it.

    Raises:
        ValueError: there is nothing to measure the target on, no threshold meets it, or fewer than k terms were kept.
    """
    if target.name == "false_alarm":
        return operating_point(ranks, _for_false_alarm(ranks, target, k), k)
    return operating_point(ranks, _for_precision(ranks, target, k), k)


def _for_precision(ranks: ClipRanks, target: Target, k: int) -> float:
    is_term_CT = _first(ranks.top_place_CT, k) >= 0
    scores_R, right_R = _first(ranks.top_score_CT, k)[is_term_CT], _first(ranks.is_right_CT, k)[is_term_CT]
    if not right_R.any():
        raise ValueError(f"calibrate: got {target}, but none of the best {k} terms of any clip is right")
    order_R = np.argsort(-scores_R, kind="stable")
    scores_R, right_R = scores_R[order_R].astype(np.float64), right_R[order_R]
    precision_R = np.cumsum(right_R) / np.arange(1, len(right_R) + 1)
    is_last_of_tie_R = np.append(scores_R[1:] != scores_R[:-1], True)
    met = np.flatnonzero((precision_R >= target.value) & is_last_of_tie_R & (np.cumsum(right_R) > 0))
    if not len(met):
        best = float(precision_R[is_last_of_tie_R].max())
        raise ValueError(f"calibrate: got {target}, but the best that a threshold reaches on these clips is {best:.3f}")
    return _between(scores_R, int(met[-1]))


def _for_false_alarm(ranks: ClipRanks, target: Target, k: int) -> float:
    top_R = np.sort(ranks.top_C[ranks.is_no_term_C])[::-1]
    if not len(top_R):
        raise ValueError(f"calibrate: got {target}, but there are no clips without a term; allowed then: precision=P")
    num_allowed = math.floor(target.value * len(top_R) + 1e-9)
    if num_allowed == len(top_R):
        return -1.0  # every clip may raise an alarm: no threshold at all, a cosine reaches no lower
    # Just above the first alarm too many, as far from it as from the next higher score of any clip.
    scores = _first(ranks.top_score_CT, k).astype(np.float64)
    higher = scores[scores > top_R[num_allowed]]
    return _between(np.array([higher.min() if len(higher) else 1.0, top_R[num_allowed]]), 0)


def _between(descending: NDArray[np.float64], last: int) -> float:
    """A threshold that lets entries up to `last` pass and none beyond: half-way, for scores move in their last bits."""
    if last + 1 == len(descending):
        return float(descending[last])
    middle = float((descending[last] + descending[last + 1]) / 2.0)
    return middle if middle > descending[last + 1] else float(descending[last])


def _first(best_CT: NDArray, k: int) -> NDArray:
    if not 1 <= k <= best_CT.shape[1]:
        raise ValueError(f"k: {k}; allowed: 1 to {best_CT.shape[1]}, the number of best terms that were kept")
    return best_CT[:, :k]
