"""Previews play, last as long as the clip, and are small."""

import io

import numpy as np
import pytest
import soundfile as sf

from data.audio import SAMPLE_RATE
from data.preview import encode_preview


def test_a_preview_is_a_small_sound_file_of_the_clip() -> None:
    time_S = np.arange(2 * SAMPLE_RATE) / SAMPLE_RATE
    pcm_S = np.round(8000 * np.sin(2 * np.pi * 440 * time_S)).astype(np.int16)
    kind, content = encode_preview(pcm_S)
    assert kind == "audio/mpeg"
    assert len(content) < pcm_S.nbytes / 3
    heard_S, rate = sf.read(io.BytesIO(content))
    assert rate == SAMPLE_RATE
    assert len(heard_S) / rate == pytest.approx(2.0, abs=0.2)
    middle = heard_S[SAMPLE_RATE // 2 : SAMPLE_RATE]
    assert np.abs(np.fft.rfft(middle)).argmax() / (len(middle) / rate) == pytest.approx(440, abs=3)


def test_without_mp3_it_is_wav(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("data.preview.sf.available_formats", lambda: {"WAV": "WAV"})
    pcm_S = np.arange(-100, 100, dtype=np.int16)
    kind, content = encode_preview(pcm_S)
    assert kind == "audio/wav"
    np.testing.assert_array_equal(sf.read(io.BytesIO(content), dtype="int16")[0], pcm_S)
