"""Rotary positions (Su et al. 2021, https://arxiv.org/abs/2104.09864), in the half-split form of Qwen2.

Shapes: P packed tokens, H heads, D head size, L longest length.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from model.packing import SequenceLayout


@dataclass(frozen=True, eq=False)
class Rotary:
    """Cosines and sines of every position up to L, in the dtype of the residual stream."""

    cos_LD: Tensor
    sin_LD: Tensor

    @classmethod
    def build(
        cls, theta: float, head_dim: int, num_positions: int, dtype: torch.dtype, device: torch.device
    ) -> "Rotary":
        """Angles in fp32 (fp64 for fp64), then rounded to `dtype`."""
        wide = torch.promote_types(dtype, torch.float32)
        half = torch.arange(0, head_dim, 2, device=device).to(wide)
        angles_LD = torch.outer(torch.arange(num_positions, device=device).to(wide), theta ** (-half / head_dim))
        angles_LD = angles_LD.repeat(1, 2)
        return cls(angles_LD.cos().to(dtype), angles_LD.sin().to(dtype))

    def turn(self, x_PHD: Tensor, layout: SequenceLayout) -> Tensor:
        """Each head's vector turned by its token's position."""
        first, second = x_PHD.chunk(2, dim=-1)
        cos_P1D, sin_P1D = self.cos_LD[layout.place_P][:, None], self.sin_LD[layout.place_P][:, None]
        return x_PHD * cos_P1D + torch.cat((-second, first), dim=-1) * sin_P1D
