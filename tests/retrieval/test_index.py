"""An index survives its files, changes by terms, and is refused where it does not belong."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from retrieval.index import EMBEDDINGS_FILE, INDEX_FILE, TERMS_FILE, Term, TermIndex


def make(*keys: str, fingerprint: str = "f" * 64) -> TermIndex:
    generator = torch.Generator().manual_seed(len(keys))
    term_NE = torch.nn.functional.normalize(torch.randn(len(keys), 8, generator=generator), dim=-1)
    return TermIndex([Term(key, key.title(), {"de": [f"de {key}"]}) for key in keys], term_NE, fingerprint)


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    index = make("voicemail", "höhe", "pound key")
    index.save(tmp_path, {"glossary": "g.json"})
    loaded = TermIndex.load(tmp_path)
    assert loaded.terms == index.terms
    assert torch.equal(loaded.term_NE, index.term_NE)
    assert loaded.fingerprint == index.fingerprint
    assert json.loads((tmp_path / INDEX_FILE).read_text())["num_terms"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {INDEX_FILE, TERMS_FILE, EMBEDDINGS_FILE}


def test_append_and_remove_keep_the_other_rows() -> None:
    index = make("a term", "b term", "c term")
    row_E = torch.full((1, 8), 8**-0.5)
    more = index.append([Term("d term", "D")], row_E)
    assert [term.key for term in more.terms] == ["a term", "b term", "c term", "d term"]
    fewer = more.remove(["b term", "a term"])
    assert [term.key for term in fewer.terms] == ["c term", "d term"]
    assert torch.equal(fewer.term_NE, torch.cat((index.term_NE[2:], row_E)))
    assert fewer.search(row_E, 1)[1].tolist() == [[1]]
    assert len(index) == 3, "the first index is as it was"


def test_equal_scores_rank_by_key_not_by_place() -> None:
    index = TermIndex([Term("zebra", "Z"), Term("apple", "A"), Term("mango", "M")], torch.ones(3, 4), "f")
    _, places = index.search(torch.ones(1, 4), 2)
    assert [index.terms[n].key for n in places[0]] == ["apple", "mango"]


def test_k_beyond_the_glossary_gives_all_of_it() -> None:
    scores, places = make("only one").search(torch.ones(2, 8), 100)
    assert scores.shape == places.shape == (2, 1)
    with pytest.raises(ValueError, match="k: got 0"):
        make("only one").search(torch.ones(1, 8), 0)
    with pytest.raises(ValueError, match=re.escape("allowed: [B, 8]")):
        make("only one").search(torch.ones(1, 9), 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda: TermIndex([], torch.empty(0, 4), "f"), "no terms"),
        (lambda: make("a term", "a term"), "1 keys occur more than once"),
        (lambda: TermIndex([Term("a", "A")], torch.ones(2, 4), "f"), "(2, 4) for 1 terms"),
        (lambda: make("a term").append([Term("a term", "A")], torch.ones(1, 8)), "'a term'; remove first"),
        (lambda: make("a term").remove(["b term"]), "not in the index, such as 'b term'"),
        (lambda: make("a term").remove(["a term"]), "at least one stays"),
        (lambda: make("a term").check_model("e" * 64, "g.index"), "g.index: it was made with another model"),
    ],
)
def test_what_cannot_be_is_told(change, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        change()


def test_a_damaged_or_foreign_folder_is_told(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"no {INDEX_FILE}; make an index"):
        TermIndex.load(tmp_path)
    make("voicemail", "pound key").save(tmp_path)
    file = tmp_path / EMBEDDINGS_FILE
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))  # a flipped bit would load silently
    with pytest.raises(ValueError, match=r"embeddings\.safetensors: damaged"):
        TermIndex.load(tmp_path)
    file.write_bytes(whole)
    TermIndex.load(tmp_path)
    (tmp_path / TERMS_FILE).unlink()
    with pytest.raises(ValueError, match=r"no terms\.jsonl; the index is incomplete"):
        TermIndex.load(tmp_path)
    (tmp_path / INDEX_FILE).write_text('{"format": "another"}')
    with pytest.raises(ValueError, match="its format is not"):
        TermIndex.load(tmp_path)


def test_search_is_that_of_numpy() -> None:
    index = make(*(f"term {n:03d}" for n in range(200)))
    query_BE = torch.randn(5, 8, generator=torch.Generator().manual_seed(9))
    scores, places = index.search(query_BE, 7)
    expected = query_BE.numpy() @ index.term_NE.numpy().T
    np.testing.assert_array_equal(places, np.argsort(-expected, axis=1)[:, :7])
    np.testing.assert_allclose(scores, -np.sort(-expected, axis=1)[:, :7], rtol=1e-5)
