"""Attention over tiles of the packed rows that cross the borders of sequences: for packs of short sequences.

Flash attention's variable-length kernels give every sequence blocks of its own, 128 rows each; a term of four tokens
leaves 124 of them idle. Here a program takes a fixed number of the pack's rows, whatever sequences they belong to, and
masks what lies in other sequences, so that the work is nearly proportional to the packed rows. Rotary positions are
turned as queries and keys are loaded, and turned back as their gradients are stored; the joined projection is read in
place, and its gradient is written once, in one buffer. Of a long sequence nothing is wasted either, but flash
attention is better tuned for it.

The algorithm is FlashAttention-2's (Dao 2023, https://arxiv.org/abs/2307.08691); the reference for every value and
gradient is the plain path of `model.attention`. Needs Triton, and a GPU of compute capability 8.0 or later. The grid
depends on the number of rows alone and the spans are read on the device, so that a CUDA graph may be replayed with
other lengths. A row that is not finite also spoils its neighbours in other sequences.

Shapes: P packed tokens, H query heads, K key/value heads, D head size, J = (H + 2 K) D.
"""

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from model.attention_kernels import forward_kernel, key_gradient_kernel, query_gradient_kernel
from model.packing import SequenceLayout
from model.rotary import Rotary

_LOG2_E = 1.4426950408889634


@dataclass(frozen=True)
class Tiling:
    """Rows of the pack a program holds, rows a step of its walk, warps, and pipeline stages of one kernel."""

    tile: int
    step: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class Tilings:
    """What the kernels are launched with."""

    forward: Tiling
    query_gradient: Tiling
    key_gradient: Tiling


NARROW = Tilings(forward=Tiling(64, 64, 4, 2), query_gradient=Tiling(64, 32, 4, 2), key_gradient=Tiling(64, 32, 4, 2))
"""Head sizes up to 64."""
WIDE = Tilings(forward=Tiling(64, 32, 8, 2), query_gradient=Tiling(64, 16, 4, 1), key_gradient=Tiling(64, 16, 4, 1))
"""Head sizes up to 128, from compute capability 9.0."""
WIDE_AMPERE = Tilings(Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2), Tiling(32, 32, 4, 2))
"""Head sizes up to 128 before: the A100's products take their operands from registers, which larger tiles spill."""


def tilings_for(head_dim: int, device: torch.device) -> Tilings:
    """The tilings for a head size on a device."""
    if head_dim <= 64:
        return NARROW
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    return WIDE if is_hopper else WIDE_AMPERE


@dataclass(frozen=True)
class _Call:
    """Everything about one call but the tensor that gets a gradient."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    layout: SequenceLayout
    causal: bool
    rotary: Rotary | None
    tilings: Tilings

    def grid(self, num_heads: int, num_rows: int, tiling: Tiling) -> tuple[int, int]:
        return num_heads, triton.cdiv(num_rows, tiling.tile)

    def tables(self) -> tuple[Tensor, ...]:
        """owner, place, cu_seqlens, cosines, sines; the last two stand in where nothing is turned."""
        layout, rotary = self.layout, self.rotary
        turns = (layout.cu_seqlens, layout.cu_seqlens) if rotary is None else (rotary.cos_LD, rotary.sin_LD)
        return (layout.owner_P, layout.place_P, layout.cu_seqlens, *turns)

    def constants(self, tiling: Tiling) -> dict[str, int | bool]:
        return {
            "NUM_HEADS": self.num_heads,
            "GROUP": self.num_heads // self.num_kv_heads,
            "HEAD": self.head_dim,
            "C": max(16, triton.next_power_of_2(self.head_dim // 2)),
            "CAUSAL": self.causal,
            "ROTARY": self.rotary is not None,
            "TILE": tiling.tile,
            "STEP": tiling.step,
            "num_warps": tiling.num_warps,
            "num_stages": tiling.num_stages,
        }


def tile_attention(
    qkv_PJ: Tensor,
    num_heads: int,
    num_kv_heads: int,
    layout: SequenceLayout,
    causal: bool,
    rotary: Rotary | None = None,
    tilings: Tilings | None = None,
) -> Tensor:
    """Attention within each sequence of the pack, scaled by D ** -0.5: [P, H * D] in the dtype of qkv_PJ.

    D is even, at most 128; dtypes bf16, fp16, and fp32 (multiplied as fp32: for tests). `rotary` turns queries and
    keys first, in fp32. For the backward pass qkv_PJ, the result and a number a row and head are kept. Deterministic.
    """
    head_dim = qkv_PJ.shape[1] // (num_heads + 2 * num_kv_heads)
    tilings = tilings or tilings_for(head_dim, qkv_PJ.device)
    call = _Call(num_heads, num_kv_heads, head_dim, layout, causal, rotary, tilings)
    out_PV: Tensor = _TileAttention.apply(qkv_PJ, call)
    return out_PV


def _row_major(x_PJ: Tensor) -> Tensor:
    return x_PJ if x_PJ.stride(1) == 1 else x_PJ.contiguous()


class _TileAttention(torch.autograd.Function):
    """Forward kernel; in the backward pass one kernel over query tiles, then one over key tiles."""

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, qkv_PJ: Tensor, call: _Call) -> Tensor:
        qkv_PJ = _row_major(qkv_PJ)
        num_rows, tiling = len(qkv_PJ), call.tilings.forward
        out_PV = qkv_PJ.new_empty(num_rows, call.num_heads * call.head_dim)
        lse_HP = qkv_PJ.new_empty(call.num_heads, num_rows, dtype=torch.float32)
        forward_kernel[call.grid(call.num_heads, num_rows, tiling)](
            qkv_PJ,
            out_PV,
            lse_HP,
            *call.tables(),
            num_rows,
            qkv_PJ.stride(0),
            call.head_dim**-0.5 * _LOG2_E,
            **call.constants(tiling),
        )
        ctx.save_for_backward(qkv_PJ, lse_HP, out_PV)
        ctx.call = call  # type: ignore[attr-defined]
        return out_PV

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, dout_PV: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        call: _Call = ctx.call  # type: ignore[attr-defined]
        qkv_PJ, lse_HP, out_PV = ctx.saved_tensors  # type: ignore[attr-defined]
        dout_PV = _row_major(dout_PV)
        num_rows, scale = len(qkv_PJ), call.head_dim**-0.5
        dqkv_PJ = torch.empty_like(qkv_PJ, memory_format=torch.contiguous_format)
        sizes = (num_rows, qkv_PJ.stride(0), dout_PV.stride(0), scale, scale * _LOG2_E)
        delta_HP = torch.empty_like(lse_HP)
        tiling = call.tilings.query_gradient
        query_gradient_kernel[call.grid(call.num_heads, num_rows, tiling)](
            qkv_PJ,
            dout_PV,
            out_PV,
            lse_HP,
            delta_HP,
            dqkv_PJ,
            *call.tables(),
            *sizes,
            **call.constants(tiling),
        )
        tiling = call.tilings.key_gradient
        key_gradient_kernel[call.grid(call.num_kv_heads, num_rows, tiling)](
            qkv_PJ, dout_PV, lse_HP, delta_HP, dqkv_PJ, *call.tables(), *sizes, **call.constants(tiling)
        )
        return dqkv_PJ, None
