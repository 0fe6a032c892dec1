"""Layer norms whose result stays in the compute dtype, each with the residual sum before it.

torch.autocast turns F.layer_norm into fp32 in and fp32 out, which would widen the residual stream. The kernels already
take their statistics in fp32 for bf16 input, so autocast is switched off around them.

With frozen weights and Triton (`kernels`, see model/kernels.py) sum and norm are one kernel each way; else plain torch.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import uses_triton


def stream_dtype(weight: Tensor) -> torch.dtype:
    """Dtype of the residual stream: autocast's where it is on and the weights are fp32, else the weights' own."""
    device = weight.device.type
    if weight.dtype == torch.float32 and torch.is_autocast_enabled(device):
        return torch.get_autocast_dtype(device)
    return weight.dtype


def _is_fused(kernels: str, x: Tensor, weight: Tensor) -> bool:
    return not (weight.requires_grad and torch.is_grad_enabled()) and uses_triton(kernels, x)


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm in the dtype of its input, statistics in fp32 (fp64 for fp64). Ba et al. 2016."""

    def __init__(self, width: int, kernels: str = "auto") -> None:
        super().__init__(width)
        self.kernels = kernels

    def add(self, x_PD: Tensor, delta_PD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, norm of that); delta None is zero: what a residual branch gave meets the next one's input."""
        if _is_fused(self.kernels, x_PD, self.weight):
            from model.norm_kernels import add_norm

            return add_norm(x_PD, delta_PD, self.weight, self.bias, self.eps)
        x_PD = x_PD if delta_PD is None else x_PD + delta_PD
        return x_PD, self._plain(x_PD)

    def add_pairs(self, x_PD: Tensor, delta_PD: Tensor, first_Q: Tensor, second_Q: Tensor) -> Tensor:
        """Norm of the mean of rows first and second of x + delta, [Q, D]. The pairs follow one another from row 0:
        second is first + 1, or first for a row alone; a row between two pairs is left out."""
        if _is_fused(self.kernels, x_PD, self.weight):
            from model.norm_kernels import pool_norm

            return pool_norm(x_PD, delta_PD, first_Q, second_Q, self.weight, self.bias, self.eps)
        x_PD = x_PD + delta_PD
        return self._plain((x_PD[first_Q] + x_PD[second_Q]) / 2)

    def remaking(self, x_PD: Tensor) -> Callable[[], Tensor]:
        """What gives the norm of these rows again, holding no more than they do."""
        x_PD = x_PD.detach()
        return lambda: self(x_PD)

    def forward(self, input: Tensor) -> Tensor:
        return self.add(input, None)[1]

    def _plain(self, x_PD: Tensor) -> Tensor:
        weight, bias = self.weight.to(x_PD.dtype), self.bias.to(x_PD.dtype)
        with torch.autocast(x_PD.device.type, enabled=False):
            return F.layer_norm(x_PD, self.normalized_shape, weight, bias, self.eps)


class RMSNorm(nn.Module):
    """Root-mean-square norm in the dtype of its input, statistics in fp32 (fp64 for fp64). Zhang and Sennrich 2019."""

    def __init__(self, hidden_size: int, eps: float, kernels: str = "auto") -> None:
        super().__init__()
        self.eps = eps
        self.kernels = kernels
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def add(self, x_PD: Tensor, delta_PD: Tensor | None) -> tuple[Tensor, Tensor]:
        """(x + delta, norm of that); delta None is zero."""
        if _is_fused(self.kernels, x_PD, self.weight):
            from model.norm_kernels import add_norm

            return add_norm(x_PD, delta_PD, self.weight, None, self.eps)
        x_PD = x_PD if delta_PD is None else x_PD + delta_PD
        return x_PD, self._plain(x_PD)

    def remaking(self, x_PD: Tensor) -> Callable[[], Tensor]:
        """What gives the norm of these rows again, holding no more than they do."""
        x_PD = x_PD.detach()
        return lambda: self(x_PD)

    def forward(self, x_PD: Tensor) -> Tensor:
        return self.add(x_PD, None)[1]

    def _plain(self, x_PD: Tensor) -> Tensor:
        with torch.autocast(x_PD.device.type, enabled=False):
            return F.rms_norm(x_PD, x_PD.shape[-1:], self.weight.to(x_PD.dtype), self.eps)
