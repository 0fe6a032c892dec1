"""Symmetric InfoNCE over a square of clips and terms: tiled beside dense.

    python bench/loss.py [--tiny] [--json FILE]

Forward and backward, gradients to rows, columns and temperature. Ours has all its options on: one ignored pair a row,
terms that count several times. The dense peers have none of that (a product, two softmaxes over it, one positive a
row), which favours them:

  dense           bf16 product, scores and log-sum-exps in fp32
  dense CE        the same through F.cross_entropy
  dense CE bf16   scores stay in bf16: the leanest, and wrong in the third digit of each score
  dense fp32      fp32 embeddings, plain fp32 products; "tf32" lets the tensor cores round their inputs

The limit is three products (one forward, two backward) at the matrix rate measured here; ours does a fourth, and those
of fp32 embeddings take three bf16 products each, instead of holding scores. Memory is what a call adds at its peak,
gradients included. What would end more than BUDGET_S seconds after the start, or does not fit, is left out, and named.

Shapes: R rows, C columns, E embedding.
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
from bench.limits import Limits, bench_device, seconds_of, synchronize
from losses.choice import choose_kernels
from losses.infonce import multi_positive_infonce
from losses.pairs import Pairs, pair_mask
from losses.tiled import Match, contrast

SIZE, DIM, CHECKED_SIZE, TINY = 32_768, 512, 2048, (256, 64)
BUDGET_S = 32.0
SMALL = (256, 1024, 2048, 4096, 8192)
TEMPERATURE = 0.07
MOST_ERROR = {torch.float32: (1e-5, 0.9999), torch.bfloat16: (1e-4, 0.9999)}  # of the loss; cosine of each gradient
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def embeddings(size: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Unit rows, unit columns that lean towards their rows, 1 / temperature; all need a gradient."""
    generator = torch.Generator(device).manual_seed(size)
    rows_RE, noise_RE = (torch.randn(size, dim, generator=generator, device=device) for _ in range(2))
    rows, cols = (F.normalize(x, dim=1).to(dtype).requires_grad_() for x in (rows_RE, rows_RE * 0.5 + noise_RE))
    return rows, cols, torch.tensor(1 / TEMPERATURE, device=device, requires_grad=True)


