"""Models small enough to be made in a moment, saved as training saves them, and tones for them to hear."""

import json
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from model.build import build_model
from model.settings import ModelSettings
from retrieval.model_files import save_model
from tests.bin.tones import AUDIO, TEXT

LOG_INV_TEMPERATURE = torch.tensor(2.5)


def tone(hertz: float, duration_s: float = 0.5, seed: int = 0) -> NDArray[np.int16]:
    """A tone in a little noise, int16 [S] at 16 kHz."""
    time_S = np.arange(round(duration_s * 16_000)) / 16_000
    noise_S = np.random.default_rng(seed).normal(0, 0.01, len(time_S))
    return ((0.3 * np.sin(2 * np.pi * hertz * time_S) + noise_S) * 32767).astype(np.int16)


def write_full_model(folder: Path, seed: int) -> Path:
    """A random model of the tones' architectures, saved as `trainable=full` saves it."""
    folder.mkdir(parents=True)
    (folder / "audio.json").write_text(json.dumps(AUDIO))
    (folder / "text.json").write_text(json.dumps(TEXT))
    settings = ModelSettings(
        audio_model=str(folder / "audio.json"), text_model=str(folder / "text.json"), trainable="full", proj_dim=16
    )
    torch.manual_seed(seed)
    model = folder / "model_best"
    model.mkdir()
    save_model(model, build_model(settings), settings, LOG_INV_TEMPERATURE, {"step": 1})
    return model
