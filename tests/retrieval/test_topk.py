"""The pruned search is a full sort: any size, slices and blocks, ties at the border, whole glossaries of equals."""

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import retrieval.topk
from retrieval.topk import best_rows


def full_sort(query_BE: torch.Tensor, term_NE: torch.Tensor, k: int, order_N: np.ndarray) -> np.ndarray:
    scores_BN = (query_BE @ term_NE.T).numpy()
    return np.stack([np.lexsort((order_N, -scores_N))[:k] for scores_N in scores_BN])


@pytest.fixture(params=["host", "device"], autouse=True)
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways, on the CPU."""
    if request.param == "device":
        monkeypatch.setattr(retrieval.topk, "_best_on_host", retrieval.topk._best_on_device)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60, deadline=None)
@given(st.integers(1, 3000), st.integers(1, 5), st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
def test_any_size_equals_a_full_sort(num_terms: int, queries: int, k: int, values: int, seed: int) -> None:
    """Small integers: products are exact in any order, and many scores tie."""
    rng = np.random.default_rng(seed)
    query_BE = torch.from_numpy(rng.integers(-values, values + 1, (queries, 4))).float()
    term_NE = torch.from_numpy(rng.integers(-values, values + 1, (num_terms, 4))).float()
    order_N = rng.permutation(num_terms)
    scores, places = best_rows(query_BE, term_NE, k, order_N)
    np.testing.assert_array_equal(places, full_sort(query_BE, term_NE, k, order_N))
    np.testing.assert_array_equal(scores, np.take_along_axis((query_BE @ term_NE.T).numpy(), places, 1))


def test_slices_and_blocks_and_the_rest_after_them(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("_CPU_SLICE", "_GPU_SLICE"):
        monkeypatch.setattr(retrieval.topk, name, 1)  # the smallest slice: 64 blocks
    generator = torch.Generator().manual_seed(0)
    term_NE = torch.randn(2 * 64 * 256 + 12_345, 8, generator=generator)
    query_BE = torch.randn(3, 8, generator=generator)
    order_N = np.arange(len(term_NE))
    _, places = best_rows(query_BE, term_NE, 10, order_N)
    np.testing.assert_array_equal(places, full_sort(query_BE, term_NE, 10, order_N))
    assert {int(place) // (64 * 256) for place in places.flatten()} == {0, 1, 2}


def test_one_block_may_hold_all_of_the_best() -> None:
    term_NE = torch.zeros(20_000, 2)
    term_NE[7000:7020, 0] = torch.arange(20.0) + 1
    _, places = best_rows(torch.tensor([[1.0, 0.0]]), term_NE, 20, np.arange(20_000))
    assert places[0].tolist() == list(range(7019, 6999, -1))


def test_more_ties_than_candidates_rank_by_order() -> None:
    term_NE = torch.ones(20_000, 2)
    order_N = np.arange(20_000)[::-1].copy()
    _, places = best_rows(torch.ones(2, 2), term_NE, 3, order_N)
    assert places.tolist() == [[19_999, 19_998, 19_997]] * 2


def test_no_queries_more_than_there_are_and_none_wanted() -> None:
    term_NE = torch.eye(3)
    scores, places = best_rows(torch.empty(0, 3), term_NE, 2, np.arange(3))
    assert scores.shape == places.shape == (0, 2)
    scores, places = best_rows(torch.eye(3)[:1], term_NE, 99, np.arange(3))
    assert places.tolist() == [[0, 1, 2]]
    assert scores.dtype == np.float32
    with pytest.raises(ValueError, match="k: got 0; allowed: at least 1"):
        best_rows(term_NE, term_NE, 0, np.arange(3))
