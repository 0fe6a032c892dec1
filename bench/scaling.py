"""Clips a second of the training step over several GPUs of one host, beside torch's DistributedDataParallel.

    python bench/scaling.py [--ranks 1 2 4 8] [--clips 16 256] [--tiny] [--json FILE]

The batch grows with the ranks: each has `--clips`, dealt by length as the loader deals them, and negatives come from
all. torchrun starts bench/scaling_rank.py for one number of ranks after the other, each with a time limit. Before any
timing, gradients are compared, and what some steps train: those of N ranks with one rank's of the same batch, both in
bf16 with one rank's in fp32, DDP's with ours. Where there are several GPUs, NCCL joins one rank a GPU at the published
7B's shapes; with EARMARK_RANKS_PER_GPU=4 in the environment so many on each GPU, which then tells what comes out and
not how fast. Elsewhere gloo joins processes on the CPU at tiny shapes, which share its cores: then speed is told
against cores, and no target holds.

Columns: `of linear` clips/s over ranks times those of one rank. `in collectives` time of the rank that waits least (the
transfer) and most (and for others). `MB sent` by a rank in rings, embeddings and gradients; `of formula` the same over
    (N - 1) (2 clips + terms) E (bytes on the wire + bytes of the gradient back) + 2 (N - 1) / N gradients
where clips and terms are the largest rank's.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from bench.findings import Cell, Findings, run_alone
from bench.limits import Limits
from bench.step import run_side
from distributed.processes import ranks_per_gpu

RANKS, TINY_RANKS = (1, 2, 4, 8), (1, 2)
CLIPS, CPU_CLIPS = (16, 256), (4,)
"""Of each rank. 16: the default batch of 128 over 8 GPUs, where communication weighs most; 256: a GPU that is full."""
LIMIT_S = 150.0
"""Of all processes of one number of ranks."""
LEAST_EFFICIENCY, MOST_DIFFERENCE, LEAST_COSINE = 0.97, 1e-6, 0.9999


def launch(ranks: int, clips: Sequence[int], device: str, tiny: bool, kept: Path) -> list[dict[str, Any]]:
    """What rank 0 printed; a last line with `error` when it failed or was stopped."""
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", "bench/scaling_rank.py"]
    options = ["--device", device, "--kept", str(kept), "--clips", *map(str, clips), *["--tiny"] * tiny]
    lines, failure = run_side([*command, *options], LIMIT_S)
    if failure is not None and not any("error" in line for line in lines):
        lines.append({"error": failure})
    return [line | {"ranks": ranks} for line in lines]


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """The training step on one GPU and on all."""
    ranks = TINY_RANKS if tiny else (1, max(2, torch.cuda.device_count()))
    return measure_ranks(limits, tiny, ranks, CPU_CLIPS if tiny else CLIPS)


def measure_ranks(limits: Limits, tiny: bool, ranks: Sequence[int], clips: Sequence[int]) -> Findings:
    num_places = places()
    device = "cuda" if num_places > 1 else "cpu"
    found = Findings(f"training step over ranks, negatives from all: {_where(device)}")
    wanted = sorted({1, *ranks})
    if device == "cuda":
        found.notes += [f"{n} ranks left out: {_where(device)}" for n in wanted if n > num_places]
        wanted = [n for n in wanted if n <= num_places]
    lines: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for n in wanted:
            lines += launch(n, clips, device, tiny or device == "cpu", Path(folder))
    tabulate(found, lines, device, os.cpu_count() or 1, ranks_per_gpu() > 1)
    return found


def places() -> int:
    """How many ranks there is a GPU for, or a share of one."""
    return torch.cuda.device_count() * ranks_per_gpu()


def tabulate(
    found: Findings, lines: list[dict[str, Any]], device: str, num_cores: int, shares_gpus: bool = False
) -> None:
    """Rows and checks of what the ranks printed."""
    rates = {(x["side"], x["clips"], x["ranks"]): x["clips"] * x["ranks"] / x["seconds"] for x in lines if "side" in x}
    sizes = sorted({clips for _, clips, _ in rates})
    most_ranks = max((ranks for *_, ranks in rates), default=0)
    linear: dict[tuple[str, int, int], float] = {}
    for line in (x for x in lines if "side" in x):
        side, clips, ranks = key = (line["side"], line["clips"], line["ranks"])
        workers = ranks if device == "cuda" else min(ranks, num_cores)
        # DDP with one rank is the plain step: ours without graphs.
        alone = rates.get((side, clips, 1)) or rates.get(("ours, no graphs", clips, 1)) or rates.get(("ours", clips, 1))
        row: dict[str, Cell] = {"ranks": ranks, "side": side, "clips of all": clips * ranks}
        row |= {"ms": line["seconds"] * 1e3, "clips/s": rates[key]}
        if alone is not None and ranks > 1 and not shares_gpus:
            linear[key] = rates[key] / (workers * alone)
            row["of linear" if device == "cuda" else "of its cores"] = linear[key]
        if ranks > 1:
            if side != "DDP":  # whose all-reduces run beside the backward pass, out of sight
                least, most = (line[name] / line["recorded_s"] for name in ("least_s", "most_s"))
                row["in collectives"] = f"{least:.1%} to {most:.1%}"
            row |= {"MB sent": line["sent"] / 1e6, "kB of ids": line["ids_sent"] / 1e3}
            if line.get("expected"):
                row["of formula"] = line["sent"] / line["expected"]
        if device == "cuda":
            row["GiB"] = line["peak_gib"]
        if rates.get(("DDP", clips, ranks)) and side != "DDP" and not shares_gpus:
            row["x DDP"] = rates[key] / rates["DDP", clips, ranks]
        found.rows.append(row)
    checked = [x for x in lines if "check" in x and x["ranks"] > 1]
    bf16_alone = [x for x in lines if x.get("ranks") == 1 and str(x.get("check")).endswith(("in fp32", "passes"))]
    for line in bf16_alone + checked:
        found.notes.append(
            f"{line['check']}, {line['ranks']} ranks: {line['difference']:.1e} of the norm apart, within a tensor "
            f"{line['within_a_tensor']:.1e}, temperature {line['temperature']:.1e}, cosine 1 - {1 - line['cosine']:.1e}"
        )
    found.notes += [f"{line['ranks']} ranks ended early: {line['error']}" for line in lines if "error" in line]

    # Not judged: DDP, which the ranks themselves refuse to be timed beside; the way of a few steps, in which Adam makes
    # whole steps of gradients that are little more than rounding; the distance to fp32, which tells how much of the
    # distance to one rank is bf16's own, and which differs between batches and cuts by a factor of two.
    judged = [x for x in checked if not x["check"].endswith(("DDP", "way", "fp32"))]
    small = max((x["difference"] for x in judged if x["check"].startswith("fp32")), default=None)
    found.check("N ranks and one, gradients and after steps, fp32", small, MOST_DIFFERENCE, "at most")
    if device == "cpu" or shares_gpus:
        found.notes.append(
            f"processes that share {'GPUs' if shares_gpus else f'{num_cores} cores at tiny shapes'}: their speed is no "
            "figure of merit"
        )
    if device == "cpu":
        return
    cosine = min((x["cosine"] for x in judged if x["check"].startswith("bf16")), default=None)
    found.check("cosine of N ranks and one, gradients and after steps, bf16", cosine, LEAST_COSINE)
    for clips in [] if shares_gpus else sizes:
        efficiency = linear.get(("ours", clips, most_ranks))
        found.check(f"of linear, {most_ranks} GPUs, {clips} clips each", efficiency, LEAST_EFFICIENCY)


def _where(device: str) -> str:
    if device == "cpu":
        return "gloo, processes on the CPU"
    return f"NCCL, {torch.cuda.device_count()} GPUs" + (f" for {places()} ranks" if ranks_per_gpu() > 1 else "")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The training step at several numbers of ranks.", add_help=False)
    parser.add_argument("--ranks", type=int, nargs="+", help="numbers of ranks; one is always measured, first")
    parser.add_argument("--clips", type=int, nargs="+", help="clips of each rank")
    args, rest = parser.parse_known_args(argv)
    tiny, on_cpu = "--tiny" in rest, places() < 2
    ranks, clips = args.ranks or (TINY_RANKS if tiny else RANKS), args.clips or (CPU_CLIPS if on_cpu else CLIPS)
    if on_cpu and not tiny:
        rest.append("--tiny")  # the shapes that run there; large products, for the limits, would take minutes
    return run_alone(lambda limits, tiny: measure_ranks(limits, tiny, ranks, clips), rest)


if __name__ == "__main__":
    sys.exit(main())
