"""Rank keys order as scores and term keys do; chunks, parts and packing change nothing."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.judgements import Judgements
from retrieval.ranks import ClipRanks, Ranker, best_keys, places_of, rank_keys, rank_positives, scores_of
from tests.retrieval.cases import random_case

FLOATS = st.floats(-2.0, 2.0, width=32)


@given(st.lists(FLOATS, min_size=1, max_size=30), st.randoms())
def test_keys_order_by_score_then_term_key_and_give_both_back(scores: list[float], shuffle) -> None:  # type: ignore[no-untyped-def]
    order = list(range(len(scores)))
    shuffle.shuffle(order)
    scores_1N, order_N = torch.tensor([scores]), torch.tensor(order)
    keys_1N = rank_keys(scores_1N, order_N)
    expected = sorted(range(len(scores)), key=lambda i: (-scores[i], order[i]))
    best_1N = best_keys(keys_1N, len(scores))
    assert places_of(best_1N, order_N.argsort())[0].tolist() == expected
    assert torch.equal(scores_of(keys_1N), scores_1N)


def test_fewer_terms_than_asked_for_leave_absent_places() -> None:
    keys_12 = rank_keys(torch.tensor([[0.5, -0.5]]), torch.tensor([0, 1]))
    best_14 = best_keys(keys_12, 4)
    assert places_of(best_14, torch.tensor([0, 1])).tolist() == [[0, 1, -1, -1]]
    assert scores_of(best_14).tolist() == [[0.5, -0.5, -np.inf, -np.inf]]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(1, 39), max_size=5), num_top=st.integers(1, 45))
def test_chunks_of_any_size_give_what_a_full_sort_gives(seed: int, cuts: list[int], num_top: int) -> None:
    scores_CN, judgements = random_case(seed, num_clips=12)
    scores_CN = (scores_CN * 8).round() / 8  # many ties
    edges = [0, *sorted(set(cuts)), 40]
    spans = list(itertools.pairwise(edges))
    ranker = Ranker(range(12), judgements, num_top)
    for start, stop in spans:
        ranker.note_positives(scores_CN[:, start:stop], start)
    for start, stop in spans:
        ranker.add(scores_CN[:, start:stop], start)
    ranks = ranker.ranks()
    for row, (clip, found) in enumerate(zip(range(12), ranks.top_place_CT, strict=True)):
        out = set(judgements.ignored[clip]) - set(judgements.positives[clip])
        full = [i for i in range(40) if i not in out]
        full.sort(key=lambda i: (-float(scores_CN[clip, i]), judgements.order_N[i]))
        assert found.tolist() == (full + [-1] * 45)[:num_top]
        assert ranks.rank_P[ranks.row_P == row].tolist() == [full.index(i) + 1 for i in judgements.positives[clip]]
        assert ranks.score_P[ranks.row_P == row].tolist() == [scores_CN[clip, i] for i in judgements.positives[clip]]
        right = [place in judgements.positives[clip] for place in found]
        assert ranks.is_right_CT[row].tolist() == right


def test_ranks_in_between_are_those_among_the_terms_so_far() -> None:
    judgements = Judgements.from_terms(["b", "c", "a"], [["b"]])
    ranker = Ranker([0], judgements)
    scores_13 = torch.tensor([[0.1, 0.0, 0.2]])
    ranker.note_positives(scores_13, 0)
    ranker.add(scores_13[:, :2], 0)
    assert ranker.ranks().rank_P.tolist() == [1]
    ranker.add(scores_13[:, 2:], 2)
    assert ranker.ranks().rank_P.tolist() == [2]


def test_counting_before_the_positives_are_known_is_refused() -> None:
    with pytest.raises(AssertionError, match="note_positives comes before add"):
        Ranker([0], Judgements.from_terms(["a", "b"], [["b"]])).add(torch.zeros(1, 2), 0)


def test_equal_scores_rank_by_term_key_not_by_column() -> None:
    keys = ["delta", "alpha", "charlie", "bravo"]
    judgements = Judgements.from_terms(keys, [["delta"], ["alpha"], ["charlie"], ["bravo"]])
    ranks = rank_positives(torch.zeros(4, 4), range(4), judgements)
    assert ranks.rank_P.tolist() == [4, 1, 3, 2]


def test_pack_keeps_every_bit() -> None:
    scores_CN, judgements = random_case(5)
    ranks = rank_positives(scores_CN * -(1 / 3), range(60), judgements)
    again = ClipRanks.unpack(ranks.pack())
    for name in vars(ranks):
        np.testing.assert_array_equal(getattr(again, name), getattr(ranks, name))


def test_a_clip_measured_twice_is_an_error() -> None:
    scores_CN, judgements = random_case(6)
    part = rank_positives(scores_CN[:3], range(3), judgements)
    with pytest.raises(ValueError, match="3 clips were measured more than once"):
        ClipRanks.join([part, part])


def test_a_variant_of_its_own_term_stays_positive() -> None:
    both = Judgements.from_terms(["plural", "other"], [["plural"]], [["plural", "other"]])
    assert rank_positives(torch.tensor([[0.1, 0.9]]), [0], both).rank_P.tolist() == [1]


def test_a_glossary_larger_than_the_comparison_table(monkeypatch: pytest.MonkeyPatch) -> None:
    scores_CN, judgements = random_case(7)
    whole = rank_positives(scores_CN, range(60), judgements).rank_P
    monkeypatch.setattr("retrieval.ranks._TABLE_ELEMENTS", 100)
    np.testing.assert_array_equal(rank_positives(scores_CN, range(60), judgements).rank_P, whole)


def test_broken_scores_are_errors() -> None:
    judgements = Judgements.from_terms(["a", "b"], [["a"]])
    with pytest.raises(ValueError, match="NaN or infinity"):
        rank_positives(torch.tensor([[0.1, float("nan")]]), [0], judgements)
    with pytest.raises(ValueError, match=r"shape \(1, 3\); allowed: \(1, 2\)"):
        rank_positives(torch.zeros(1, 3), [0], judgements)
