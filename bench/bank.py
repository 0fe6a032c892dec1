"""Clips against a frozen bank of terms: the sweep beside product, log-sum-exp and top-k.

    python bench/bank.py [--tiny] [--json FILE]

Both give the log-sum-exp over the candidates of each clip, its gradient to the clips, and the hardest 32 candidates:
those not above the clip's limit and not left out (two entries a clip by name, 1,000 for all). The peer holds the
scores, in fp32 after a bf16 product ("dense"), or in bf16 throughout ("dense bf16", rough). The limit is two
products (scores, gradient) at the matrix rate measured here.

Shapes: M clips, K entries, E embedding.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, seconds_of
from bench.loss import TEMPERATURE, added_bytes
from losses.choice import choose_kernels
from losses.infonce import floor_of
from losses.pairs import Pairs
from losses.sweep import LeftOut, bank_contrast

CLIPS, ENTRIES, DIM, TOP, TINY = 1024, 1_000_000, 512, 32, (64, 2000, 64)
DRAWN_AT_ONCE = 100_000
Found = tuple[Tensor, Tensor, Tensor]  # lse_M, d audio, the highest cosines
Way = Callable[[Tensor], Found]


def unit_rows(num: int, dim: int, device: torch.device, seed: int) -> Tensor:
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.empty(num, dim, dtype=torch.bfloat16, device=device)
    for part in rows.split(DRAWN_AT_ONCE):
        part.copy_(F.normalize(torch.randn(part.shape, generator=generator, device=device), dim=1))
    return rows


def swept(bank_KE: Tensor, left_out: LeftOut, limit_M: Tensor, inv_t: Tensor, triton: bool) -> Way:
    def way(audio_ME: Tensor) -> Found:
        lse_M, top_MH, _ = bank_contrast(audio_ME, bank_KE, left_out, limit_M, inv_t, TOP, triton)
        return lse_M.detach(), torch.autograd.grad(lse_M.sum(), audio_ME)[0], top_MH

    return way


def dense(bank_KE: Tensor, left_out: LeftOut, limit_M: Tensor, inv_t: Tensor, dtype: torch.dtype) -> Way:
    """The peer; scores in dtype."""

    def way(audio_ME: Tensor) -> Found:
        cosine_MK = (audio_ME @ bank_KE.T).to(dtype)
        with torch.no_grad():
            out_MK = cosine_MK > limit_M[:, None].to(dtype)
            out_MK[:, left_out.entry_J] = True
            out_MK[left_out.pairs_Q.row_P, left_out.pairs_Q.col_P] = True
        cosine_MK = cosine_MK.masked_fill(out_MK, floor_of(cosine_MK))
        lse_M = (cosine_MK * inv_t.to(dtype)).logsumexp(dim=1)
        top_MH = cosine_MK.detach().topk(TOP, dim=1).values
        return lse_M.detach(), torch.autograd.grad(lse_M.float().sum(), audio_ME)[0], top_MH

    return way


def check_parity(ours: Found, theirs: Found) -> str:
    """In words. Raises RuntimeError where they differ by more than a bf16 product explains."""
    lse = float((ours[0] - theirs[0].float()).abs().max())
    cosine = float(F.cosine_similarity(ours[1].double().flatten(), theirs[1].double().flatten(), dim=0))
    top = float((ours[2] - theirs[2].float()).abs().max())
    words = (
        f"parity with dense: lse off by at most {lse:.1e}, gradient's cosine {cosine:.6f}, top cosines off by {top:.1e}"
    )
    if not (lse < 5e-3 and cosine > 0.999 and top < 2e-3):
        raise RuntimeError(words)
    return words


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """The sweep over a bank beside product, log-sum-exp and top-k."""
    device = bench_device()
    num_clips, num_entries, dim = (CLIPS, ENTRIES, DIM) if device.type == "cuda" and not tiny else TINY
    triton = choose_kernels("fused", device, torch.bfloat16, num_clips, num_entries).triton
    bank_KE = unit_rows(num_entries, dim, device, 0)
    near_ME = bank_KE[: num_clips * 3 : 3].float() + 0.08 * torch.randn(num_clips, dim, device=device)
    audio_ME = F.normalize(near_ME, dim=1).bfloat16().requires_grad_()
    generator = torch.Generator().manual_seed(1)
    row_Q = torch.arange(num_clips).repeat_interleave(2)
    entry_Q = torch.randint(num_entries, (2 * num_clips,), generator=generator)
    entry_J = torch.randint(num_entries, (min(1000, num_entries // 10),), generator=generator)
    left_out = LeftOut(Pairs(row_Q, entry_Q).to(device), entry_J.to(device))
    limit_M = torch.full((num_clips,), 0.5, device=device)  # the term that each clip is near to is above it
    inv_t = torch.tensor(1 / TEMPERATURE, device=device)
    ways: dict[str, Way] = {
        "ours": swept(bank_KE, left_out, limit_M, inv_t, triton),
        "dense": dense(bank_KE, left_out, limit_M, inv_t, torch.float32),
        "dense bf16": dense(bank_KE, left_out, limit_M, inv_t, torch.bfloat16),
    }
    found = Findings(f"{num_clips:,} clips, {num_entries:,} bank entries x {dim}: log-sum-exp, its gradient, top {TOP}")
    found.notes.append(check_parity(ways["ours"](audio_ME), ways["dense"](audio_ME)))
    least_s = limits.least_seconds(operations=2 * 2.0 * num_clips * num_entries * dim)
    times, added = {}, {}
    for name, way in ways.items():
        call = partial(way, audio_ME)
        call()
        added[name] = added_bytes(call, device)
        times[name] = seconds_of(call, device)
    for name, seconds in times.items():
        memory, ours_memory = added[name], added["ours"]
        found.rows.append(
            {
                "way": name + (" (Triton)" if triton and name == "ours" else ""),
                "ms": seconds * 1e3,
                "it / ours": seconds / times["ours"],
                "adds MiB": None if memory is None else memory / 2**20,
                "it / ours, memory": None if memory is None or ours_memory is None else memory / ours_memory,
                "of the limit": least_s / seconds,
            }
        )
    found.check("times as quick as dense", times["dense"] / times["ours"], 2.0)
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
