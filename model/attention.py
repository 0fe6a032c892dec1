"""The one attention call site: softmax attention over packed sequences, on the best kernel that is there.

Shapes: P packed tokens, H query heads, K key/value heads, D head size, J = (H + 2 K) D, B sequences, L longest length.
"""

import importlib
import inspect
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.packing import DenseGroup, SequenceLayout
from model.rotary import Rotary


def _find(module: str, name: str) -> Any:
    """A kernel's entry point, or None where its module cannot be imported."""
    try:
        return getattr(importlib.import_module(module), name, None)
    except ImportError:
        return None


flash_attn_varlen_func = _find("flash_attn", "flash_attn_varlen_func")
varlen_attn = _find("torch.nn.attention.varlen", "varlen_attn")
tile_attention = _find("model.tile_attention", "tile_attention")  # None without Triton

logger = logging.getLogger(__name__)

_VARLEN_PARAMETERS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()
_HALF = (torch.bfloat16, torch.float16)
BACKENDS = ("auto", "tile", "flash", "varlen", "sdpa")
SHORT = 256
"""Longest sequence, in tokens, of a pack that `auto` gives to tiles: beyond it flash attention is faster."""


@dataclass(frozen=True)
class Heads:
    """How a row of the joined projection divides: H query heads, then K key heads, then K value heads, D wide each."""

    num_heads: int
    num_kv_heads: int
    head_dim: int

    def split(self, qkv_PJ: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Views q_PHD, k_PKD, v_PKD of the joined rows."""
        kv_width = self.num_kv_heads * self.head_dim
        parts = qkv_PJ.split((self.num_heads * self.head_dim, kv_width, kv_width), dim=1)
        q_PHD, k_PKD, v_PKD = (part.unflatten(1, (-1, self.head_dim)) for part in parts)
        return q_PHD, k_PKD, v_PKD


class Projections(Protocol):
    """What an attention module offers: three projections, and a place for one that does their joint work."""

    joint_projection: Callable[[Tensor], Tensor] | None

    @property
    def q_proj(self) -> nn.Module: ...

    @property
    def k_proj(self) -> nn.Module: ...

    @property
    def v_proj(self) -> nn.Module: ...


def project(module: Projections, x_PD: Tensor) -> Tensor:
    """qkv_PJ: what the three projections give, side by side."""
    if module.joint_projection is not None:
        return module.joint_projection(x_PD)
    return torch.cat([part(x_PD) for part in (module.q_proj, module.k_proj, module.v_proj)], dim=1)


def packed_attention(
    qkv_PJ: Tensor,
    heads: Heads,
    layout: SequenceLayout,
    causal: bool,
    rotary: Rotary | None = None,
    backend: str = "auto",
) -> Tensor:
    """Attention within each sequence of the pack, scaled by D ** -0.5; returns [P, H * D].

    `rotary` turns queries and keys first. K may divide H (grouped queries: Ainslie et al. 2023). Raises ValueError for
    a backend that cannot run here.
    """
    is_short = layout.max_len <= SHORT
    backend = resolve_backend(backend, qkv_PJ.device, qkv_PJ.dtype, heads.head_dim, is_short)
    if backend == "tile":
        return tile_attention(qkv_PJ, heads.num_heads, heads.num_kv_heads, layout, causal, rotary)
    q_PHD, k_PKD, v_PKD = heads.split(qkv_PJ)
    if rotary is not None:
        q_PHD, k_PKD = rotary.turn(q_PHD, layout), rotary.turn(k_PKD, layout)
    if backend == "flash":
        cu, longest = layout.cu_seqlens, layout.max_len
        out_PHD = flash_attn_varlen_func(q_PHD, k_PKD, v_PKD, cu, cu, longest, longest, causal=causal)
    elif backend == "varlen":
        out_PHD = _varlen(q_PHD, k_PKD, v_PKD, layout, causal)
    else:
        out_PHD = _sdpa(q_PHD, k_PKD, v_PKD, layout, causal)
    return out_PHD.flatten(1)


@lru_cache(maxsize=64)
def resolve_backend(
    name: str, device: torch.device, dtype: torch.dtype, head_dim: int = 64, is_short: bool = False
) -> str:
    """`auto` becomes tile, flash, varlen or sdpa (logged once); any other name is returned, or raises if it cannot run.

    `is_short`: no sequence is longer than SHORT. Tiles come first for such packs, else after flash and varlen.
    """
    if name not in BACKENDS:
        raise ValueError(f"attention: got {name!r}, allowed are {', '.join(BACKENDS)}")
    order = ("tile", "flash", "varlen") if is_short else ("flash", "varlen", "tile")
    if name == "auto":
        reasons = {backend: _why_not(backend, device, dtype, head_dim) for backend in order}
        chosen = next((backend for backend, reason in reasons.items() if reason is None), "sdpa")
        why = "; ".join(f"{backend}: {reason}" for backend, reason in reasons.items() if reason is not None)
        lengths = f"sequences {'up to' if is_short else 'over'} {SHORT} tokens"
        logger.info("attention on %s, %s, %s: %s%s", device, dtype, lengths, chosen, f" ({why})" if why else "")
        return chosen
    reason = None if name == "sdpa" else _why_not(name, device, dtype, head_dim)
    if reason is not None:
        raise ValueError(f"attention: got {name!r}, which cannot run here: {reason}; use auto or sdpa")
    return name


def _why_not(backend: str, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    if backend == "tile" and tile_attention is None:
        return "triton is not installed"
    if backend == "flash" and flash_attn_varlen_func is None:
        return "flash_attn is not installed"
    if backend == "varlen" and varlen_attn is None:
        return f"torch {torch.__version__} has no torch.nn.attention.varlen"
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if dtype not in _HALF:
        return f"needs bf16 or fp16, not {dtype}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return "needs an Ampere GPU or later"
    multiple, largest = (16, 128) if backend == "tile" else (8, 256)
    if head_dim % multiple or head_dim > largest:
        return f"needs a head size that is a multiple of {multiple}, at most {largest}, not {head_dim}"
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
    """Dense attention on padded batches, for any device and dtype; no padding when all lengths are equal."""
    num_heads = q_PHD.shape[1]
    k_PHD, v_PHD = _repeat_heads(k_PKD, num_heads), _repeat_heads(v_PKD, num_heads)
    out_PHD = None
    for group in layout.dense_groups:
        q, k, v = (_to_dense(x, group).transpose(1, 2) for x in (q_PHD, k_PHD, v_PHD))
        # Padding comes last, so a causal mask alone already hides it from every real token.
        mask = None if causal or group.key_mask_BL is None else group.key_mask_BL[:, None, None, :]
        out_BHLD = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        rows_PHD = out_BHLD.transpose(1, 2).reshape(-1, *q_PHD.shape[1:])
        if group.rows_P is not None:
            rows_PHD = rows_PHD[group.rows_P]
        if group.tokens_P is None:
            return rows_PHD
        out_PHD = torch.zeros_like(q_PHD) if out_PHD is None else out_PHD
        out_PHD = out_PHD.index_copy(0, group.tokens_P, rows_PHD)
    assert out_PHD is not None
    return out_PHD


def _to_dense(x_PHD: Tensor, group: DenseGroup) -> Tensor:
    """Packed rows to [batch, max_len, H, D], zeros after each sequence."""
    if group.tokens_P is not None:
        x_PHD = x_PHD[group.tokens_P]
    if group.rows_P is not None:
        x_PHD = x_PHD.new_zeros(group.batch * group.max_len, *x_PHD.shape[1:]).index_copy(0, group.rows_P, x_PHD)
    return x_PHD.reshape(group.batch, group.max_len, *x_PHD.shape[1:])


def _repeat_heads(x_PKD: Tensor, num_heads: int) -> Tensor:
    return x_PKD if x_PKD.shape[1] == num_heads else x_PKD.repeat_interleave(num_heads // x_PKD.shape[1], dim=1)
