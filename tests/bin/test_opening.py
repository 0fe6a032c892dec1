"""The flags of searching programs: one glossary or index, the model's own threshold, the language model left out."""

import json
import re
import shutil
from pathlib import Path

import pytest

from bin.opening import ModelFlags, SearchFlags, open_retriever, run_program, threshold_of
from retrieval.model_files import CONFIG_FILE
from tests.bin.tones import TERMS


def test_an_index_needs_no_language_model(trained: Path, tones: Path, tmp_path: Path) -> None:
    model = ModelFlags(str(trained.parent), device="cpu")
    whole = open_retriever(model, SearchFlags(glossary=str(tones / "glossary.json")))
    assert whole.terms is not None
    assert [term.key for term in whole.terms.terms[:6]] == list(TERMS)
    whole.terms.save(tmp_path)
    heard = open_retriever(model, SearchFlags(index=str(tmp_path)))
    assert "language_model" not in dict(heard.model.named_children())


def test_the_threshold_is_the_flags_then_the_models(trained: Path, tones: Path, tmp_path: Path) -> None:
    folder = tmp_path / "calibrated"
    shutil.copytree(trained, folder)
    config = json.loads((folder / CONFIG_FILE).read_text())
    (folder / CONFIG_FILE).write_text(json.dumps(config | {"threshold": {"value": 0.4, "k": 10}}))
    glossary = str(tones / "glossary.json")
    for model, flag, expected in ((folder, None, 0.4), (folder, 0.7, 0.7), (trained, None, None)):
        search = SearchFlags(glossary=glossary, threshold=flag)
        assert threshold_of(open_retriever(ModelFlags(str(model), device="cpu"), search), search) == expected


@pytest.mark.parametrize("flags", [{}, {"glossary": "a.json", "index": "b"}])
def test_one_of_glossary_and_index(flags: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=re.escape("allowed: one of the two flags")):
        SearchFlags(**flags)
    with pytest.raises(ValueError, match="k: got 0"):
        SearchFlags(index="b", k=0)


def test_a_users_error_is_one_line_and_others_are_not_hidden(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise ValueError("k: got 0")

    assert run_program("bin/x.py", wrong) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "bin/x.py: error: k: got 0"
    assert run_program("bin/x.py", lambda: None) == 0
    assert run_program("bin/x.py", lambda: 1 / 0 and None) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
