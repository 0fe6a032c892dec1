"""What is right for each clip: positives, ignored terms, no-term clips, in places of the glossary.

Shapes: C clips, N terms of the glossary.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Judgements:
    """What is right for each clip, in places of the glossary.

    A term that a clip names both as positive and as ignored (a variant of its own term) counts as positive.
    """

    positives: list[list[int]]
    ignored: list[list[int]]
    is_no_term_C: NDArray[np.bool_]
    seen_N: NDArray[np.bool_]
    order_N: NDArray[np.int64]
    """Place of each term when the term keys are sorted: what breaks ties."""

    @property
    def num_clips(self) -> int:
        return len(self.positives)

    @property
    def num_terms(self) -> int:
        return len(self.seen_N)

    @cached_property
    def by_order_N(self) -> NDArray[np.int64]:
        """The inverse of `order_N`: entry o is the place of the term that sorts as number o."""
        return np.argsort(self.order_N)

    @classmethod
    def from_terms(
        cls,
        term_keys: Sequence[str],
        clip_terms: Sequence[Iterable[str]],
        clip_ignored: Sequence[Iterable[str]] | None = None,
        is_no_term: Sequence[bool] | None = None,
        seen_terms: Iterable[str] = (),
    ) -> "Judgements":
        """Look terms up in the glossary.

        Args:
            term_keys: the glossary's N distinct normalised terms, in the order of the term embeddings.
            clip_terms: the normalised terms of each clip.
            clip_ignored: terms that are neither right nor wrong for the clip; those outside the glossary do not matter.
            is_no_term: which clips name no term at all; when not given, those with neither terms nor ignored terms.
            seen_terms: normalised terms that occur in training.

        Raises:
            ValueError: a term occurs twice in the glossary, a clip's term is not in it, or lengths differ.
        """
        place = {key: i for i, key in enumerate(term_keys)}
        if len(place) != len(term_keys):
            raise ValueError(f"term_keys: {len(term_keys) - len(place)} terms occur more than once; allowed: distinct")
        missing = sorted({term for terms in clip_terms for term in terms if term not in place})
        if missing:
            raise ValueError(
                f"clip_terms: {len(missing)} terms are not in the glossary of {len(place)}, for example {missing[:5]}; "
                "add them to the glossary or take them out of the clips"
            )
        num_clips = len(clip_terms)
        no_ignored: list[Iterable[str]] = [() for _ in range(num_clips)]
        ignored_terms = no_ignored if clip_ignored is None else clip_ignored
        positives = [sorted({place[term] for term in terms}) for terms in clip_terms]
        ignored = [sorted({place[term] for term in terms if term in place}) for terms in ignored_terms]
        if len(ignored) != num_clips:
            raise ValueError(f"clip_ignored: {len(ignored)} entries for {num_clips} clips; allowed: one a clip")
        if is_no_term is None:
            is_no_term = [not p and not list(i) for p, i in zip(positives, ignored_terms, strict=True)]
        if len(is_no_term) != num_clips:
            raise ValueError(f"is_no_term: {len(is_no_term)} entries for {num_clips} clips; allowed: one a clip")
        contradicting = [i for i, no_term in enumerate(is_no_term) if no_term and positives[i]]
        if contradicting:
            raise ValueError(f"is_no_term: clips {contradicting[:5]} are marked no-term and have terms")
        seen = set(seen_terms)
        order_N = np.empty(len(place), dtype=np.int64)
        order_N[sorted(range(len(place)), key=lambda i: term_keys[i])] = np.arange(len(place))
        return cls(
            positives,
            ignored,
            np.array(is_no_term, dtype=np.bool_),
            np.array([key in seen for key in term_keys], dtype=np.bool_),
            order_N,
        )
