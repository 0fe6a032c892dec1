"""SwiGLU and the joined product that it takes.

The plain form is the reference of the kernel beside it (model/activation_kernels.py), which keeps the pre-activation
for the backward pass and nothing else. GELU has no kernel here: torch's own is one pass each way already.

Shapes: P packed tokens, D width, F feed-forward width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.kernels import uses_triton


def swiglu(gate_up_P2F: Tensor, kernels: str = "auto") -> Tensor:
    """silu(gate) * up of rows that hold gate, then up. Shazeer 2020."""
    if uses_triton(kernels, gate_up_P2F):
        from model.activation_kernels import swiglu as fused_swiglu

        return fused_swiglu(gate_up_P2F)
    gate_PF, up_PF = gate_up_P2F.chunk(2, dim=-1)
    return F.silu(gate_PF) * up_PF


@torch.no_grad()
def join_weights(first: nn.Linear, second: nn.Linear) -> None:
    """Lay two weights of equal width one after the other in memory, so that one product serves both; they stay two
    parameters of the same names and values, which load and change in place as before."""
    if joined_weight(first, second) is None:
        rows = torch.cat([first.weight, second.weight])
        first.weight.data, second.weight.data = rows.split([len(first.weight), len(second.weight)])


def joined_weight(first: nn.Linear, second: nn.Linear) -> Tensor | None:
    """Both frozen weights as one matrix [F + F', D] without a copy, where they do lie so; else None.

    Asked at each use: whatever replaces or moves a parameter (an adapter, `Module.to`) parts them unnoticed.
    """
    if any(type(part) is not nn.Linear or part.bias is not None for part in (first, second)):
        return None
    a, b = first.weight, second.weight
    if a.requires_grad or b.requires_grad or a.dtype != b.dtype or a.device.type == "meta":
        return None
    is_joined = (
        a.shape[1] == b.shape[1]
        and a.is_contiguous()
        and b.is_contiguous()
        and a.untyped_storage().data_ptr() == b.untyped_storage().data_ptr()
        and a.storage_offset() + a.numel() == b.storage_offset()
    )
    return a.detach().as_strided((len(a) + len(b), a.shape[1]), a.stride()) if is_joined else None
