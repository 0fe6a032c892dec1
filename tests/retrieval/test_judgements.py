"""What is right for a clip, and what contradicts itself."""

import numpy as np
import pytest

from retrieval.judgements import Judgements


def test_places_order_and_its_inverse() -> None:
    judgements = Judgements.from_terms(["delta", "alpha", "charlie"], [["charlie", "delta"]], [["zebra", "alpha"]])
    assert judgements.positives == [[0, 2]]
    assert judgements.ignored == [[1]]  # what is not in the glossary does not matter
    assert judgements.order_N.tolist() == [2, 0, 1]
    np.testing.assert_array_equal(judgements.order_N[judgements.by_order_N], np.arange(3))


def test_a_clip_with_only_cut_terms_is_neither_term_nor_no_term() -> None:
    judgements = Judgements.from_terms(["one", "two"], [[], [], ["one"]], [["one"], [], []])
    assert judgements.is_no_term_C.tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"term_keys": ["a", "a"]}, "term_keys: 1 terms occur more than once"),
        ({"clip_terms": [["zebra"]]}, r"clip_terms: 1 terms are not in the glossary of 2, for example \['zebra'\]"),
        ({"clip_ignored": [["a"], ["b"]]}, "clip_ignored: 2 entries for 1 clips"),
        ({"is_no_term": [True]}, r"is_no_term: clips \[0\] are marked no-term and have terms"),
        ({"is_no_term": [False, False]}, "is_no_term: 2 entries for 1 clips"),
    ],
)
def test_judgements_that_contradict_themselves_are_errors(change: dict[str, object], message: str) -> None:
    given_terms: dict[str, object] = {"term_keys": ["a", "b"], "clip_terms": [["a"]]}
    with pytest.raises(ValueError, match=message):
        Judgements.from_terms(**{**given_terms, **change})  # type: ignore[arg-type]
