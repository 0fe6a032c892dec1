"""Approximate indexes find most of what exact search finds, say how much, and stay beside the terms they belong to."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.approximate import Approximate, Kind, noisy_terms
from retrieval.index import APPROXIMATE_FILE, INDEX_FILE, Term, TermIndex


@pytest.fixture(scope="module")
def index() -> TermIndex:
    term_NE = torch.nn.functional.normalize(torch.randn(1500, 16, generator=torch.Generator().manual_seed(0)), dim=-1)
    return TermIndex([Term(f"term {n:04d}", f"Term {n}") for n in range(1500)], term_NE, "f" * 64)


@pytest.mark.parametrize("kind", ["hnsw", "ivf"])
def test_recall_is_what_a_recount_gives(index: TermIndex, kind: Kind, tmp_path: Path) -> None:
    query_BE = torch.nn.functional.normalize(torch.randn(40, 16, generator=torch.Generator().manual_seed(1)), dim=-1)
    approximated = index.approximated(kind, query_BE)
    _, exact = approximated.search(query_BE, 10, exact=True)
    scores, found = approximated.search(query_BE, 10)
    shared = [len(set(a) & set(b)) for a, b in zip(exact.tolist(), found.tolist(), strict=True)]
    assert approximated.approximate is not None
    assert approximated.approximate.facts["recall"]["recall@10"] == pytest.approx(sum(shared) / 400)
    assert sum(shared) / 400 > 0.9
    cosines = (query_BE[:, None] * index.term_NE[torch.from_numpy(found)]).sum(-1)
    np.testing.assert_allclose(scores, cosines, atol=1e-6)
    assert (np.diff(scores, axis=1) <= 0).all()

    approximated.save(tmp_path)
    kept = json.loads((tmp_path / INDEX_FILE).read_text())["approximate"]
    assert (kept["kind"], kept["queries"], kept["num_queries"]) == (kind, "given", 40)
    loaded = TermIndex.load(tmp_path)
    np.testing.assert_array_equal(loaded.search(query_BE, 10)[1], found)
    (tmp_path / APPROXIMATE_FILE).write_bytes((tmp_path / APPROXIMATE_FILE).read_bytes()[:-9])
    with pytest.raises(ValueError, match="damaged"):
        TermIndex.load(tmp_path)


def test_changed_terms_are_searched_exactly_again(index: TermIndex) -> None:
    approximated = index.approximated("ivf")
    assert approximated.approximate is not None
    assert approximated.approximate.facts["queries"] == "terms with noise of length 1"
    assert approximated.remove(["term 0003"]).approximate is None
    assert approximated.append([Term("new", "New")], torch.ones(1, 16)).approximate is None


def test_few_terms_and_wrong_wishes(index: TermIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    few = TermIndex(index.terms[:3], index.term_NE[:3], "f").approximated("ivf")
    assert few.search(index.term_NE[:1], 50)[1].shape[1] <= 3
    assert few.search(torch.empty(0, 16), 5)[1].shape[0] == 0
    with pytest.raises(ValueError, match="k: got 0"):
        few.search(index.term_NE[:1], 0)
    with pytest.raises(ValueError, match="kind: got 'lsh'; allowed: hnsw, ivf"):
        index.approximated("lsh")  # type: ignore[arg-type]
    (tmp_path / "x.faiss").write_bytes(b"no index")
    with pytest.raises(ValueError, match="not a faiss index"):
        Approximate.load(tmp_path / "x.faiss", {}, 3)
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="needs the extra"):
        index.approximated("hnsw")


def test_noisy_terms_are_near_their_terms_and_always_the_same(index: TermIndex) -> None:
    query_BE = noisy_terms(index.term_NE)
    assert torch.equal(query_BE, noisy_terms(index.term_NE))
    nearest = (query_BE @ index.term_NE.T).max(dim=1).values
    assert 0.6 < float(nearest.mean()) < 0.85
