"""One measurement of a model: the facts of every clip at every glossary size, and what follows from them.

`account` puts all of it into one strict-JSON value, which the table, the report and other programs read.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data.clips import Clip
from retrieval.breakdowns import breakdowns
from retrieval.calibration import operating_point, report_ratios
from retrieval.metrics import KS, EvalResult, summarise
from retrieval.ranks import ClipRanks
from retrieval.significance import LEVEL, NUM_RESAMPLES, bootstrap, bootstrap_auroc, metric_ratios

NUM_BINS = 36
NUM_POINTS = 80


@dataclass(frozen=True)
class Miss:
    """A right term that other terms were ranked before."""

    clip: Clip
    term: str
    rank: int
    score: float
    found: list[tuple[str, float, bool]]
    """The best terms instead: term, score, whether it is right as well."""


@dataclass(frozen=True)
class Measured:
    """The facts of all clips that could be read."""

    clips: Sequence[Clip]
    terms: Sequence[str]
    """Normal forms in the order of places: the right terms, the rest of the glossary, distractors."""
    num_glossary: int
    ranks_by_size: Mapping[int, ClipRanks]
    """By the number of terms ranked, the first so many of `terms`."""

    @property
    def ranks(self) -> ClipRanks:
        """Against the glossary itself, without distractors and undivided."""
        return self.ranks_by_size[self.num_glossary]

    def result(self, num_terms: int | None = None, ks: Sequence[int] = KS) -> EvalResult:
        size = self.num_glossary if num_terms is None else num_terms
        return summarise(self.ranks_by_size[size], size, ks)

    def best(self, row: int, k: int) -> list[tuple[str, float, bool]]:
        """The first k terms of a measured clip: term, score, whether it is right."""
        ranks = self.ranks
        columns = (ranks.top_place_CT[row, :k], ranks.top_score_CT[row, :k], ranks.is_right_CT[row, :k])
        best = zip(*(column.tolist() for column in columns), strict=True)
        return [(self.terms[place], score, is_right) for place, score, is_right in best if place >= 0]

    def examples(self, count: int, k: int = 5) -> list[tuple[Clip, list[str]]]:
        """`count` clips at even distances, each with its first k terms."""
        rows = range(0, self.ranks.num_clips, max(1, self.ranks.num_clips // max(1, count)))[:count]
        return [(self.clips[self.ranks.clip_C[row]], [term for term, _, _ in self.best(row, k)]) for row in rows]

    def misses(self, count: int, k: int = 5) -> list[Miss]:
        """The clips whose worst-placed right term is furthest from the first places, worst first, each clip once."""
        ranks = self.ranks
        worst_first = np.lexsort((ranks.place_P, ranks.score_P, -ranks.rank_P))
        row_P, taken = ranks.row_P, set()
        found: list[Miss] = []
        for p in worst_first:
            row, rank = int(row_P[p]), int(ranks.rank_P[p])
            if len(found) == count:
                break
            if row not in taken and rank > ranks.num_positives_C[row]:
                taken.add(row)
                clip = self.clips[ranks.clip_C[row]]
                term = self.terms[ranks.place_P[p]]
                found.append(Miss(clip, term, rank, float(ranks.score_P[p]), self.best(row, k)))
        return found


def account(
    measured: Measured,
    threshold: Mapping[str, Any] | None = None,
    training_clips: Mapping[str, int] | None = None,
    ks: Sequence[int] = KS,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> dict[str, Any]:
    """Everything that is reported of a measurement, as strict JSON.

    Args:
        threshold: what `calibration.calibrate` found (value, k, ...), to be applied to these clips.
        training_clips: how many training clips name a term; without it there is no such breakdown.
    """
    sizes = []
    for num_terms, ranks in measured.ranks_by_size.items():
        result = measured.result(num_terms, ks)
        ratios = metric_ratios(ranks, ks)
        entry: dict[str, Any] = {
            "num_terms": num_terms,
            "num_distractors": max(0, num_terms - measured.num_glossary),
            "metrics": result.flat(""),
        }
        if threshold is not None:
            entry["at_threshold"] = operating_point(ranks, threshold["value"], threshold["k"]).to_json()
            at_threshold = report_ratios(ranks, threshold["value"], threshold["k"])
            ratios |= {f"at_threshold/{name}": ratio for name, ratio in at_threshold.items()}
        intervals = bootstrap(ratios, num_resamples, seed)
        auroc = bootstrap_auroc(ranks, num_resamples, seed)
        if auroc is not None:
            intervals["no_term_auroc"] = auroc
        entry["intervals"] = {name: list(interval) for name, interval in intervals.items()}
        sizes.append(entry)
    return {
        "num_clips": len(measured.clips),
        "num_measured": measured.ranks.num_clips,
        "num_glossary": measured.num_glossary,
        "ks": list(ks),
        "interval": {"level": LEVEL, "num_resamples": num_resamples, "seed": seed, "over": "clips"},
        "threshold": None if threshold is None else dict(threshold),
        "sizes": sizes,
        "breakdowns": {
            title: [bucket.to_json() for bucket in buckets]
            for title, buckets in breakdowns(measured.ranks, measured.terms, training_clips, ks).items()
        },
        "scores": score_histograms(measured.ranks),
        "operating_curve": operating_curve(measured.ranks),
    }


def score_histograms(ranks: ClipRanks, num_bins: int = NUM_BINS) -> dict[str, Any]:
    """Counts in equal bins of three kinds of scores: what a threshold has to tell apart.

    positive: of each right term; negative: of the best wrong term of each clip with a term (where one was kept);
    no_term: the best score of each clip without a term.
    """
    wrong_CT = np.where(ranks.is_right_CT | (ranks.top_place_CT < 0), -np.inf, ranks.top_score_CT)
    best_wrong_C = wrong_CT.max(axis=1)[ranks.num_positives_C > 0]
    kinds = {
        "positive": ranks.score_P,
        "negative": best_wrong_C[np.isfinite(best_wrong_C)],
        "no_term": ranks.top_C[ranks.is_no_term_C],
    }
    every = np.concatenate([np.asarray(scores, dtype=np.float64) for scores in kinds.values()])
    every = every[np.isfinite(every)]
    low, high = (float(every.min()), float(every.max())) if len(every) else (-1.0, 1.0)
    low, high = np.floor(low * 20) / 20, np.ceil(high * 20) / 20
    edges = np.linspace(low, high if high > low else low + 0.05, num_bins + 1)
    counts = {name: np.histogram(scores, edges)[0].tolist() for name, scores in kinds.items()}
    return {"edges": edges.tolist(), "counts": counts}


def operating_curve(ranks: ClipRanks, num_points: int = NUM_POINTS, k: int | None = None) -> list[dict[str, Any]]:
    """Precision, recall and false alarms over thresholds from the lowest to the highest best score."""
    k = min(10, ranks.num_top) if k is None else k
    finite = ranks.top_C[np.isfinite(ranks.top_C)]
    if not len(finite):
        return []
    kept = ranks.top_score_CT[:, :k]
    thresholds = np.linspace(float(kept[np.isfinite(kept)].min()), float(finite.max()), num_points)
    return [operating_point(ranks, float(threshold), k).to_json() for threshold in thresholds]


def count_training_clips(clips: Iterable[Clip]) -> dict[str, int]:
    """How many clips name each term."""
    counts: dict[str, int] = {}
    for clip in clips:
        for term in clip.terms:
            counts[term] = counts.get(term, 0) + 1
    return counts
