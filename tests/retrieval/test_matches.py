"""Hits cut to fewer keep scores, places and spans together."""

import numpy as np

from retrieval.matches import Hits


def test_the_first_hits_keep_what_belongs_together() -> None:
    spans_K2 = np.array([[0.0, 0.5], [0.1, 0.6], [0.2, 0.7]])
    first = Hits(np.array([0.9, 0.8, 0.7], np.float32), np.array([5, 3, 4]), spans_K2).first(2)
    assert first.places_K.tolist() == [5, 3]
    assert first.scores_K.tolist() == np.array([0.9, 0.8], np.float32).tolist()
    assert first.spans_K2 is not None
    assert first.spans_K2.tolist() == [[0.0, 0.5], [0.1, 0.6]]
    assert Hits(np.ones(2, np.float32), np.arange(2)).first(9).spans_K2 is None
