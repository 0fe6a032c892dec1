"""All random initialisation, in one place.

| parameter                                         | value                                                         |
|---------------------------------------------------|---------------------------------------------------------------|
| matrix, convolution                               | normal, std 1 / sqrt(fan in)                                  |
| matrix that ends a residual branch (out_proj,     | normal, std 1 / sqrt(fan in * 2 * layers): the stream keeps   |
|   fc2, o_proj, down_proj)                         | its scale at any depth (Radford et al. 2019)                  |
| embed_tokens                                      | normal, std 1: level with the branches that add to it         |
| embed_positions                                   | Whisper's sinusoids, which stay fixed                         |
| norm weight / any bias                            | 1 / 0                                                         |

Nothing starts at zero that would leave another parameter without a first gradient. Numbers come from torch's RNG of the
target device, in the order of the parameters: ranks that seed it alike build the same model.
"""

import math

import torch
from torch import Tensor, nn

from model.weights import place_parameter

_RESIDUAL_ENDS = ("out_proj", "fc2", "o_proj", "down_proj")


@torch.no_grad()
def init_parameters(module: nn.Module, num_layers: int, device: torch.device | str, dtype: torch.dtype) -> None:
    """Give every parameter of `module` (typically on the meta device) its first value on `device`, in `dtype`."""
    for path, parameter in list(module.named_parameters()):
        owner_path, _, leaf = path.rpartition(".")
        owner_name = owner_path.rpartition(".")[2]
        wide = torch.promote_types(dtype, torch.float32)
        value = torch.empty(parameter.shape, device=device, dtype=wide)
        if leaf == "bias":
            value.zero_()
        elif "norm" in owner_name:
            value.fill_(1.0)
        elif owner_name == "embed_positions":
            value.copy_(sinusoids(*parameter.shape))
        elif owner_name == "embed_tokens":
            value.normal_(0.0, 1.0)
        else:
            fan_in = math.prod(parameter.shape[1:])
            branches = 2 * num_layers if owner_name in _RESIDUAL_ENDS else 1
            value.normal_(0.0, (fan_in * branches) ** -0.5)
        place_parameter(module, path, value.to(dtype))


def sinusoids(num_positions: int, width: int, longest_period: float = 10_000.0) -> Tensor:
    """Whisper's positions, fp64 [num_positions, width]: sines in the first half, cosines in the second."""
    if width % 2:
        raise ValueError(f"d_model: got {width}, must be even")
    steps = torch.arange(width // 2, dtype=torch.float64)
    rates = torch.exp(-math.log(longest_period) / max(1, width // 2 - 1) * steps)
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float64), rates)
    return torch.cat((angles.sin(), angles.cos()), dim=1)
