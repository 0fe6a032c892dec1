"""Whisper's log-mel spectrogram, of a whole pack of clips at once, on whatever device holds the samples.

Reference: Radford et al. 2022 (https://arxiv.org/abs/2212.04356) as published in openai/whisper `audio.py`; mel scale
and filter normalisation are Slaney's (Auditory Toolbox, 1998). The published code pads each clip to 30 s; here only the
frames that the clip can reach are computed, and they are the same numbers.

Shapes: S samples, T mel frame slots, B clips, M mels, F frequency bins.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from model.packing import AudioLayout

SAMPLE_RATE = 16_000
N_FFT = 400
"""Samples in a window: 25 ms."""
HOP = 160
"""Samples between frames: 10 ms."""
FLOOR_LOG10 = -10.0
"""log10 of the least power."""
DYNAMIC_RANGE_LOG10 = 8.0
"""Powers further than this below the clip's loudest are raised to it."""

# cuFFT plans are made for each number of rows: rounding it up lets batches of changing size share a few.
_CUDA_ROW_QUANTUM = 1024


class LogMel(nn.Module):
    """Packed waveforms to mel slots. Holds no state: the filters follow from `num_mels`."""

    def __init__(self, num_mels: int) -> None:
        super().__init__()
        self.num_mels = num_mels
        self._constants: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def forward(self, pcm_S: Tensor, layout: AudioLayout, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return mel_TM in `dtype` (fp32 or fp64), zero in the gaps; `pcm_S` is int16 or float in [-1, 1]."""
        with torch.autocast(pcm_S.device.type, enabled=False):
            window, mel_filters_FM = self._get_constants(pcm_S.device, dtype)
            rows = self._slot_samples(pcm_S, layout, dtype)
            num_slots = rows.shape[0]
            # Three further rows: the last slots' windows run on by 240 samples.
            extra = 3 + (-(num_slots + 3) % _CUDA_ROW_QUANTUM if rows.is_cuda else 0)
            windows = torch.cat((rows.flatten(), rows.new_zeros(extra * HOP))).unfold(0, N_FFT, HOP)
            spectrum_TF = torch.fft.rfft(windows * window)[:num_slots]
            power_TF = spectrum_TF.real.square() + spectrum_TF.imag.square()
            log_TM = (power_TF @ mel_filters_FM).clamp_min(10.0**FLOOR_LOG10).log10()
            # Gap slots hold straddling windows: they must not count towards the maximum.
            loudest_T = log_TM.amax(1).masked_fill(~layout.is_kept_T, FLOOR_LOG10)
            loudest_B = loudest_T.new_full((len(layout.num_frames),), FLOOR_LOG10)
            loudest_B = loudest_B.scatter_reduce(0, layout.owner_T, loudest_T, "amax")
            floor_T = loudest_B[layout.owner_T] - DYNAMIC_RANGE_LOG10
            mel_TM = (torch.maximum(log_TM, floor_T[:, None]) + 4.0) / 4.0
            return mel_TM.masked_fill(~layout.is_kept_T[:, None], 0.0)

    def _slot_samples(self, pcm_S: Tensor, layout: AudioLayout, dtype: torch.dtype) -> Tensor:
        """The samples behind each slot, [T, HOP]: reflected before the clip and after 30 s, zero after the clip."""
        end = layout.max_frames * HOP
        offset = torch.arange(HOP, device=pcm_S.device) - N_FFT // 2
        place = layout.place_T[:, None] * HOP + offset
        place = place.abs()
        place = torch.where(place >= end, 2 * (end - 1) - place, place)
        inside = place < layout.num_samples_B[layout.owner_T][:, None]
        index = torch.where(inside, place + layout.sample_start_B[layout.owner_T][:, None], 0)
        samples = pcm_S[index].to(dtype)
        if not pcm_S.is_floating_point():
            samples = samples / 32768.0
        return samples * inside

    def _get_constants(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        key = (device, dtype)
        if key not in self._constants:
            window = torch.hann_window(N_FFT, periodic=True, dtype=torch.float64)
            self._constants[key] = (window.to(device, dtype), mel_filter_bank(self.num_mels).to(device, dtype))
        return self._constants[key]


def mel_filter_bank(num_mels: int) -> Tensor:
    """Triangular filters of unit area on Slaney's mel scale from 0 to 8 kHz, fp64 [N_FFT // 2 + 1, num_mels]."""
    edges_hz = _mel_to_hertz(torch.linspace(0.0, _hertz_to_mel(SAMPLE_RATE / 2), num_mels + 2, dtype=torch.float64))
    bins_hz = torch.linspace(0.0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)
    widths = edges_hz.diff()
    slopes = edges_hz[None, :] - bins_hz[:, None]
    rising, falling = -slopes[:, :-2] / widths[:-1], slopes[:, 2:] / widths[1:]
    triangles = torch.minimum(rising, falling).clamp_min(0.0)
    return triangles * (2.0 / (edges_hz[2:] - edges_hz[:-2]))


# Slaney's scale: linear below 1 kHz (15 mels), then 27 mels for each factor of 6.4.
_LINEAR_HZ_PER_MEL, _LOG_START_HZ, _LOG_START_MEL = 200.0 / 3.0, 1000.0, 15.0
_MEL_PER_LOG = 27.0 / math.log(6.4)


def _hertz_to_mel(hertz: float) -> float:
    if hertz < _LOG_START_HZ:
        return hertz / _LINEAR_HZ_PER_MEL
    return _LOG_START_MEL + math.log(hertz / _LOG_START_HZ) * _MEL_PER_LOG


def _mel_to_hertz(mels: Tensor) -> Tensor:
    logarithmic = _LOG_START_HZ * torch.exp((mels - _LOG_START_MEL) / _MEL_PER_LOG)
    return torch.where(mels < _LOG_START_MEL, mels * _LINEAR_HZ_PER_MEL, logarithmic)
