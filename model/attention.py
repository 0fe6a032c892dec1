"""The one attention call site: softmax attention over packed sequences, on the best kernel that is there.

Shapes: P packed tokens, H query heads, K key/value heads, D head size, B sequences, L longest length.
"""

import importlib
import inspect
import logging
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.packing import SequenceLayout


def _find(module: str, name: str) -> Any:
    """A kernel's entry point, or None where its module cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


flash_attn_varlen_func = _find("flash_attn", "flash_attn_varlen_func")
varlen_attn = _find("torch.nn.attention.varlen", "varlen_attn")

logger = logging.getLogger(__name__)

_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()
_HALF = (torch.bfloat16, torch.float16)


def packed_attention(
    q_PHD: Tensor, k_PKD: Tensor, v_PKD: Tensor, layout: SequenceLayout, causal: bool, backend: str = "auto"
) -> Tensor:
    """Attention within each sequence of the pack, scaled by D ** -0.5; returns [P, H, D].

    K may divide H (grouped queries: Ainslie et al. 2023). Raises ValueError for a backend that cannot run here.
    """
    backend = resolve_backend(backend, q_PHD.device, q_PHD.dtype, q_PHD.shape[-1])
    if backend == "flash":
        cu, longest = layout.cu_seqlens, layout.max_len
        return flash_attn_varlen_func(q_PHD, k_PKD, v_PKD, cu, cu, longest, longest, causal=causal)
    if backend == "varlen":
        return _varlen(q_PHD, k_PKD, v_PKD, layout, causal)
    return _sdpa(q_PHD, k_PKD, v_PKD, layout, causal)


@lru_cache(maxsize=64)
def resolve_backend(name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64) -> str:
    """`auto` becomes flash, varlen or sdpa (logged once); any other name is returned, or raises if it cannot run."""
    reasons = {"flash": _why_not_flash(device, dtype, head_dim), "varlen": _why_not_varlen(device, dtype, head_dim)}
    if name == "auto":
        chosen = next((backend for backend, reason in reasons.items() if reason is None), "sdpa")
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason is not None)
        logger.info("attention on %s, %s: %s%s", device, dtype, chosen, f" ({why})" if why else "")
        return chosen
    if name not in ("flash", "varlen", "sdpa"):
        raise ValueError(f"attention: got {name!r}, allowed are auto, flash, varlen, sdpa")
    if reasons.get(name) is not None:
        raise ValueError(f"attention: got {name!r}, which cannot run here: {reasons[name]}; use auto or sdpa")
    return name


def _why_not_flash(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if flash_attn_varlen_func is None:
        return "flash_attn is not installed"
    return _why_not_kernel(device, dtype, head_dim)


def _why_not_varlen(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if varlen_attn is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    return _why_not_kernel(device, dtype, head_dim)


def _why_not_kernel(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in _HALF:
        return f"needs bf16 or fp16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an Ampere GPU or later"
    if head_dim % 8 or head_dim > 256:
        return f"needs a head size that is a multiple of 8, at most 256, not {head_dim}"
    return None


def _varlen(q_PHD: Tensor, k_PKD: Tensor, v_PKD: Tensor, layout: SequenceLayout, causal: bool) -> Tensor:
    """torch.nn.attention.varlen, whose signature moved: `is_causal` in 2.10, `window_size` from 2.11."""
    options: dict[str, Any] = {}
    if causal and "is_causal" in _VARLEN_PARAMETERS:
        options["is_causal"] = True
    elif causal:
        options["window_size"] = (-1, 0)
    if q_PHD.shape[1] != k_PKD.shape[1]:
        if "enable_gqa" in _VARLEN_PARAMETERS:
            options["enable_gqa"] = True
        else:
            k_PKD, v_PKD = _repeat_heads(k_PKD, q_PHD.shape[1]), _repeat_heads(v_PKD, q_PHD.shape[1])
    cu, longest = layout.cu_seqlens, layout.max_len
    return varlen_attn(q_PHD, k_PKD, v_PKD, cu, cu, longest, longest, **options)


def _sdpa(q_PHD: Tensor, k_PKD: Tensor, v_PKD: Tensor, layout: SequenceLayout, causal: bool) -> Tensor:
    """Dense attention on a padded batch, for any device and dtype; no padding when all lengths are equal."""
    num_heads, batch = q_PHD.shape[1], len(layout.lengths)
    k_PHD, v_PHD = _repeat_heads(k_PKD, num_heads), _repeat_heads(v_PKD, num_heads)
    shape = (batch, layout.max_len, num_heads, q_PHD.shape[2])
    if layout.is_rectangular:
        q, k, v = (x.reshape(shape).transpose(1, 2) for x in (q_PHD, k_PHD, v_PHD))
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).reshape(q_PHD.shape)
    q, k, v = (_pad(x, layout).view(shape).transpose(1, 2) for x in (q_PHD, k_PHD, v_PHD))
    # Padding comes last, so a causal mask alone already hides it from every real token.
    mask = None if causal else layout.key_mask_BL[:, None, None, :]
    out_BHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
    return out_BHLD.transpose(1, 2).reshape(-1, *q_PHD.shape[1:])[layout.dense_P]


def _pad(x_PHD: Tensor, layout: SequenceLayout) -> Tensor:
    rows = len(layout.lengths) * layout.max_len
    return x_PHD.new_zeros(rows, *x_PHD.shape[1:]).index_copy(0, layout.dense_P, x_PHD)


def _repeat_heads(x_PKD: Tensor, num_heads: int) -> Tensor:
    return x_PKD if x_PKD.shape[1] == num_heads else x_PKD.repeat_interleave(num_heads // x_PKD.shape[1], dim=1)
