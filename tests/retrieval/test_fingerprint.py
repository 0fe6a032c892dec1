"""The fingerprint tells models apart in every form they have, and a folder may be opened in part."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from model.build import build_model
from model.settings import ModelSettings
from retrieval.model_files import CONFIG_FILE, HEADS_FILE, TOWERS_FILE, open_model, read_config, save_model
from tests.bin.tones import AUDIO, TEXT
from tests.retrieval.small_models import LOG_INV_TEMPERATURE


def test_a_full_model_reads_back_bit_for_bit(model_folder: Path, tmp_path: Path) -> None:
    opened = open_model(model_folder)
    settings = ModelSettings(**opened.config["model"], trainable="full", proj_dim=16)
    save_model(tmp_path, opened.built, settings, LOG_INV_TEMPERATURE, {})
    for name in (TOWERS_FILE, HEADS_FILE):
        assert (tmp_path / name).read_bytes() == (model_folder / name).read_bytes()
    assert opened.temperature == pytest.approx(float((-LOG_INV_TEMPERATURE).exp()))


def test_the_fingerprint_is_of_the_tensors_and_survives_the_audio_only_way(
    model_folder: Path, other_model_folder: Path, adapter_folder: Path
) -> None:
    opened = [open_model(folder) for folder in (model_folder, other_model_folder, adapter_folder)]
    assert len({one.fingerprint for one in opened}) == 3
    assert all(len(one.fingerprint) == 64 for one in opened)
    assert open_model(adapter_folder, audio_only=True).fingerprint == opened[2].fingerprint


@pytest.mark.parametrize("name", ["model_folder", "adapter_folder"])
def test_a_folder_without_a_fingerprint_gets_the_one_it_would_have(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(request.getfixturevalue(name), folder)
    config = read_config(folder)
    expected = config.pop("fingerprint")
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    assert open_model(folder).fingerprint == expected
    with pytest.raises(ValueError, match="no fingerprint; without the text side it cannot be made"):
        open_model(folder, audio_only=True)


def test_one_changed_bit_changes_the_fingerprint(model_folder: Path, tmp_path: Path) -> None:
    opened = open_model(model_folder)
    with torch.no_grad():
        opened.built.model.language_model.norm.weight[3] += 1e-6
    settings = ModelSettings(**opened.config["model"], trainable="full", proj_dim=16)
    save_model(tmp_path, opened.built, settings, LOG_INV_TEMPERATURE, {})
    assert read_config(tmp_path)["fingerprint"] != opened.fingerprint


def test_audio_only_opens_a_folder_without_the_text_towers_files(model_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    shutil.copytree(model_folder, folder)
    (folder / "text_tower.json").unlink()
    assert open_model(folder, audio_only=True).built.sources["tokenizer"] == "absent"
    with pytest.raises(ValueError, match="no file"):
        open_model(folder)


def test_audio_through_the_language_model_cannot_be_opened_audio_only(tmp_path: Path) -> None:
    (tmp_path / "audio.json").write_text(json.dumps(AUDIO))
    (tmp_path / "text.json").write_text(json.dumps(TEXT))
    settings = ModelSettings(
        audio_model=str(tmp_path / "audio.json"),
        text_model=str(tmp_path / "text.json"),
        trainable="full",
        audio_readout="lm",
    )
    save_model(tmp_path, build_model(settings), settings, LOG_INV_TEMPERATURE, {})
    with pytest.raises(ValueError, match="audio_readout: 'lm' sends audio through the language model"):
        open_model(tmp_path, audio_only=True)


def test_what_does_not_fit_is_told(model_folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is a full model, which needs no base model"):
        open_model(model_folder, model_name="some/base")
    folder = tmp_path / "damaged"
    shutil.copytree(model_folder, folder)
    (folder / TOWERS_FILE).write_bytes((folder / TOWERS_FILE).read_bytes()[:-5])
    with pytest.raises(ValueError, match="damaged"):
        open_model(folder)
    (folder / TOWERS_FILE).unlink()
    with pytest.raises(ValueError, match=r"model\.safetensors: missing"):
        open_model(folder)
