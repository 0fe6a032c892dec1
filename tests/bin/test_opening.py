"""The flags of searching programs: one glossary or index, the model's own threshold, the language model left out."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from bin.opening import ModelFlags, SearchFlags, open_retriever, threshold_of
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


def test_logs_leave_standard_output_to_what_is_found() -> None:
    code = "from bin.opening import log_to_standard_error, logger; log_to_standard_error(); logger.info('5 terms')"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True
    )
    assert (done.stdout, done.stderr) == ("", "INFO 5 terms\n")
