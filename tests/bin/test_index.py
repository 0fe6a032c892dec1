"""bin/index.py makes, lengthens and shortens an index, and leaves alone what it should not touch."""

import json
from pathlib import Path

import pytest

from bin.index import main
from retrieval.index import TermIndex
from retrieval.retriever import Retriever
from tests.bin.tones import TERMS


@pytest.fixture
def made(trained: Path, tones: Path, tmp_path: Path) -> Path:
    out = tmp_path / "terms.index"
    assert main(["make", "--model", str(trained), "--glossary", str(tones / "glossary.json"), "--out", str(out)]) == 0
    return out


def test_made_lengthened_shortened_it_is_what_was_asked(
    made: Path, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = TermIndex.load(made)
    assert [term.key for term in first.terms] == [*TERMS, "parking lot", "hash key"]
    (tmp_path / "more.txt").write_text("Star Key\nMailbox\n")
    more = ["append", "--index", str(made), "--model", str(trained), "--glossary", str(tmp_path / "more.txt")]
    assert main(more) == 0
    assert [term.surface for term in TermIndex.load(made).terms[8:]] == ["Star Key"]
    assert main(["remove", "--index", str(made), "--terms", "POUND  key", "parking lot"]) == 0
    keys = [term.key for term in TermIndex.load(made).terms]
    assert keys == [key for key in [*TERMS, "hash key", "star key"] if key != "pound key"]
    capsys.readouterr()
    assert main(["show", "--index", str(made)]) == 0
    shown = capsys.readouterr().out
    assert json.loads(shown[: shown.index("first terms")])["num_terms"] == 7
    whole = Retriever.load(trained)
    whole.use(TermIndex.load(made))


def test_made_again_it_replaces_an_index_and_nothing_else(
    made: Path, trained: Path, tones: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["make", "--model", str(trained), "--glossary", str(tones / "glossary.json"), "--out"]
    assert main([*flags, str(made)]) == 0
    precious = tmp_path / "precious"
    precious.mkdir()
    (precious / "thesis.txt").write_text("mine")
    assert main([*flags, str(precious)]) == 2
    assert "no index.json" in capsys.readouterr().err
    assert (precious / "thesis.txt").read_text() == "mine"


def test_another_models_index_cannot_be_lengthened(
    made: Path, other_model_folder: Path, tones: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path.name: path.read_bytes() for path in made.iterdir()}
    wrong = ["append", "--index", str(made), "--model", str(other_model_folder)]
    assert main([*wrong, "--glossary", str(tones / "glossary.json")]) == 2
    assert "made with another model" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in made.iterdir()} == before


def test_what_is_not_there_is_told(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["remove", "--index", str(made), "--terms", "unheard of"]) == 2
    assert "not in the index, such as 'unheard of'" in capsys.readouterr().err
    assert main(["show", "--index", str(tmp_path / "nowhere")]) == 2
    assert "make an index with bin/index.py make" in capsys.readouterr().err
    (tmp_path / "empty.txt").write_text("\n")
    nothing = ["make", "--model", str(tmp_path), "--glossary", "g.txt", "--out", str(tmp_path / "x")]
    assert main(nothing) == 2
    assert "holds no model" in capsys.readouterr().err


def test_approximate_search_tells_its_recall(made: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["approximate", "--index", str(made), "--kind", "ivf"]) == 0
    assert "recall@1 1.000" in capsys.readouterr().out
    assert TermIndex.load(made).approximate is not None
