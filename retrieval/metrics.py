"""How well clips find their terms: Recall@k, hit@k, reciprocal rank, and how well a clip without terms is told apart.

Definitions (those of trec_eval where it has one: recall.k, success.k, recip_rank), over the ranking of `ranks.py`:
  recall@k        mean over clips with a positive of |positives in the first k| / |positives|      (sample macro)
  term_recall@k   |positives in the first k| / |positives|, both summed over all clips              (term micro)
  hit@k           share of clips with at least one positive in the first k
  mrr             mean over clips of 1 / rank of the best positive
  seen, unseen    the same with only the positives that occur, or do not occur, in training; a clip without such a
                  positive is not counted; the ranking stays that of the full glossary
  no_term_auroc   probability that a random term clip's best score is above a random no-term clip's, ties one half
                  (the Mann-Whitney U statistic over the number of pairs)

Shapes: C clips, P positives of all clips one after another.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.ranks import ClipRanks

SUBSETS = ("all", "seen", "unseen")
KS = (1, 5, 10, 20, 100)


@dataclass(frozen=True)
class SubsetMetrics:
    """Metrics over the positives of one subset. All shares lie in [0, 1]."""

    num_clips: int
    num_positives: int
    recall: dict[int, float]
    term_recall: dict[int, float]
    hit: dict[int, float]
    mrr: float

    def flat(self, prefix: str = "", suffix: str = "") -> dict[str, float | int]:
        """`recall@10`, `term_recall@10`, `hit@10`, ..., `mrr`, `num_term_clips` and `num_positives` by name."""
        shares = {"recall": self.recall, "term_recall": self.term_recall, "hit": self.hit}
        numbers: dict[str, float | int] = {
            f"{prefix}{name}@{k}{suffix}": by_k[k] for k in self.recall for name, by_k in shares.items()
        }
        counts = {"num_term_clips": self.num_clips, "num_positives": self.num_positives}
        return numbers | {f"{prefix}{name}{suffix}": value for name, value in ({"mrr": self.mrr} | counts).items()}


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one evaluation. A subset without a clip is absent from `subsets`, never reported as 0."""

    num_clips: int
    num_no_term_clips: int
    num_terms: int
    no_term_auroc: float | None
    """None when there are no term clips or no no-term clips to tell apart."""
    subsets: dict[str, SubsetMetrics] = field(default_factory=dict)

    def recall(self, k: int, subset: str = "all") -> float:
        """Recall@k of a subset. Raises ValueError when no clip has a positive of that subset, or k was not measured."""
        if subset not in self.subsets:
            raise ValueError(f"subset: {subset!r} has no clips here; allowed: {', '.join(self.subsets) or 'none'}")
        if k not in self.subsets[subset].recall:
            raise ValueError(f"k: {k} was not measured; allowed: {sorted(self.subsets[subset].recall)}")
        return self.subsets[subset].recall[k]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON; JSON keys are strings, so `from_json` makes the k of recall@k integers again."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "EvalResult":
        by_k = ("recall", "term_recall", "hit")
        subsets = {
            name: SubsetMetrics(**{**one, **{field: {int(k): v for k, v in one[field].items()} for field in by_k}})
            for name, one in saved["subsets"].items()
        }
        return cls(**{**saved, "subsets": subsets})

    def flat(self, prefix: str = "eval/") -> dict[str, float | int]:
        """Slash-keyed numbers for metrics.jsonl: `eval/recall@10`, `eval/recall@10_seen`, `eval/mrr`, ..."""
        numbers: dict[str, float | int] = {
            f"{prefix}num_clips": self.num_clips,
            f"{prefix}num_no_term_clips": self.num_no_term_clips,
            f"{prefix}num_terms": self.num_terms,
        }
        for name, metrics in self.subsets.items():
            numbers |= metrics.flat(prefix, "" if name == "all" else f"_{name}")
        if self.no_term_auroc is not None:
            numbers[f"{prefix}no_term_auroc"] = self.no_term_auroc
        return numbers


def auroc(positive_A: NDArray[np.float64], negative_B: NDArray[np.float64]) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs; counted in integers, so exact. Raises on an empty side."""
    if not len(positive_A) or not len(negative_B):
        raise ValueError(
            f"auroc: {len(positive_A)} positives, {len(negative_B)} negatives; allowed: at least 1 of each"
        )
    sorted_B = np.sort(negative_B)
    below = int(np.searchsorted(sorted_B, positive_A, side="left").sum())
    below_or_equal = int(np.searchsorted(sorted_B, positive_A, side="right").sum())
    return (below + below_or_equal) / (2 * len(positive_A) * len(negative_B))


def summarise(ranks: ClipRanks, num_terms: int, ks: Sequence[int] = KS) -> EvalResult:
    """Metrics of all clips. `ranks` must hold each clip once, as `ClipRanks.join` and `unpack` make sure."""
    subsets = {}
    for name, chosen_P in zip(SUBSETS, (np.ones_like(ranks.seen_P), ranks.seen_P, ~ranks.seen_P), strict=True):
        if chosen_P.any():
            subsets[name] = subset_metrics(ranks, chosen_P, ks)
    with_term = ranks.top_C[ranks.num_positives_C > 0]
    without_term = ranks.top_C[ranks.is_no_term_C]
    return EvalResult(
        num_clips=len(ranks.clip_C),
        num_no_term_clips=len(without_term),
        num_terms=num_terms,
        no_term_auroc=auroc(with_term, without_term) if len(with_term) and len(without_term) else None,
        subsets=subsets,
    )


def subset_metrics(ranks: ClipRanks, chosen_P: NDArray[np.bool_], ks: Sequence[int] = KS) -> SubsetMetrics:
    """Metrics that count only the chosen positives, at least one; clips without such a positive do not count."""
    rank_P = ranks.rank_P[chosen_P]
    _, clip_P = np.unique(ranks.row_P[chosen_P], return_inverse=True)
    num_positives_C = np.bincount(clip_P)
    best_C = np.full(len(num_positives_C), np.iinfo(np.int64).max)
    np.minimum.at(best_C, clip_P, rank_P)
    num_clips = len(num_positives_C)
    found = {k: np.bincount(clip_P, weights=rank_P <= k, minlength=num_clips) for k in ks}
    # fsum is correctly rounded, so a mean does not depend on how clips were spread or in what order they came.
    return SubsetMetrics(
        num_clips=num_clips,
        num_positives=len(rank_P),
        recall={k: math.fsum(found[k] / num_positives_C) / num_clips for k in ks},
        term_recall={k: int((rank_P <= k).sum()) / len(rank_P) for k in ks},
        hit={k: int((best_C <= k).sum()) / num_clips for k in ks},
        mrr=math.fsum(1.0 / best_C) / num_clips,
    )
