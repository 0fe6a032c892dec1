"""Small models in folders, as training leaves them: a full one, and adapters over a base checkpoint in two shards."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from lora.inject import inject_lora, lora_parameters
from lora.settings import LoraSettings
from model.build import build_model
from model.settings import ModelSettings
from retrieval.model_files import save_model
from retrieval.retriever import Retriever
from tests.bin.tones import AUDIO, TEXT
from tests.model.byte_bpe import write_tokenizer
from tests.retrieval.small_models import LOG_INV_TEMPERATURE, write_full_model


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_model(tmp_path_factory.mktemp("run") / "full", seed=1)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_model(tmp_path_factory.mktemp("run") / "other", seed=2)


@pytest.fixture(scope="session")
def base_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen2-Audio checkpoint whose two towers lie in two shards."""
    folder = tmp_path_factory.mktemp("base")
    audio, text = {**AUDIO, "model_type": "qwen2_audio_encoder"}, {**TEXT, "vocab_size": 260}
    (folder / "audio.json").write_text(json.dumps(audio))
    (folder / "text.json").write_text(json.dumps(text))
    settings = ModelSettings(
        audio_model=str(folder / "audio.json"), text_model=str(folder / "text.json"), trainable="full", proj_dim=16
    )
    torch.manual_seed(3)
    state = build_model(settings).model.state_dict()
    listed = {}
    for part in ("audio_tower", "language_model"):
        tensors = {f"model.{name}": value for name, value in state.items() if name.startswith(part)}
        save_file(tensors, folder / f"{part}.safetensors")
        listed |= dict.fromkeys(tensors, f"{part}.safetensors")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    config = {"model_type": "qwen2_audio", "audio_config": audio, "text_config": text}
    (folder / "config.json").write_text(json.dumps(config))
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def adapter_folder(base_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapter")
    settings = ModelSettings(model_name=str(base_folder), proj_dim=16)
    torch.manual_seed(4)
    built = build_model(settings)
    inject_lora(built.model, LoraSettings(lora_r=4))
    with torch.no_grad():
        for _, parameter in lora_parameters(built.model):
            parameter.normal_(0, 0.2)
    save_model(folder, built, settings, LOG_INV_TEMPERATURE, {"step": 1})
    return folder


@pytest.fixture(scope="session")
def retriever(model_folder: Path) -> Retriever:
    """Without an index: tests make their own."""
    return Retriever.load(model_folder)
