"""Clips against a frozen bank of terms: the sweep beside product, log-sum-exp and top-k.

    python bench/bank.py [--tiny] [--json FILE]

Both give the log-sum-exp over the candidates of each clip, its gradient to the clips, and the hardest 32 candidates:
those not above the clip's positive-aware limit and not left out (two entries a clip by name, 1,000 for all). For each
clip the bank has its positive (above the limit), a variant of it (left out by name) and a near negative (for half of
the clips left out for all): whoever forgets one of these rules finds another hardest candidate.

The peer holds the scores, in fp32 after a bf16 product ("dense"), or in bf16 throughout ("dense bf16", rough).
Before anything is timed, ours is held against the peer, and more closely against plain fp32 products, a few entries at
a time. A rounded cosine may pass a limit that the exact one does not, and its clip then has another list altogether:
clips with an entry that near to their limit are not compared. The limit is two products (scores, gradient) at the
matrix rate measured here.

Shapes: M clips, K entries, E embedding.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device
from bench.loss import TEMPERATURE, Timed, timed
from losses.choice import choose_kernels
from losses.infonce import floor_of
from losses.pairs import Pairs
from losses.sweep import LeftOut, bank_contrast

CLIPS, ENTRIES, DIM, TOP, TINY = 1024, 1_000_000, 512, 32, (64, 2000, 64)
POSITIVE, VARIANT, NEAR_NEGATIVE, MARGIN = 0.9, 0.6, 0.5, 0.05  # cosines to the clip; the limit is 0.95 of the first
DRAWN_AT_ONCE = 100_000
LOOKED_AT_ONCE = 2**24  # cosines
CLOSE = 2**-8  # twice what rounding to bf16 moves a cosine below 1 by
LEAST_COMPARED = 0.9  # of all clips
BUDGET_S = 35.0
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


@dataclass(frozen=True)
class Allowed:
    lse: float
    gradient: float  # least cosine of a clip's gradient
    top: float


# The peer's cosines are rounded to bf16, those of candidates (below 1) by up to 2^-9; no log-sum-exp is off by more.
BF16_PRODUCTS = Allowed(2**-9 / TEMPERATURE, 0.9995, 2.1e-3)
FP32_PRODUCTS = Allowed(1e-4, 0.9999, 1e-5)


def clear_of_limit(audio_ME: Tensor, bank_KE: Tensor, limit_M: Tensor) -> Tensor:
    """bool [M]: no entry's cosine is so near to the clip's limit that rounding decides on which side it is."""
    clear_M = torch.ones_like(limit_M, dtype=torch.bool)
    for part_WE in bank_KE.split(max(1, LOOKED_AT_ONCE // len(audio_ME))):
        cosine_MW = audio_ME.detach().float() @ part_WE.float().T
        clear_M &= ((cosine_MW - limit_M[:, None]).abs() > CLOSE).all(dim=1)
    return clear_M


def check_parity(ours: Found, theirs: Found, clear_M: Tensor, allowed: Allowed, name: str) -> str:
    """In words. Raises RuntimeError where they differ, on the clips to be compared, by more than rounding explains."""
    (lse_M, grad_ME, top_MH), (their_lse_M, their_grad_ME, their_top_MH) = (
        [x[clear_M].double() for x in found] for found in (ours, theirs)
    )
    lse = float((lse_M - their_lse_M).abs().max())
    cosine = float(F.cosine_similarity(grad_ME, their_grad_ME, dim=1).min())
    top = float((top_MH - their_top_MH).abs().max())
    compared = float(clear_M.double().mean())
    words = (
        f"parity with {name}, on {compared:.1%} of the clips: lse off by at most {lse:.1e}, least cosine of a clip's "
        f"gradient {cosine:.6f}, top cosines off by {top:.1e}"
    )
    if not (lse < allowed.lse and cosine > allowed.gradient and top < allowed.top and compared >= LEAST_COMPARED):
        raise RuntimeError(f"{words}; allowed: {allowed}, on at least {LEAST_COMPARED:.0%} of the clips")
    return words


@dataclass(frozen=True)
class Problem:
    audio_ME: Tensor  # needs a gradient
    bank_KE: Tensor
    left_out: LeftOut
    limit_M: Tensor


def problem(num_clips: int, num_entries: int, dim: int, device: torch.device) -> Problem:
    """See the head of this file; entries 3 i, 3 i + 1 and 3 i + 2 belong to clip i."""
    audio_ME, bank_KE = (unit_rows(n, dim, device, seed) for seed, n in enumerate((num_clips, num_entries)))
    for place, cosine in enumerate((POSITIVE, VARIANT, NEAR_NEGATIVE)):
        noise_ME = unit_rows(num_clips, dim, device, 2 + place).float()
        near_ME = cosine * audio_ME.float() + (1 - cosine**2) ** 0.5 * noise_ME
        bank_KE[place : 3 * num_clips : 3] = F.normalize(near_ME, dim=1).bfloat16()
    positive_M = (audio_ME.float() * bank_KE[: 3 * num_clips : 3].float()).sum(dim=1)
    generator, every_M = torch.Generator().manual_seed(9), torch.arange(num_clips)
    by_name_M = torch.randint(num_entries, (num_clips,), generator=generator)
    near_J = 3 * every_M[: num_clips // 2] + 2
    others_J = torch.randint(num_entries, (min(1000, num_entries // 10) - len(near_J),), generator=generator)
    pairs_Q = Pairs(every_M.repeat(2), torch.cat([3 * every_M + 1, by_name_M])).to(device)
    left_out = LeftOut(pairs_Q, torch.cat([near_J, others_J]).to(device))
    return Problem(audio_ME.requires_grad_(), bank_KE, left_out, positive_M - positive_M.abs() * MARGIN)


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """The sweep over a bank beside product, log-sum-exp and top-k. Lines are printed as they come."""
    began, device = time.monotonic(), bench_device()
    num_clips, num_entries, dim = (CLIPS, ENTRIES, DIM) if device.type == "cuda" and not tiny else TINY
    triton = choose_kernels("fused", device, torch.bfloat16, num_clips, num_entries).triton
    p = problem(num_clips, num_entries, dim, device)
    inv_t = torch.tensor(1 / TEMPERATURE, device=device)
    given = (p.bank_KE, p.left_out, p.limit_M, inv_t)
    ways: dict[str, Way] = {
        "ours": swept(*given, triton),
        "dense": dense(*given, torch.float32),
        "dense bf16": dense(*given, torch.bfloat16),
    }
    found = Findings(f"{num_clips:,} clips, {num_entries:,} bank entries x {dim}: log-sum-exp, its gradient, top {TOP}")

    def note(line: str) -> None:
        print(f"{time.monotonic() - began:5.1f} s  {line}", flush=True)
        found.notes.append(line)

    clear_M, ours = clear_of_limit(p.audio_ME, p.bank_KE, p.limit_M), ways["ours"](p.audio_ME)
    note(check_parity(ours, swept(*given, False)(p.audio_ME), clear_M, FP32_PRODUCTS, "fp32 products"))
    try:
        note(check_parity(ours, ways["dense"](p.audio_ME), clear_M, BF16_PRODUCTS, "dense"))
    except torch.OutOfMemoryError:
        note("dense does not fit into the device's memory")
    least_s = limits.least_seconds(operations=2 * 2.0 * num_clips * num_entries * dim)
    times: dict[str, Timed] = {}
    for name, way in ways.items():
        result = timed(partial(way, p.audio_ME), device, BUDGET_S - (time.monotonic() - began))
        if isinstance(result, str):
            note(f"{name}: left out ({result})")
            continue
        print(f"{time.monotonic() - began:5.1f} s  {name}: {result.seconds * 1e3:.2f} ms", flush=True)
        times[name] = result
        mine = times.get("ours")
        found.rows.append(
            {
                "way": name + (" (Triton)" if triton and name == "ours" else ""),
                "ms": result.seconds * 1e3,
                "it / ours": None if mine is None else result.seconds / mine.seconds,
                "adds MiB": None if result.added is None else result.added / 2**20,
                "it / ours, memory": None if mine is None or not result.added else result.added / (mine.added or 1),
                "of the limit": least_s / result.seconds,
            }
        )
    both = {"ours", "dense"} <= times.keys()
    ratio = times["dense"].seconds / times["ours"].seconds if both else None
    found.check("times as quick as dense", ratio, 2.0)
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
