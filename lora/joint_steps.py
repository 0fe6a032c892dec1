"""The thin work around the joint projection's two wide products, in plain torch: any device, any dtype, and the
reference for lora/kernels.py, which does the same in fewer passes and launches.

Shapes: P rows, I in_features, O out_features of all projections, R ranks of all adapters and padding, E = I + R.
"""

import importlib.util
import logging
from functools import lru_cache

import torch
from torch import Tensor

from lora.mask import keep_mask, keep_scale

logger = logging.getLogger(__name__)

Spans = tuple[tuple[int, int, int], ...]
"""Of each projection: its first output row, the row after its last, the first column of its adapter (-1: none)."""


@lru_cache(maxsize=32)
def uses_kernels(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether the Triton form runs for tensors on `device`; why not is logged once."""
    reason = None
    if device.type != "cuda":
        reason = "no CUDA device"
    elif dtype not in (torch.bfloat16, torch.float16):
        reason = "needs bf16 or fp16"
    elif importlib.util.find_spec("triton") is None:
        reason = "triton is not installed"
    elif torch.cuda.get_device_capability(device) < (8, 0):
        reason = "needs an Ampere GPU or later"
    if reason is not None:
        logger.info("joint LoRA projections on %s, %s: torch (%s)", device, dtype, reason)
    return reason is None


def pack(
    adapters: list[tuple[Tensor, Tensor]], into: list[tuple[Tensor, Tensor]], scaling: float, kernels: bool
) -> None:
    """Casts each adapter's masters A [r, I] and B [O', r] into its places, B times `scaling`."""
    if kernels:
        from lora import kernels as fused

        r, num_in = adapters[0][0].shape
        return fused.pack(adapters, into, r, num_in, scaling)
    for (lora_A, lora_B), (to_A, to_B) in zip(adapters, into, strict=True):
        to_A.copy_(lora_A)
        to_B.copy_(lora_B * scaling)
    return None


def extend(x_PI: Tensor, down_RI: Tensor, seed_1: Tensor, dropout: float, kernels: bool) -> tuple[Tensor, Tensor]:
    """(x_PE, low_PR): x with its low-rank part drop(x) down^T behind it, and that part alone."""
    if kernels:
        from lora import kernels as fused

        return fused.extend(x_PI, down_RI, seed_1, dropout)
    low_PR = _dropped(x_PI, seed_1, dropout) @ down_RI.T
    return torch.cat([x_PI, low_PR], dim=1), low_PR


def finish(
    grad_PE: Tensor,
    grad_PO: Tensor,
    x_PI: Tensor,
    low_PR: Tensor,
    down_RI: Tensor,
    seed_1: Tensor,
    dropout: float,
    spans: Spans,
    r: int,
    scaling: float,
    needs: tuple[bool, bool, bool],
    kernels: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of x [P, I], of all A [R, I] and of all B [O, r], the latter two fp32 (fp64 for fp64).

    grad_PE: grad_PO times the joint weight, the gradients of x and of the low-rank part side by side; [P, R], the
    latter alone, where x needs none. needs: which of the three to compute; the others are None.
    """
    needs_x, needs_A, needs_B = needs
    if kernels:
        from lora import kernels as fused

        grad_x_PI = down_SRI = None
        if needs_x or needs_A:
            grad_x_PI, down_SRI = fused.finish(grad_PE, x_PI, down_RI, seed_1, dropout, needs_x, needs_A)
        up_SOr = fused.grad_up(grad_PO, low_PR, spans, r) if needs_B else None
        if down_SRI is None and up_SOr is None:
            return grad_x_PI, None, None
        return grad_x_PI, *fused.add_parts(down_SRI, up_SOr, scaling)
    wide = torch.promote_types(grad_PE.dtype, torch.float32)
    grad_low_PR = grad_PE[:, -down_RI.shape[0] :]
    grad_x_PI = grad_A_RI = grad_B_Or = None
    if needs_x:
        grad_x_PI = grad_PE[:, : x_PI.shape[1]] + _dropped(grad_low_PR @ down_RI, seed_1, dropout)
    if needs_A:
        grad_A_RI = (grad_low_PR.T @ _dropped(x_PI, seed_1, dropout)).to(wide)
    if needs_B:
        grad_B_Or = torch.zeros(grad_PO.shape[1], r, dtype=wide, device=grad_PO.device)
        for first, end, column in spans:
            if column >= 0:
                grad_B_Or[first:end] = (grad_PO[:, first:end].T @ low_PR[:, column : column + r]) * scaling
    return grad_x_PI, grad_A_RI, grad_B_Or


def _dropped(x_PI: Tensor, seed_1: Tensor, dropout: float) -> Tensor:
    if not dropout:
        return x_PI
    return x_PI * keep_mask(seed_1, x_PI.shape[0], x_PI.shape[1], dropout) * keep_scale(dropout)
