"""Small changes to a training clip's sound, drawn from a generator that depends on (seed, epoch, clip) alone."""

from __future__ import annotations

import numpy as np
import soxr

from data.audio import MAX_CLIP_S, SAMPLE_RATE
from data.settings import DataSettings

# A band's edges are drawn between these, evenly in octaves: from a telephone's to a good microphone's.
BAND_LOW_HZ, BAND_HIGH_HZ = (50.0, 400.0), (3_000.0, 7_500.0)
BAND_EDGE_OCTAVES = 1.0 / 3.0


def generator(seed: int, epoch: int, index: int) -> np.random.Generator:
    """The random numbers of one clip in one epoch: the same on whatever rank and thread it is read."""
    return np.random.default_rng((seed, epoch, index))


def is_on(settings: DataSettings) -> bool:
    return (
        settings.augment_speed > 0
        or settings.augment_noise > 0
        or settings.augment_gain_db > 0
        or settings.augment_band > 0
    )


def augment(pcm_S: np.ndarray, settings: DataSettings, rng: np.random.Generator) -> np.ndarray:
    """int16 [S] -> int16 [S'] at 16 kHz: speed (pitch moves along, as in Ko et al. 2015), noise, band limit, gain."""
    # All are drawn whether used or not, so that one setting does not shift the draws of another.
    speed = 1.0 + settings.augment_speed * rng.uniform(-1.0, 1.0)
    has_noise = rng.random() < settings.augment_noise
    snr_db = rng.uniform(*settings.augment_snr_db)
    gain_db = settings.augment_gain_db * rng.uniform(-1.0, 1.0)
    has_band, low_share, high_share = rng.random() < settings.augment_band, rng.random(), rng.random()

    wave_S = pcm_S.astype(np.float32) / 32768.0
    if settings.augment_speed > 0 and len(wave_S) / speed <= MAX_CLIP_S * SAMPLE_RATE:
        wave_S = soxr.resample(wave_S, SAMPLE_RATE * speed, SAMPLE_RATE)
    if has_noise:
        wave_S = wave_S + noise_at(wave_S, snr_db, rng)
    if has_band:
        low_hz = BAND_LOW_HZ[0] * (BAND_LOW_HZ[1] / BAND_LOW_HZ[0]) ** low_share
        high_hz = BAND_HIGH_HZ[0] * (BAND_HIGH_HZ[1] / BAND_HIGH_HZ[0]) ** high_share
        wave_S = band_limited(wave_S, low_hz, high_hz)
    if settings.augment_gain_db > 0:
        wave_S = wave_S * np.float32(10.0 ** (gain_db / 20.0))
    return np.clip(np.rint(wave_S * 32768.0), -32768, 32767).astype(np.int16)


def band_limited(wave_S: np.ndarray, low_hz: float, high_hz: float) -> np.ndarray:
    """The wave [S] without what lies beyond the band, as over a telephone; edges fall off over a third of an octave."""
    spectrum = np.fft.rfft(wave_S)
    octave = np.log2(np.maximum(np.fft.rfftfreq(len(wave_S), 1.0 / SAMPLE_RATE), 1.0))
    inside = np.minimum(octave - np.log2(low_hz), np.log2(high_hz) - octave)
    spectrum *= np.clip(0.5 + inside / BAND_EDGE_OCTAVES, 0.0, 1.0)
    return np.fft.irfft(spectrum, n=len(wave_S)).astype(np.float32)


def noise_at(wave_S: np.ndarray, snr_db: float, rng: np.random.Generator) -> np.ndarray:
    """Noise [S] whose power is `snr_db` below the wave's, its spectrum falling by 0 to 6 dB an octave."""
    spectrum = np.fft.rfft(rng.standard_normal(len(wave_S)))
    slope = rng.uniform(0.0, 1.0)
    spectrum *= np.maximum(np.arange(len(spectrum)), 1.0) ** -slope
    noise_S = np.fft.irfft(spectrum, n=len(wave_S))
    power = float(np.mean(wave_S.astype(np.float64) ** 2))
    noise_power = float(np.mean(noise_S**2))
    scale = np.sqrt(power / max(noise_power, 1e-20) / 10.0 ** (snr_db / 10.0))
    return (noise_S * scale).astype(np.float32)
