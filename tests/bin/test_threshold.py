"""The threshold becomes part of the model folder, whole or not at all."""

import json
from pathlib import Path

import pytest
import torch

import bin.threshold
from bin.threshold import describe_threshold, read_threshold, store_threshold
from distributed.atomic import MANIFEST, damage, load_single_file, save_single_file, seal_folder
from retrieval.calibration import OperatingPoint, Target
from retrieval.model_files import CONFIG_FILE, FORMAT, single_file_tensors

POINT = OperatingPoint(0.625, 10, 40, 0.9, 0.5, None, 1.5)
THRESHOLD = describe_threshold(POINT, Target("precision", 0.9), 96, 111, "dev.json")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A model folder as a run leaves it: sealed, with a one-file copy beside it."""
    path = tmp_path / "model_best"
    path.mkdir()
    (path / CONFIG_FILE).write_text(json.dumps({"format": FORMAT, "proj_dim": 16, "info": {"step": 3}}))
    import safetensors.torch

    (path / "heads.safetensors").write_bytes(safetensors.torch.save({"w": torch.arange(4.0)}))
    (path / "adapter_v4").mkdir()
    (path / "adapter_v4" / "adapter_config.json").write_text("{}")
    seal_folder(path, step=3)
    save_single_file(tmp_path / "model_best.pt", *single_file_tensors(path))
    return path


def test_it_is_stored_read_back_and_replaced(folder: Path) -> None:
    assert read_threshold(folder) is None
    store_threshold(folder, THRESHOLD)
    assert read_threshold(folder) == THRESHOLD
    store_threshold(folder, THRESHOLD | {"value": 0.5})
    assert read_threshold(folder) == THRESHOLD | {"value": 0.5}
    assert damage(folder) is None
    assert json.loads((folder / MANIFEST).read_text())["step"] == 3
    config = json.loads((folder / CONFIG_FILE).read_text())
    assert (config["proj_dim"], config["info"]) == (16, {"step": 3})
    assert (folder / "adapter_v4" / "adapter_config.json").read_text() == "{}"
    tensors, settings = load_single_file(folder.with_name("model_best.pt"))
    assert settings[CONFIG_FILE]["threshold"]["value"] == 0.5
    assert torch.equal(tensors["heads.safetensors/w"], torch.arange(4.0))
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model_best", "model_best.pt"]


def test_a_folder_without_a_manifest_gets_it_too(folder: Path) -> None:
    (folder / MANIFEST).unlink()
    folder.with_name("model_best.pt").unlink()
    store_threshold(folder, THRESHOLD)
    assert read_threshold(folder) == THRESHOLD
    assert not (folder / MANIFEST).exists()


def test_a_failure_leaves_the_folder_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("distributed.atomic.replace_folder", fail)
    with pytest.raises(OSError, match="disk full"):
        bin.threshold.store_threshold(folder, THRESHOLD)
    assert read_threshold(folder) is None
    assert damage(folder) is None
    assert sorted(p.name for p in folder.parent.iterdir()) == ["model_best", "model_best.pt"]


@pytest.mark.parametrize("wrong", [0.5, {"value": "high", "k": 10}, {"value": 0.5}, {"value": 0.5, "k": True}])
def test_a_threshold_that_is_none_is_refused(folder: Path, wrong: object) -> None:
    (folder / CONFIG_FILE).write_text(json.dumps({"format": FORMAT, "threshold": wrong}))
    with pytest.raises(ValueError, match="has no value and k"):
        read_threshold(folder)


def test_a_folder_without_a_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no retriever_config.json; give a folder such as"):
        store_threshold(tmp_path, THRESHOLD)
