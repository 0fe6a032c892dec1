"""Does fp8 train as bf16 does? Adapters on frozen towers, on the repository's own sample of speech.

    python bench/fp8_task.py [--tiny] [--json FILE]

Small towers are first trained whole (the quickstart preset) and exported; then bin/train.py trains adapters on them,
frozen: in bf16 with several seeds, which draw adapters, dropout and the order of clips, and in fp8 with the first. A
curve is the mean loss of each STRETCH steps. Noise is the mean distance of the other seeds' curves to the first's; fp8's
curve, of the same seed and so the same clips, is to be no further off. Without fp8 on the chip, bf16 is run again.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import subprocess
import tempfile
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device
from bench.training_run import ROOT, measure as measure_run
from model.fp8 import why_no_fp8

SAMPLE = ROOT / "samples" / "telephony"
BASE_STEPS, TASK_STEPS, STRETCH = 100, 100, 10
SEEDS = (0, 1, 2)


def curve(losses: Sequence[float], stretch: int) -> np.ndarray:
    """Means of stretches; a last, shorter one is left out."""
    whole = len(losses) // stretch * stretch
    return np.asarray(losses[:whole]).reshape(-1, stretch).mean(axis=1)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def compare(found: Findings, runs: dict[str, dict[str, Any]], stretch: int) -> None:
    """Rows and the check. runs: bf16's first seed, its other seeds, then fp8."""
    curves = {name: curve(run["loss"], stretch) for name, run in runs.items()}
    first, *others, ours = curves
    for name, run in runs.items():
        found.rows.append({
            "run": name, **{f"loss to {(i + 1) * stretch}": float(v) for i, v in enumerate(curves[name])},
            "off the first": distance(curves[name], curves[first]), "recall@10": run["after"].get("recall@10"),
            "clips/s": run["all_steps"]["clips_per_s_median"],
        })  # fmt: skip
    noise = float(np.mean([distance(curves[name], curves[first]) for name in others]))
    found.check("curve off bf16's, of the seeds' noise", distance(curves[ours], curves[first]) / noise, 1.0, "at most")


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Curves of a small real task in bf16 and in fp8."""
    device = bench_device()
    has_fp8 = why_no_fp8(device, torch.bfloat16) is None
    storage = "bf16" if device.type == "cuda" else "fp32"
    base_steps, task_steps, stretch = (2, 4, 2) if tiny else (BASE_STEPS, TASK_STEPS, STRETCH)
    found = Findings(f"adapters on frozen small towers, {task_steps} steps on the sample of speech")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        flags = [
            *("--preset", "quickstart", "--data_root", str(ROOT), "--device", device.type, "--num_workers", "2"),
            *("--eval_every", "1000000", "--save_every", "1000000"),
        ]
        base = measure_run(folder, SAMPLE, base_steps, folder / "base", flags)
        command = [
            str(ROOT / "bin" / "export.py"),
            base["run_dir"],
            "--to",
            "merged",
            "--output",
            str(folder / "towers"),
        ]
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"export of the towers: {done.stderr.strip()[-600:]}")
        flags += ["--trainable", "lora", "--lr_schedule", "constant"]
        for side in ("audio", "text"):
            flags += [f"--{side}_model", str(folder / "towers" / f"{side}_tower")]
        runs: dict[str, dict[str, Any]] = {}
        for seed in SEEDS[:2] if tiny else SEEDS:
            more = [*flags, "--base_dtype", storage, "--seed", str(seed)]
            runs[f"{storage}, seed {seed}"] = measure_run(folder, SAMPLE, task_steps, folder / f"seed{seed}", more)
        more = [*flags, "--base_dtype", "fp8" if has_fp8 else storage, "--seed", str(SEEDS[0])]
        name = "fp8, seed 0" if has_fp8 else f"{storage} again, for want of fp8"
        runs[name] = measure_run(folder, SAMPLE, task_steps, folder / "fp8", more)
    compare(found, runs, stretch)
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
