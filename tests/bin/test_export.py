"""The program: every form with its card and manifest, all or nothing, one line for a user's error."""

import shutil
from pathlib import Path

import pytest

import bin.export
from distributed.atomic import damage
from retrieval.model_files import open_model
from tests.retrieval.conftest import write_full_model


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_model(tmp_path_factory.mktemp("run") / "run", seed=1)


@pytest.mark.parametrize("form", ["merged", "audio"])
def test_a_form_is_whole_and_opens(form: str, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "deep" / form
    assert bin.export.main([str(model.parent), "--to", form, "--output", str(output)]) == 0
    assert damage(output) is None
    assert "# Audio-to-term retriever" in (output / "README.md").read_text()
    opened = open_model(output, audio_only=form == "audio")
    assert opened.fingerprint == open_model(model).fingerprint


def test_errors_are_one_line_and_leave_nothing(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(model, broken)
    (broken / "model.safetensors").write_bytes(b"nothing")
    taken = tmp_path / "taken"
    taken.mkdir()
    cases = {
        "hence no adapter": [str(model), "--to", "peft", "--output", str(tmp_path / "a")],
        "exists already": [str(model), "--to", "merged", "--output", str(taken)],
        "max_shard_gb": [str(model), "--to", "merged", "--output", str(tmp_path / "b"), "--max_shard_gb", "0"],
        "keys: got 'v4'": [str(model), "--to", "merged", "--output", str(tmp_path / "c"), "--keys", "v4"],
        "holds no model": [str(tmp_path), "--to", "merged", "--output", str(tmp_path / "d")],
        "holds no complete model": [str(broken), "--to", "merged", "--output", str(tmp_path / "e")],
    }
    for told, argv in cases.items():
        assert bin.export.main(argv) == 2
        error = capsys.readouterr().err
        assert error.startswith("bin/export.py: error: ")
        assert told in error
        assert error.count("\n") == 1
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "taken"]
