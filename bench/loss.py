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
gradients included.

Shapes: R rows, C columns, E embedding.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

from collections.abc import Callable, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, seconds_of
from losses.choice import choose_kernels
from losses.infonce import multi_positive_infonce
from losses.pairs import Pairs, pair_mask
from losses.tiled import Match, contrast

SIZE, DIM, CHECKED_SIZE, TINY = 32_768, 512, 2048, (256, 64)
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


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Tiled InfoNCE beside dense: time and memory of forward and backward."""
    device = bench_device()
    size, dim = (SIZE, DIM) if device.type == "cuda" and not tiny else TINY
    checked = min(size, CHECKED_SIZE)
    triton = choose_kernels("fused", device, torch.bfloat16, size, size).triton
    found = Findings(f"Symmetric InfoNCE, {size:,} x {size:,} x {dim}, forward and backward")
    peers: dict[torch.dtype, dict[str, tuple[Loss, bool]]] = {
        torch.bfloat16: {
            "dense": (dense, False),
            "dense CE": (dense_ce, False),
            "dense CE bf16": (dense_ce_bf16, False),
        },
        torch.float32: {"dense fp32": (dense, False), "dense fp32, tf32": (dense, True)},
    }
    least_s = limits.least_seconds(operations=3 * 2.0 * size * size * dim)
    for dtype, ways in peers.items():
        found.notes.append(
            check_parity(tiled(checked, device, triton), reference(checked, device), checked, dim, dtype, device)
        )
        inputs = embeddings(size, dim, dtype, device)
        fused = tiled(size, device, triton)
        name = str(dtype).removeprefix("torch.")
        times, added = {}, {}
        allowed = torch.backends.cuda.matmul.allow_tf32
        for way, (loss, tf32) in {"ours": (fused, False), **ways}.items():
            torch.backends.cuda.matmul.allow_tf32 = tf32
            call = partial(with_gradients, loss, inputs)
            call()
            added[way] = added_bytes(call, device)
            times[way] = seconds_of(call, device)
        torch.backends.cuda.matmul.allow_tf32 = allowed
        for way, seconds in times.items():
            memory, ours_memory = added[way], added["ours"]
            found.rows.append(
                {
                    "embeddings": name,
                    "way": way + (" (Triton)" if triton and way == "ours" else ""),
                    "ms": seconds * 1e3,
                    "ours / it": times["ours"] / seconds,
                    "adds MiB": None if memory is None else memory / 2**20,
                    "it / ours, memory": None if memory is None or ours_memory is None else memory / ours_memory,
                    "of the limit": least_s / seconds,
                }
            )
        first = next(iter(ways))
        found.check(f"{name}: time beside {first}", times["ours"] / times[first], 0.8, "at most")
        memory, ours_memory = added[first], added["ours"]
        share = None if memory is None or ours_memory is None else ours_memory / memory
        found.check(f"{name}: memory beside {first}", share, 1 / 40, "at most")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    found.notes.append(crossing([SMALL[0]] if size == TINY[0] else SMALL, dim, device, triton))
    return found


def crossing(sizes: Sequence[int], dim: int, device: torch.device, triton: bool) -> str:
    """Ours beside the reference of losses/infonce.py, fp32, where losses/choice.py has to choose: in words."""
    parts = []
    for size in sizes:
        inputs = embeddings(size, dim, torch.float32, device)
        ways = tiled(size, device, triton), reference(size, device)
        ours_s, theirs_s = (seconds_of(partial(with_gradients, way, inputs), device) for way in ways)
        parts.append(f"{size:,}: {ours_s * 1e3:.2f} and {theirs_s * 1e3:.2f}")
    return "ms at small sizes, fp32, ours and losses/infonce.py: " + "; ".join(parts)


if __name__ == "__main__":
    sys.exit(run_alone(measure))
