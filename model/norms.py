"""Layer norms whose result stays in the compute dtype.

torch.autocast turns F.layer_norm into fp32 in and fp32 out, which would widen the residual stream. The kernels already
take their statistics in fp32 for bf16 input, so autocast is switched off around them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def stream_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the residual stream: autocast's where it is on and the weights are fp32, else the weights' own."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of its input, statistics in fp32 (fp64 for fp64). Ba et al. 2016."""

    def add(self, x_PD: Tensor, delta_PD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, norm of that); delta None is zero: what a residual branch gave meets the next one's input."""
        x_PD = x_PD if delta_PD is None else x_PD + delta_PD
        return x_PD, self(x_PD)

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = self.weight.to(input.dtype), self.bias.to(input.dtype)
        with torch.autocast(input.device.type, enabled=False):
            return F.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm in the dtype of its input, statistics in fp32 (fp64 for fp64). Zhang and Sennrich 2019."""

    def __init__(self, hidden_size: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def add(self, x_PD: Tensor, delta_PD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, norm of that); delta None is zero."""
        x_PD = x_PD if delta_PD is None else x_PD + delta_PD
        return x_PD, self(x_PD)

    def forward(self, x_PD: Tensor) -> Tensor:
        with torch.autocast(x_PD.device.type, enabled=False):
            return F.rms_norm(x_PD, x_PD.shape[-1:], self.weight.to(x_PD.dtype), self.eps)