def tiled(size: int, device: torch.device, triton: bool) -> Loss:
    every_R = torch.arange(size, device=device)
    count_C = 1 + every_R % 3
    ones = torch.ones(size, device=device)
    match = Match(
        count_C.double().log(),
        torch.zeros(size, device=device),
        ignored=Pairs(every_R, (every_R * 7 + 1) % size),
        positives=Pairs(every_R, every_R),
        row_share_P=ones,
        col_share_P=ones,
    )

    def loss(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> Tensor:
        loss_R, loss_C = contrast(rows_RE, cols_CE, inv_t, match, triton)
        return (loss_R.mean() + loss_C.mean()) / 2

    return loss


def reference(size: int, device: torch.device) -> Loss:
    """The same by the readable form of losses/infonce.py."""
    every_R = torch.arange(size, device=device)
    positives_RC = pair_mask(every_R, every_R, size, size, device)
    ignored_RC = pair_mask(every_R, (every_R * 7 + 1) % size, size, size, device) & ~positives_RC
    log_count_C = (1 + every_R % 3).double().log()
    weight_R = torch.full((size,), 0.5 / size, device=device)

    def loss(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> Tensor:
        by_row = multi_positive_infonce(rows_RE, cols_CE, positives_RC, ignored_RC, log_count_C, weight_R, inv_t)
        by_col = multi_positive_infonce(cols_CE, rows_RE, positives_RC.T, ignored_RC.T, None, weight_R, inv_t)
        return by_row + by_col

    return loss


def dense(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> Tensor:
    scores_RC = (rows_RE @ cols_CE.T).float() * inv_t
    both = scores_RC.logsumexp(dim=1).mean() + scores_RC.logsumexp(dim=0).mean()
    return both / 2 - scores_RC.diagonal().mean()


def dense_ce(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> Tensor:
    scores_RC = (rows_RE @ cols_CE.T).float() * inv_t
    target_R = torch.arange(len(rows_RE), device=rows_RE.device)
    return (F.cross_entropy(scores_RC, target_R) + F.cross_entropy(scores_RC.T, target_R)) / 2


def dense_ce_bf16(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> Tensor:
    scores_RC = (rows_RE * inv_t.to(rows_RE.dtype)) @ cols_CE.T
    target_R = torch.arange(len(rows_RE), device=rows_RE.device)
    return (F.cross_entropy(scores_RC, target_R) + F.cross_entropy(scores_RC.T, target_R)) / 2


def with_gradients(loss: Loss, inputs: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, ...]:
    value = loss(*inputs)
    return value.detach(), *torch.autograd.grad(value, inputs)


def check_parity(ours: Loss, theirs: Loss, size: int, dim: int, dtype: torch.dtype, device: torch.device) -> str:
    """Errors, in words. Raises RuntimeError where ours is not the reference's loss (fp64, same rounded embeddings)."""
    inputs = embeddings(size, dim, dtype, device)
    rows, cols, inv_t = (x.detach().double().requires_grad_() for x in inputs)
    exact = (rows, cols, inv_t)
    found, expected = with_gradients(ours, inputs), with_gradients(theirs, exact)
    error = abs(float(found[0]) - float(expected[0])) / abs(float(expected[0]))
    cosines = [
        float(F.cosine_similarity(a.double().flatten(), b.flatten(), dim=0))
        for a, b in zip(found[1:], expected[1:], strict=True)
    ]
    slope = abs(float(found[3]) / float(expected[3]) - 1)
    words = f"loss off by {error:.1e}, gradients' cosines {min(cosines):.7f}, temperature's gradient off by {slope:.1e}"
    most, least = MOST_ERROR[dtype]
    if not (error <= most and min(cosines) >= least and slope < 1e-2):
        raise RuntimeError(f"{size} x {size} {dtype}: {words}; allowed: {most}, {least}, 1e-2")
    return f"{dtype} at {size}: {words}"


def added_bytes(call: Callable[[], object], device: torch.device) -> int | None:
    """Peak of what a call allocates, its results included; None without a GPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    kept = call()
    torch.cuda.synchronize(device)
    del kept
    return torch.cuda.max_memory_allocated(device) - before


@dataclass(frozen=True)
class Way:
    dtype: torch.dtype
    name: str
    loss: Loss
    tf32: bool = False


@dataclass(frozen=True)
class Timed:
    seconds: float
    added: int | None  # bytes
    first_s: float  # of the first call: what is compiled, is compiled then


PEERS = (  # what the targets speak of comes first
    Way(torch.bfloat16, "dense", dense),
    Way(torch.float32, "dense fp32", dense),
    Way(torch.bfloat16, "dense CE", dense_ce),
    Way(torch.bfloat16, "dense CE bf16", dense_ce_bf16),
    Way(torch.float32, "dense fp32, tf32", dense, tf32=True),
)
TARGETS = {torch.bfloat16: "dense", torch.float32: "dense fp32"}


def timed(call: Callable[[], object], device: torch.device, left_s: float) -> Timed | str:
    """Or in words why not: the device's memory does not hold it, or the seconds left are too few for all calls."""
    try:
        marks = [time.monotonic()]
        call()
        synchronize(device)
        marks.append(time.monotonic())
        added = added_bytes(call, device)
        marks.append(time.monotonic())
        first_s, second_s = marks[1] - marks[0], marks[2] - marks[1]
        if first_s + 24 * second_s > left_s:
            return f"{second_s:.2f} s a call, {left_s:.0f} s were left"
        return Timed(seconds_of(call, device), added, first_s)
    except torch.OutOfMemoryError:
        return "does not fit into the device's memory"
    finally:
        if device.type == "cuda":
            torch.cuda.empty_cache()


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Tiled InfoNCE beside dense: time and memory of forward and backward. Lines are printed as they come."""
    began, device = time.monotonic(), bench_device()
    size, dim = (SIZE, DIM) if device.type == "cuda" and not tiny else TINY
    checked = min(size, CHECKED_SIZE)
    triton = choose_kernels("fused", device, torch.bfloat16, size, size).triton
    found = Findings(f"Symmetric InfoNCE, {size:,} x {size:,} x {dim}, forward and backward")

    def say(line: str) -> None:
        print(f"{time.monotonic() - began:5.1f} s  {line}", flush=True)

    def note(line: str) -> None:
        say(line)
        found.notes.append(line)

    least_s = limits.least_seconds(operations=3 * 2.0 * size * size * dim)
    times: dict[tuple[torch.dtype, str], Timed] = {}
    checked_ways = tiled(checked, device, triton), reference(checked, device)
    ours_name = "ours (Triton)" if triton else "ours"
    ours = [Way(dtype, ours_name, tiled(size, device, triton)) for dtype in TARGETS]
    for way in (ours[0], PEERS[0], ours[1], *PEERS[1:]):
        if way in ours:
            note(check_parity(*checked_ways, checked, dim, way.dtype, device))
        dtype_name = str(way.dtype).removeprefix("torch.")
        call = partial(with_gradients, way.loss, embeddings(size, dim, way.dtype, device))
        allowed, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, way.tf32
        result = timed(call, device, BUDGET_S - (time.monotonic() - began))
        torch.backends.cuda.matmul.allow_tf32 = allowed
        if isinstance(result, str):
            note(f"{dtype_name}, {way.name}: left out ({result})")
            continue
        say(f"{dtype_name}, {way.name}: {result.seconds * 1e3:.2f} ms (first call {result.first_s:.1f} s)")
        times[way.dtype, way.name] = result
        mine = times.get((way.dtype, ours_name))
        found.rows.append(
            {
                "embeddings": dtype_name,
                "way": way.name,
                "ms": result.seconds * 1e3,
                "ours / it": None if mine is None else mine.seconds / result.seconds,
                "adds MiB": None if result.added is None else result.added / 2**20,
                "it / ours, memory": None if mine is None or not result.added else result.added / (mine.added or 1),
                "of the limit": least_s / result.seconds,
                "first call s": result.first_s,
            }
        )
    found.rows.sort(key=lambda row: str(row["embeddings"]))
    for dtype, peer in TARGETS.items():
        mine, theirs = times.get((dtype, ours_name)), times.get((dtype, peer))
        name = str(dtype).removeprefix("torch.")
        both = None if mine is None or theirs is None else (mine, theirs)
        found.check(f"{name}: time beside {peer}", both and both[0].seconds / both[1].seconds, 0.8, "at most")
        share = both[0].added / both[1].added if both and both[0].added and both[1].added else None
        found.check(f"{name}: memory beside {peer}", share, 1 / 40, "at most")
    for small in [SMALL[0]] if size == TINY[0] else SMALL:
        if time.monotonic() - began > BUDGET_S:
            note(f"{small:,} and above, fp32: left out, {BUDGET_S:.0f} s are over")
            break
        note(crossing(small, dim, device, triton))
    return found


def crossing(size: int, dim: int, device: torch.device, triton: bool) -> str:
    """Ours beside the reference of losses/infonce.py, fp32, where losses/choice.py has to choose: in words."""
    inputs = embeddings(size, dim, torch.float32, device)
    ways = tiled(size, device, triton), reference(size, device)
    ours_s, theirs_s = (seconds_of(partial(with_gradients, way, inputs), device) for way in ways)
    return f"{size:,} x {size:,}, fp32: ours {ours_s * 1e3:.2f} ms, losses/infonce.py {theirs_s * 1e3:.2f} ms"


if __name__ == "__main__":
    sys.exit(run_alone(measure))
