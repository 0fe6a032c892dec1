"""Whether the towers' memory-bound steps run as Triton kernels or as plain torch: one setting, resolved in one place.

The kernels live in `*_kernels.py`, which import triton and are themselves imported on first use; the plain torch form
beside each call is its reference. Without a GPU they run in Triton's interpreter (TRITON_INTERPRET=1), for tests.
"""

import importlib.util
import logging
import os
from functools import lru_cache

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

NAMES = ("auto", "triton", "torch")
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def uses_triton(name: str, x: Tensor) -> bool:
    """Whether the setting `name` means Triton for a tensor like x. Raises ValueError as `resolve_kernels`."""
    return resolve_kernels(name, x.device, x.dtype) == "triton"


@lru_cache(maxsize=64)
def resolve_kernels(name: str, device: torch.device, dtype: torch.dtype) -> str:
    """triton or torch: `auto` takes Triton on a CUDA device that runs it (logged once), else torch.

    Raises ValueError for a name that is unknown, and for `triton` where it cannot run.
    """
    if name not in NAMES:
        raise ValueError(f"kernels: got {name!r}, allowed are {', '.join(NAMES)}")
    if name == "torch":
        return name
    reason = _why_not(device, dtype)
    if name == "triton":
        if reason is not None:
            raise ValueError(f"kernels: got 'triton', which cannot run here: {reason}; use auto or torch")
        return name
    if reason is None and device.type == "cuda":  # the interpreter only when asked for by name
        return "triton"
    logger.info("kernels on %s, %s: torch (%s)", device, dtype, reason or "no CUDA device")
    return "torch"


def _why_not(device: torch.device, dtype: torch.dtype) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if dtype not in _DTYPES:
        return f"needs bf16, fp16 or fp32, not {dtype}"
    if device.type == "cuda":
        if torch.cuda.get_device_capability(device) < (8, 0):
            return "needs an Ampere GPU or later"
    elif device.type != "cpu" or os.environ.get("TRITON_INTERPRET") != "1":
        return f"needs a CUDA device, not {device.type}"
    return None
