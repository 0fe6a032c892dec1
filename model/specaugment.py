"""SpecAugment (Park et al. 2019, https://arxiv.org/abs/1904.08779) on packed mel: time and frequency masks, no warping.

Shapes: T mel frame slots, B clips, M mels, K masks.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.packing import AudioLayout

# A clip of a second must not vanish under masks that are meant for utterances (the paper's bound p).
_MAX_MASKED_FRACTION = 0.25


@dataclass(frozen=True)
class SpecAugment:
    """Zeroes random bands of each clip. Draws from torch's RNG of the mel's device: restore it and the masks return."""

    time_masks: int = 0
    time_width_frames: int = 0
    freq_masks: int = 0
    freq_width_bins: int = 0

    def __call__(self, mel_TM: Tensor, layout: AudioLayout) -> Tensor:
        """Return mel_TM with masked places at 0, near the middle of Whisper's scale."""
        if self.time_masks and self.time_width_frames:
            limit_B = (layout.num_frames_B * _MAX_MASKED_FRACTION).long().clamp(max=self.time_width_frames)
            start_BK, end_BK = self._draw(self.time_masks, limit_B, layout.num_frames_B)
            place_T1 = layout.place_T[:, None]
            hit_TK = (place_T1 >= start_BK[layout.owner_T]) & (place_T1 < end_BK[layout.owner_T])
            mel_TM = mel_TM.masked_fill(hit_TK.any(1, keepdim=True), 0.0)
        if self.freq_masks and self.freq_width_bins:
            num_mels = mel_TM.shape[1]
            span_B = torch.full_like(layout.num_frames_B, num_mels)
            start_BK, end_BK = self._draw(self.freq_masks, span_B.clamp(max=self.freq_width_bins), span_B)
            bins_M = torch.arange(num_mels, device=mel_TM.device)
            hit_BM = ((bins_M >= start_BK[..., None]) & (bins_M < end_BK[..., None])).any(1)
            mel_TM = mel_TM.masked_fill(hit_BM[layout.owner_T], 0.0)
        return mel_TM

    def _draw(self, masks: int, limit_B: Tensor, span_B: Tensor) -> tuple[Tensor, Tensor]:
        """Widths uniform in [0, limit], starts uniform where the mask still fits: int64 start and end [B, K]."""
        width_BK, place_BK = torch.rand(2, len(span_B), masks, device=span_B.device)
        width_BK = (width_BK * (limit_B[:, None] + 1)).long()
        start_BK = (place_BK * (span_B[:, None] - width_BK + 1)).long()
        return start_BK, start_BK + width_BK
