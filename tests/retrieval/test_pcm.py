"""Every form of a clip becomes the same samples, and every wrong one an error that says what is wrong."""

import re
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import torch

from retrieval.pcm import to_int16, to_pcm
from tests.retrieval.small_models import tone


def test_all_forms_of_a_clip_are_the_same_samples(tmp_path: Path) -> None:
    pcm_S = tone(440)
    sf.write(tmp_path / "a.wav", pcm_S, 16_000)
    float_S = pcm_S.astype(np.float32) / 32768
    for form in (pcm_S, torch.from_numpy(pcm_S), float_S, torch.from_numpy(float_S), tmp_path / "a.wav"):
        np.testing.assert_array_equal(to_pcm(form), pcm_S)


def test_another_rate_is_resampled_when_it_is_told(tmp_path: Path) -> None:
    time_S = np.arange(24_000) / 48_000
    wave_S = (0.3 * np.sin(2 * np.pi * 440 * time_S)).astype(np.float32)
    pcm_S = to_pcm(wave_S, sample_rate=48_000)
    assert len(pcm_S) == 8_000
    expected_S = 0.3 * np.sin(2 * np.pi * 440 * np.arange(8_000) / 16_000) * 32768
    assert np.abs(pcm_S[200:-200] - expected_S[200:-200]).max() < 20


@pytest.mark.parametrize(
    ("audio", "message"),
    [
        (np.zeros(0, np.int16), "0 samples at 16 kHz (0.000 s); allowed: 0.01 to 30.0 s"),
        (np.zeros(159, np.int16), "159 samples"),
        (np.zeros(480_001, np.int16), "longer audio goes through a stream"),
        (np.zeros((2, 8000), np.int16), "shape (2, 8000); allowed: one dimension"),
        (np.zeros(8000, np.int32), "int32 samples; allowed: int16, or floats"),
        (np.array([0.0, np.nan, np.inf] * 800), "1600 samples are NaN or infinite"),
        (tone(440).astype(np.float32), "give int16 samples as int16"),
        ("/nowhere/a.wav", "no such file"),
    ],
)
def test_wrong_audio_is_told(audio: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=rf"clip 7: .*{re.escape(message)}"):
        to_pcm(audio, name="clip 7")


@pytest.mark.parametrize("rate", [0, -16_000, 3_999, 1_000_000, 16_000.0, True])
def test_impossible_rates_are_told(rate: int) -> None:
    with pytest.raises(ValueError, match=r"sample_rate: got .*; allowed: 4000 to 384000 Hz"):
        to_pcm(tone(440), rate)


def test_floats_clip_and_round_as_files_do(tmp_path: Path) -> None:
    float_S = np.array([0.0, 0.5, 1.0, 1.2, -1.0, -1.3, 1 / 65536], dtype=np.float32)
    assert to_int16(float_S).tolist() == [0, 16384, 32767, 32767, -32768, -32768, 0]
    assert to_int16(np.zeros(0)).shape == (0,)
