"""What a search gives: `Hits` are rows of an index, a `Match` is told to people.

Shapes: K results.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Match:
    """A term that was found. Times: seconds from the start of the clip or stream, None where the read-out has none."""

    score: float
    term: str
    surface: str
    translations: dict[str, list[str]]
    start_s: float | None = None
    end_s: float | None = None


@dataclass(frozen=True)
class Hits:
    """The best terms of one clip, best first; `spans_K2` are seconds from its start, where the read-out gives them."""

    scores_K: NDArray[np.float32]
    places_K: NDArray[np.int64]
    spans_K2: NDArray[np.float64] | None = None

    def first(self, k: int) -> "Hits":
        return Hits(self.scores_K[:k], self.places_K[:k], None if self.spans_K2 is None else self.spans_K2[:k])
