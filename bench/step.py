"""The training step: ours beside the stock and the tuned recipe, on the same clips, at the published 7B's shapes.

    python bench/step.py [--tiny] [--json FILE]
    python bench/step.py --ours [--clips 16 256] [--cuda_graphs off]       our side alone

Ours is what bin/train.py does a step: log-mel, both towers with adapters and their dropout, both losses, backward,
clipping, AdamW. Peers: bench/peers.py, whose features are made before the clock starts. Every side runs in a process of
its own, one after the other, and a peer is timed only after loss and gradients have been found equal to ours.

Operations are counted, not measured: forward 2 N a token, backward 2 N (frozen weights have no gradient), N the
matrices of a tower's layers. Convolutions, attention scores, adapters, heads and losses are left out.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import math
import subprocess
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import torch

from bench.drawn import NUM_BATCHES
from bench.findings import Cell, Findings, number, run_alone
from bench.limits import Limits, bench_device, synchronize
from bench.ours import Shapes, Training, batches, build, time_steps

ROOT = Path(__file__).resolve().parent.parent
SIZES, TINY_SIZES = (16, 384, 128), (2, 4)  # what is compared comes first
# Clips a step; + with checkpointing. 32 is the most that the tuned one holds in 80 GB; with checkpointing it is slower
# (bench/peers.py tuned 64+).
PEER_SETTINGS = {"tuned": ["16", "32"], "stock": ["16+"]}
PEER_BUDGET_S = {"tuned": 24.0, "stock": 40.0}  # a setting: enough for 20 steps
# All sides together; each ends with what it has when its share is over.
WHOLE_S = 195.0
OURS_LIMIT_S = 90.0


def time_ours(tiny: bool, started: float, sizes: Sequence[int], cuda_graphs: str = "auto") -> None:
    """One JSON line for the build and one for each batch size. `started`: when the process was asked for."""
    device, shapes = bench_device(), Shapes.of(tiny)
    torch.manual_seed(0)
    training = Training(build(shapes, device), cuda_graphs=cuda_graphs)
    synchronize(device)
    print(json.dumps({"built_after_s": time.time() - started}), flush=True)
    for i, num_clips in enumerate(sizes):
        found: dict[str, Any] = {"clips": num_clips}
        try:
            fed = batches(shapes, device, num_clips, 2 if tiny else NUM_BATCHES)
            if i == 0:
                training.step(fed[0])
                synchronize(device)
                print(json.dumps({"first_step_after_s": time.time() - started}), flush=True)
            found |= asdict(time_steps(training, fed, 3 if tiny else 20))
        except torch.OutOfMemoryError:
            found["out_of_memory"] = True
        print(json.dumps(found), flush=True)
        fed = []
        training.release()


def run_side(command: list[str], limit_s: float) -> tuple[list[dict[str, Any]], str | None]:
    """The JSON lines that a program prints, and why it ended early, if it did: what it found until then counts."""
    started = time.perf_counter()
    lines, failure = [], None
    with tempfile.TemporaryFile("w+") as complaints:
        process = subprocess.Popen(
            [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=complaints, text=True
        )
        overdue = threading.Timer(limit_s, process.kill)
        overdue.start()
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("{"):
                print(line.rstrip(), flush=True)  # should the whole be stopped, this much is known
                lines.append(json.loads(line))
        process.wait()
        overdue.cancel()
        complaints.seek(0)
        if time.perf_counter() - started >= limit_s:
            failure = f"stopped after {time.perf_counter() - started:.0f} s"
        elif process.returncode:
            failure = (complaints.read().strip().splitlines() or [f"exit code {process.returncode}"])[-1]
    return lines, failure


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """The training step beside its peers, ours first."""
    return measure_sides(limits, tiny, TINY_SIZES if tiny else SIZES)


def measure_sides(
    limits: Limits, tiny: bool, sizes: Sequence[int], with_peers: bool = True, cuda_graphs: str = "auto"
) -> Findings:
    shapes, found = Shapes.of(tiny), Findings("training step, LoRA r 16 on q, k, v of both towers, one GPU")
    more = ["--tiny"] if tiny else []
    started = time.perf_counter()

    ends: list[str] = []

    def tell(side: str) -> None:
        ends.append(f"{side} done after {time.perf_counter() - started:.0f} s")
        print(ends[-1], flush=True)

    command = ["bench/step.py", "--side", str(time.time()), "--clips", *map(str, sizes), "--cuda_graphs", cuda_graphs]
    lines, failure = run_side([*command, *more], OURS_LIMIT_S if with_peers else WHOLE_S)
    tell("ours")
    if failure is not None:
        found.notes.append(f"ours ended early: {failure}")
    peers: list[dict[str, Any]] = []
    for kind, settings in PEER_SETTINGS.items() if with_peers else ():
        if tiny:
            settings = ["2"]
        command = ["bench/peers.py", kind, *settings, "--budget_s", str(1 if tiny else PEER_BUDGET_S[kind]), *more]
        theirs, failure = run_side(command, max(1.0, WHOLE_S - (time.perf_counter() - started)))
        tell(kind)
        parity = next((line["parity"] for line in theirs if "parity" in line), None)
        found.notes.append(f"parity with {kind}: {parity if failure is None or parity else failure}")
        if failure is not None:
            found.notes.append(f"{kind} ended early: {failure}")
        peers += [line for line in theirs if "clips" in line]
    facts: dict[str, Any] = {}
    for line in lines:
        facts |= line if "clips" not in line else {}
    ours = [line for line in lines if "clips" in line]
    compare(found, shapes, limits, ours, peers)
    first_s = facts.get("first_step_after_s")
    found.check("seconds from the start to the end of the first step", first_s, 90, "at most")
    captures, seconds = (sum(line.get(key, 0) for line in ours) for key in ("captures", "capture_s"))
    found.notes.append(
        f"built after {number(facts.get('built_after_s', math.nan))} s; CUDA graphs of {captures} size classes "
        f"captured in {seconds:.1f} s, before the timed steps"
    )
    found.notes.append(", ".join(ends))
    return found


def compare(
    found: Findings, shapes: Shapes, limits: Limits, ours: list[dict[str, Any]], peers: list[dict[str, Any]]
) -> None:
    """Rows and checks of what the sides printed."""
    smallest = min((line["clips"] for line in ours), default=0)
    rate = {(p["peer"], p["clips"]): p["clips_per_s"] for p in peers if "clips_per_s" in p}
    stock, tuned = (rate.get((kind, smallest)) for kind in ("stock", "tuned"))
    tuned_best = max((value for (kind, _), value in rate.items() if kind == "tuned"), default=None)
    best, best_share = None, None
    for line in peers:
        row: dict[str, Cell] = {"side": line["peer"] + (", checkpointing" if line["checkpointing"] else "")}
        row["clips"] = line["clips"]
        if "seconds" in line:
            row |= {"ms": line["seconds"] * 1e3, "clips/s": line["clips_per_s"], "GiB": line["peak_gib"]}
            row["steps"] = line["steps"]
        else:
            row["ms"] = "out of memory"
        found.rows.append(row)
    for line in ours:
        row = {"side": "ours", "clips": line["clips"]}
        if "seconds" not in line:
            found.rows.append(row | {"ms": "out of memory"})
            continue
        clips_per_s = line["clips"] / line["seconds"]
        flops = shapes.operations(line["audio_tokens"], line["text_tokens"]) / line["seconds"]
        share = flops / limits.matrix_flops
        if best is None or clips_per_s > best:
            best, best_share = clips_per_s, share
        row |= {
            "ms": line["seconds"] * 1e3, "clips/s": clips_per_s, "GiB": line["peak_gib"], "steps": line["steps"],
            "clips/s in a row": line["clips"] / line["seconds_in_a_row"],
            "x stock": _ratio(clips_per_s, rate.get(("stock", line["clips"]))),
            "x tuned": _ratio(clips_per_s, rate.get(("tuned", line["clips"]))),
            "x tuned's best": _ratio(clips_per_s, tuned_best),
            "TFLOP/s": flops / 1e12, "of the matrix rate": f"{share:.0%}", "graphs": line["captures"],
            "s of captures": line["capture_s"], "filled up": f"{line['waste']:.1%}",
        }  # fmt: skip
        found.rows.append(row)
    small = next((line["clips"] / line["seconds"] for line in ours if "seconds" in line), None)
    found.check(f"times stock at {smallest} clips", _ratio(small, stock), 45)
    found.check(f"times tuned at {smallest} clips", _ratio(small, tuned), 17)
    found.check("best batch, times tuned's best", _ratio(best, tuned_best), 26)
    found.check("best batch, share of the matrix rate", best_share, 0.55)


def _ratio(ours: float | None, theirs: float | None) -> float | None:
    return None if ours is None or theirs is None else ours / theirs


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The training step beside its peers.", add_help=False)
    parser.add_argument("--ours", action="store_true", help="our side alone")
    parser.add_argument("--clips", type=int, nargs="+", help="clips a step of our side")
    parser.add_argument("--cuda_graphs", choices=("auto", "on", "off"), default="auto")
    parser.add_argument("--side", type=float, help="internal: be the process of our side, asked for at this time")
    args, rest = parser.parse_known_args(argv)
    sizes = args.clips or (TINY_SIZES if "--tiny" in rest else SIZES)
    if args.side is not None:
        time_ours("--tiny" in rest, args.side, sizes, args.cuda_graphs)
        return 0
    return run_alone(lambda limits, tiny: measure_sides(limits, tiny, sizes, not args.ours, args.cuda_graphs), rest)


if __name__ == "__main__":
    sys.exit(main())
