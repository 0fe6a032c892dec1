"""Small audio and sample files, made on the spot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data.clips import Clip, load_clips
from data.drops import DropLog
from data.settings import DataSettings
from tests.data.tokens import ByteCodes

RATE = 16_000


def tone(seconds: float = 0.5, rate: int = RATE, hertz: float = 440.0) -> np.ndarray:
    return (0.3 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(np.float32)


@pytest.fixture
def wav(tmp_path):
    """wav("a.wav", seconds=0.5, hertz=440) writes a tone and gives its path."""

    def write(name: str, seconds: float = 0.5, hertz: float = 440.0) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        sf.write(path, tone(seconds, hertz=hertz), RATE)
        return path

    return write


@pytest.fixture
def samples(tmp_path):
    """samples([record, ...]) writes a samples file and gives its path."""

    def write(records: list, name: str = "samples.json") -> Path:
        path = tmp_path / name
        path.write_text(json.dumps(records), encoding="utf-8")
        return path

    return write


@pytest.fixture
def settings(tmp_path) -> DataSettings:
    return DataSettings(data_root=str(tmp_path), check_cache_path=str(tmp_path / "checks.jsonl"), num_workers=0)


@pytest.fixture
def record():
    """record(terms=["Artesia"], ...) gives a valid record of a.wav; None as a value leaves the field out."""

    def make(**changes) -> dict:
        row = {
            "segment_id": "s1",
            "term_chunk_audio": "a.wav",
            "term_chunk_text": "the city of artesia in",
            "term_chunk_audio_ground_truth_terms": ["Artesia"],
            "term_start_time": 9.12,
        } | changes
        return {name: value for name, value in row.items() if value is not None}

    return make


@pytest.fixture
def clip():
    """clip("c1", path, terms=("pound key",)) gives a Clip."""

    def make(clip_id: str, audio_path="a.wav", text="press the pound key", terms=(), ignored=(), **changes) -> Clip:
        fields = {
            "clip_id": clip_id,
            "audio_path": str(audio_path),
            "start_s": None,
            "end_s": None,
            "text": text,
            "terms": tuple(terms),
            "ignored": tuple(ignored),
            "surfaces": tuple(terms),
            "is_no_term": not terms,
            "source": f"test:{clip_id}",
            "segment_id": clip_id,
            "duration_s": None,
        } | changes
        return Clip(**fields)

    return make


@pytest.fixture
def tokenize():
    return ByteCodes()


@pytest.fixture
def glossary(tmp_path, settings):
    """glossary("pound key", ...) writes a glossary of these terms and sets it."""

    def write(*terms: str) -> Path:
        path = tmp_path / "glossary.txt"
        path.write_text("\n".join(terms), encoding="utf-8")
        settings.glossary_path = str(path)
        return path

    return write


@pytest.fixture
def load(settings):
    """load(path, **settings) -> (clips, drops) of a samples file; no clip at all is an empty list."""

    def run(path, **changes):
        for name, value in changes.items():
            setattr(settings, name, value)
        drops = DropLog(1.0)
        try:
            return load_clips(path, settings, drops), drops
        except ValueError as error:
            if "no usable clip" not in str(error):
                raise
            return [], drops

    return run
