"""Fixtures of the programs' tests; see tones.py."""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.bin.tones import TERMS, write_architectures, write_samples
from tests.retrieval.small_models import write_full_model


@pytest.fixture(autouse=True)
def wandb_ended() -> Iterator[None]:
    """Its process, where the package is installed, lives as long as ours, and would be counted as a later test's."""
    yield
    teardown = getattr(sys.modules.get("wandb"), "teardown", None)
    if teardown is not None:
        teardown()


@pytest.fixture(scope="session")
def tones(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """train.json (24 clips), test.json (10), glossary.json, audio.json and text.json (architectures)."""
    folder = tmp_path_factory.mktemp("tones")
    write_samples(folder, "train", 24, seed=1)
    write_samples(folder, "test", 10, seed=2)
    (folder / "glossary.json").write_text(json.dumps([*TERMS, "parking lot", "hash key"]))
    write_architectures(folder)
    return folder


@pytest.fixture(scope="session")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model folder of a run, with random weights."""
    return write_full_model(tmp_path_factory.mktemp("runs") / "run", seed=1)


@pytest.fixture(scope="session")
def other_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_full_model(tmp_path_factory.mktemp("runs") / "other", seed=2)


@pytest.fixture
def flags(tones: Path, tmp_path: Path) -> Callable[..., list[str]]:
    """Flags of a short run on the tones; further ones are appended, and win."""

    def build(*more: str) -> list[str]:
        return [
            *("--train_samples_path", str(tones / "train.json"), "--test_samples_path", str(tones / "test.json")),
            *("--glossary_path", str(tones / "glossary.json"), "--check_cache_path", str(tmp_path / "checks.jsonl")),
            *("--audio_model", str(tones / "audio.json"), "--text_model", str(tones / "text.json")),
            *("--trainable", "full", "--proj_dim", "16", "--batch_size", "8", "--lr", "3e-3", "--epochs", "2"),
            *("--runs_dir", str(tmp_path / "runs"), "--run_name", "run", "--device", "cpu", "--no-tensorboard"),
            *("--log_every", "1", "--show_examples", "2", "--num_workers", "1", "--tower_dropout", "0.1"),
            *more,
        ]

    return build
