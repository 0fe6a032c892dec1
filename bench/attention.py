"""Attention over one packed batch, each backend beside the others: forward, and backward, from projection to gradient.

    python bench/attention.py

Every backend is given the joined projection and gives its gradient, so that splitting, rotary positions, copies and
padding count where a backend needs them. The shapes are the two towers' of Qwen2-Audio-7B: strings of a few tokens (32
heads of 128, causal, rotary) and clips of up to 4 s (20 heads of 64), drawn as users have them; then clips of 4 s and
of 30 s. CALLS calls are captured in a CUDA graph and replayed, so that the host's launches do not count. Rows are
printed as they come; after BUDGET_S seconds no further pack is begun.

  tile     model/tile_attention.py
  varlen   torch.nn.attention.varlen
  flash    flash_attn, where it is installed
  cute     flash_attn.cute (the wheel flash-attn-4), where it is installed: called as flash is
  sdpa     scaled_dot_product_attention on padded batches

Before anything is timed each result and gradient is compared with scaled_dot_product_attention in fp32.

Shapes: P packed tokens, J width of the joined projection.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import importlib
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import Tensor

from bench.findings import Cell, Findings, run_alone
from bench.limits import Limits, bench_device, seconds_of, synchronize
from model import attention
from model.attention import Heads, packed_attention
from model.packing import SequenceLayout
from model.rotary import Rotary

PARITY = 3e-2  # of the largest element, bf16
TEXT, AUDIO = Heads(32, 32, 128), Heads(20, 20, 64)
TOKENS_A_SECOND = 50
CALLS = 10  # in one graph: a kernel of a few microseconds is shorter than a graph's launch
BUDGET_S = 30.0


@dataclass(frozen=True)
class Pack:
    """One packed batch for attention: of strings (causal, with rotary positions) or of clips."""

    name: str
    heads: Heads
    lengths: list[int]
    is_text: bool

    def inputs(self, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, SequenceLayout, Rotary | None]:
        """qkv_PJ, which wants a gradient, layout and rotary tables."""
        generator = torch.Generator(device).manual_seed(0)
        width = (self.heads.num_heads + 2 * self.heads.num_kv_heads) * self.heads.head_dim
        qkv_PJ = torch.randn(sum(self.lengths), width, device=device, generator=generator).to(dtype)
        layout = SequenceLayout.build(self.lengths, device)
        rotary = Rotary.build(1e4, self.heads.head_dim, max(self.lengths), dtype, device) if self.is_text else None
        return qkv_PJ.requires_grad_(), layout, rotary


def drawn(num_clips: int) -> tuple[list[int], list[int]]:
    """Tokens of the clips and of their strings: about 1.6 s each, a text of 3.2 tokens a second, 1.3 terms."""
    generator = torch.Generator().manual_seed(num_clips)
    seconds_B = (torch.randn(num_clips, generator=generator) * 0.45 + math.log(1.5)).exp().clamp(0.3, 4.0)
    texts_B = (seconds_B * 3.2).round().clamp(2, 16).long()
    num_terms = num_clips + int((torch.rand(num_clips, generator=generator) < 0.3).sum())
    terms_N = torch.randint(2, 6, (num_terms,), generator=generator)
    clips_B = (seconds_B * TOKENS_A_SECOND).long()
    return clips_B.tolist(), [*texts_B.tolist(), *terms_N.tolist()]


def packs(tiny: bool = False) -> list[Pack]:
    """What is measured; `tiny`: two small ones."""
    if tiny:
        heads = Heads(2, 2, 16)
        return [Pack("text tiny", heads, [3, 2, 5], True), Pack("audio tiny", heads, [9, 20], False)]
    found = []
    for num_clips in (256, 16, 64):
        clips, strings = drawn(num_clips)
        found.append(Pack(f"text {num_clips}", TEXT, strings, True))
        found.append(Pack(f"audio {num_clips}", AUDIO, clips, False))
    return [
        *found,
        Pack("audio 100 of 4 s", AUDIO, [4 * TOKENS_A_SECOND] * 100, False),
        Pack("audio 14 of 30 s", AUDIO, [30 * TOKENS_A_SECOND] * 14, False),
    ]


def seconds_a_call(call: Callable[[], object], device: torch.device) -> float:
    """Device seconds of a call, CALLS of them captured in one CUDA graph; on the CPU the host's seconds."""
    if device.type != "cuda":
        return seconds_of(call, device)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=side):
        for _ in range(CALLS):
            call()
    return seconds_of(graph.replay, device, count=7, warmup=2) / CALLS


def timed(attend: Callable[[Tensor], Tensor], qkv_PJ: Tensor, device: torch.device) -> tuple[float, float]:
    """Microseconds of the forward pass, and of the backward pass: both together less the first."""
    dout_PV = torch.randn_like(attend(qkv_PJ.detach()))

    def both() -> object:
        # A leaf of its own: one whose gradient node an earlier graph keeps alive is tied to that graph's stream.
        leaf_PJ = qkv_PJ.detach().requires_grad_()
        return torch.autograd.grad(attend(leaf_PJ), leaf_PJ, dout_PV)

    forward_s = seconds_a_call(lambda: attend(qkv_PJ.detach()), device)
    return forward_s * 1e6, (seconds_a_call(both, device) - forward_s) * 1e6


def distance(ours: Tensor, exact: Tensor) -> float:
    return ((ours.float() - exact.float()).abs().max() / exact.float().abs().max()).item()


