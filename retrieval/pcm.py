"""What callers hand in as audio, made into int16 [S], 16 kHz mono: the only form that is encoded.

int16 is taken as it is; floats are full scale at 1, and rounded as audio files are. Nothing is resampled unless the
caller says that its rate is another than 16 kHz.
"""

from pathlib import Path

import numpy as np
import soxr
import torch
from numpy.typing import NDArray
from torch import Tensor

import data.audio
from data.audio import MAX_CLIP_S, MAX_RATE, MIN_CLIP_S, MIN_RATE, SAMPLE_RATE, AudioError, read_pcm

AudioLike = NDArray[np.int16] | NDArray[np.floating] | Tensor | str | Path
PEAK_LIMIT = 4.0
"""Floats beyond this were not scaled to full scale 1: codecs overshoot, but not by 12 dB."""


def to_pcm(audio: AudioLike, sample_rate: int = SAMPLE_RATE, name: str = "audio") -> NDArray[np.int16]:
    """A clip as int16 [S], 16 kHz mono.

    Args:
        audio: a path (whose own rate counts), int16 [S], or float [S] in [-1, 1].
        sample_rate: of arrays, Hz; another than 16000 is resampled (soxr, high quality).
        name: what errors call it.

    Raises:
        ValueError: an unreadable file, an array of another type or shape, NaN, floats beyond full scale, an impossible
            rate, or a length outside 0.01 to 30 s.
    """
    if isinstance(audio, str | Path):
        try:
            return read_pcm(audio)
        except AudioError as error:
            raise ValueError(f"{name}: {audio}: {error}") from error
    pcm_S = _check_rate_and_convert(audio, sample_rate, name)
    duration_s = len(pcm_S) / SAMPLE_RATE
    if not MIN_CLIP_S <= duration_s <= MAX_CLIP_S:
        raise ValueError(
            f"{name}: {len(pcm_S)} samples at 16 kHz ({duration_s:.3f} s); allowed: {MIN_CLIP_S} to {MAX_CLIP_S} s; "
            "longer audio goes through a stream"
        )
    return pcm_S


def to_int16(audio: NDArray[np.int16] | NDArray[np.floating] | Tensor, name: str = "audio") -> NDArray[np.int16]:
    """int16 [S] of samples in either form, any number of them. Raises ValueError as `to_pcm`."""
    samples_S = audio.detach().cpu().numpy() if isinstance(audio, Tensor) else np.asarray(audio)
    if samples_S.ndim != 1:
        raise ValueError(f"{name}: shape {samples_S.shape}; allowed: one dimension, mono samples")
    if samples_S.dtype == np.int16:
        return samples_S
    if not np.issubdtype(samples_S.dtype, np.floating):
        raise ValueError(f"{name}: {samples_S.dtype} samples; allowed: int16, or floats in [-1, 1]")
    peak = float(np.abs(samples_S).max(initial=0.0))  # NaN if any sample is
    if not np.isfinite(peak):
        raise ValueError(f"{name}: {int((~np.isfinite(samples_S)).sum())} samples are NaN or infinite; allowed: finite")
    if peak > PEAK_LIMIT:
        raise ValueError(f"{name}: floats up to {peak:g}; allowed: [-1, 1]; give int16 samples as int16")
    return data.audio.to_int16(samples_S)


def check_rate(sample_rate: int, name: str = "sample_rate") -> None:
    """Raises ValueError for a rate that no speech has."""
    if isinstance(sample_rate, bool) or not isinstance(sample_rate, int) or not MIN_RATE <= sample_rate <= MAX_RATE:
        raise ValueError(f"{name}: got {sample_rate!r}; allowed: {MIN_RATE} to {MAX_RATE} Hz, an integer")


def pack_waves(waves: list[NDArray[np.int16]]) -> Tensor:
    """One int16 [S] tensor of all clips, one after another."""
    return torch.from_numpy(np.concatenate(waves))


def _check_rate_and_convert(
    audio: NDArray[np.int16] | NDArray[np.floating] | Tensor, sample_rate: int, name: str
) -> NDArray[np.int16]:
    check_rate(sample_rate, f"{name}: sample_rate")
    pcm_S = to_int16(audio, name)
    if sample_rate == SAMPLE_RATE or not len(pcm_S):
        return pcm_S
    resampled_S: NDArray[np.int16] = soxr.resample(pcm_S, sample_rate, SAMPLE_RATE)
    return resampled_S
