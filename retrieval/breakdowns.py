"""Which terms are found and which are not: recall by a term's length in words and letters, and by its training clips.

A bucket counts only the positives whose term lies in it, as the subsets seen and unseen do; the ranking stays that of
the full glossary.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from retrieval.metrics import KS, SubsetMetrics, subset_metrics
from retrieval.ranks import ClipRanks

# First value of each bucket after the first; the buckets of words are 1, 2, 3, 4 and more.
WORDS = (1, 2, 3, 4)
CHARACTERS = (0, 5, 8, 12, 17)
TRAINING_CLIPS = (0, 1, 2, 5, 20, 100, 1000)


@dataclass(frozen=True)
class Bucket:
    """The positives of one range of terms."""

    name: str
    num_terms: int
    """Different terms of the range that any clip names."""
    metrics: SubsetMetrics

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "num_terms": self.num_terms, "metrics": self.metrics.flat()}


def breakdowns(
    ranks: ClipRanks,
    terms: Sequence[str],
    training_clips: Mapping[str, int] | None = None,
    ks: Sequence[int] = KS,
) -> dict[str, list[Bucket]]:
    """The metrics by `words`, `characters` and, when given, `training_clips`. Ranges without a positive are left out.

    Args:
        terms: normal forms, in the order of the ranking's places.
        training_clips: how many training clips name a term; absent = none.
    """
    gold, where_P = np.unique(ranks.place_P, return_inverse=True)
    names = [terms[place] for place in gold]
    values = {
        "words": ([len(name.split()) for name in names], WORDS),
        "characters": ([len(name) for name in names], CHARACTERS),
    }
    if training_clips is not None:
        values["training_clips"] = ([training_clips.get(name, 0) for name in names], TRAINING_CLIPS)
    return {
        title: _buckets(ranks, np.array(of_term, dtype=np.int64)[where_P], edges, ks)
        for title, (of_term, edges) in values.items()
    }


def _buckets(ranks: ClipRanks, value_P: NDArray[np.int64], edges: Sequence[int], ks: Sequence[int]) -> list[Bucket]:
    found = []
    for first, following in zip(edges, [*edges[1:], None], strict=True):
        chosen_P = (value_P >= first) & (value_P < (following if following is not None else np.iinfo(np.int64).max))
        if chosen_P.any():
            num_terms = len(np.unique(ranks.place_P[chosen_P]))
            found.append(Bucket(_name(first, following), num_terms, subset_metrics(ranks, chosen_P, ks)))
    return found


def _name(first: int, following: int | None) -> str:
    if following is None:
        return f"{first}+"
    return str(first) if following == first + 1 else f"{first}-{following - 1}"