def least_seconds(pack: Pack, limits: Limits, backward: bool) -> float:
    """Bytes in and out, and the products of seen pairs alone: 2 of them forward, 5 backward."""
    heads = pack.heads
    width, joined = heads.num_heads * heads.head_dim, (heads.num_heads + 2 * heads.num_kv_heads) * heads.head_dim
    pairs = sum(n * (n + 1) // 2 if pack.is_text else n * n for n in pack.lengths)
    num_bytes = 2 * sum(pack.lengths) * ((2 * joined + width) if backward else (joined + width))
    return limits.least_seconds(2 * pairs * width * (5 if backward else 2), num_bytes)


def backends(device: torch.device) -> dict[str, str]:
    """Name in the table -> backend of packed_attention, for those that run here."""
    if device.type != "cuda":
        return {"sdpa": "sdpa"}
    names = {"tile": "tile", "varlen": "varlen"}
    if attention.flash_attn_varlen_func is not None:
        names["flash"] = "flash"
    if cute_function() is not None:
        names["cute"] = "flash"
    return {**names, "sdpa": "sdpa"}


def cute_function() -> Callable[..., Tensor] | None:
    """flash_attn.cute's entry point in the form of flash_attn's."""
    try:
        function = importlib.import_module("flash_attn.cute").flash_attn_varlen_func
    except (ImportError, AttributeError):
        return None

    def attend(
        q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, max_q: int, max_k: int, causal: bool
    ) -> Tensor:
        found = function(q, k, v, cu_seqlens_q=cu_q, cu_seqlens_k=cu_k, causal=causal)
        return found[0] if isinstance(found, tuple) else found

    return attend


def show(row: dict[str, Cell]) -> None:
    """One row at once: a run that is cut off has told what it knows."""
    print(
        "  ".join(str(v) if isinstance(v, str) else f"{k} {v:.4g}" for k, v in row.items() if v is not None), flush=True
    )


def measure_pack(pack: Pack, limits: Limits, found: Findings) -> None:
    """A row for each backend that runs, after its parity."""
    device = bench_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv_PJ, layout, rotary = pack.inputs(device, dtype)
    wide_PJ = qkv_PJ.detach().float().requires_grad_()
    wide_rotary = None if rotary is None else Rotary(rotary.cos_LD.float(), rotary.sin_LD.float())
    exact_PV = packed_attention(wide_PJ, pack.heads, layout, pack.is_text, wide_rotary, "sdpa")
    dout_PV = torch.randn_like(exact_PV)
    (exact_PJ,) = torch.autograd.grad(exact_PV, wide_PJ, dout_PV)
    best: dict[str, float] = {}
    for name, backend in backends(device).items():
        flash = cute_function() if name == "cute" else attention.flash_attn_varlen_func

        def attend(x_PJ: Tensor, backend: str = backend) -> Tensor:
            return packed_attention(x_PJ, pack.heads, layout, pack.is_text, rotary, backend)

        with patch.object(attention, "flash_attn_varlen_func", flash):
            try:
                out_PV = attend(qkv_PJ)
                (grad_PJ,) = torch.autograd.grad(out_PV, qkv_PJ, dout_PV.to(dtype))
            except (RuntimeError, TypeError, NotImplementedError) as error:
                found.notes.append(f"{pack.name}, {name}: does not run: {str(error).splitlines()[0]}")
                continue
            errors = distance(out_PV, exact_PV), distance(grad_PJ, exact_PJ)
            if max(errors) > PARITY:
                told = f"{errors[0]:.3g} (result) and {errors[1]:.3g} (gradient)"
                raise RuntimeError(f"{pack.name}, {name}: off by {told}")
            del out_PV, grad_PJ
            try:
                forward_us, backward_us = timed(attend, qkv_PJ, device)
            except RuntimeError as error:  # the other backends can still be told
                found.notes.append(f"{pack.name}, {name}: agrees, but not timed: {str(error).splitlines()[0]}")
                print(found.notes[-1], flush=True)
                continue
        best[name] = forward_us + backward_us
        found.rows.append(
            {
                "pack": pack.name,
                "tokens": sum(pack.lengths),
                "backend": name,
                "forward us": forward_us,
                "backward us": backward_us,
                "forward limit us": least_seconds(pack, limits, False) * 1e6,
                "backward limit us": least_seconds(pack, limits, True) * 1e6,
                "error": errors[0],
                "gradient error": errors[1],
                "x varlen": None,
            }
        )
        show(found.rows[-1])
    for row in found.rows:
        if row["pack"] == pack.name and "varlen" in best:
            row["x varlen"] = best["varlen"] / best[str(row["backend"])]


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Attention of the two towers' shapes on every backend that runs here: forward and backward."""
    found = Findings("Attention of one layer, projection in, gradient of the projection out (bf16)")
    started = time.monotonic()
    for pack in packs(tiny):
        if time.monotonic() - started > BUDGET_S:
            found.notes.append(f"{pack.name}: not measured, {BUDGET_S:.0f} s are over")
            continue
        measure_pack(pack, limits, found)
    if bench_device().type == "cuda":
        found.notes.append(f"flash_attn: {'ran' if attention.flash_attn_varlen_func else 'not installed'}")
        found.notes.append(f"flash_attn.cute: {'importable' if cute_function() else 'not installed'}")
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
