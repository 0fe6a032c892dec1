"""A clip as a small sound file that any browser plays: MP3 where libsndfile writes it (1.1 and later), else WAV."""

from __future__ import annotations

import io

import numpy as np
import soundfile as sf

from data.audio import SAMPLE_RATE


def encode_preview(pcm_S: np.ndarray) -> tuple[str, bytes]:
    """(media type, file content) of int16 [S] at 16 kHz mono. Lossy: for ears, not for models."""
    has_mp3 = "MP3" in sf.available_formats()
    file = io.BytesIO()
    sf.write(file, pcm_S, SAMPLE_RATE, format="MP3" if has_mp3 else "WAV", subtype=None if has_mp3 else "PCM_16")
    return ("audio/mpeg" if has_mp3 else "audio/wav"), file.getvalue()
