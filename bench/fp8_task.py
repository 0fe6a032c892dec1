"""Does fp8 train as bf16 does? Adapters on frozen towers, on the repository's own sample of speech.

    python bench/fp8_task.py [--tiny] [--json FILE]

Small towers are first trained whole, by bin/train.py with the quickstart preset, and exported. Then adapters and new
heads learn the sample on these towers, frozen: in bf16 with several seeds, which draw the order of clips, adapters and
dropout, and in fp8 with the first of them. A curve is the mean loss of each STRETCH steps. Noise is the mean distance
of the other seeds' curves to the first's; fp8's curve, of the same seed and clips, is to be no further off.

On a CPU it is fp32 against the same e4m3 numbers multiplied in fp32 (model/fp8.py), which no setting allows in a run.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import itertools
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence

import numpy as np
import torch

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device
from bench.ours import Training
from bench.training_run import ROOT
from bench.training_run import measure as measure_run
from bin.config import Config, parse
from bin.datasets import Datasets, load_datasets
from bin.feed import FedBatch, feed, pinning
from data.loader import Loader
from distributed.processes import World
from lora.inject import inject_lora
from model.build import build_model
from model.fp8 import quantise_frozen, why_no_fp8

SAMPLE = ROOT / "samples" / "telephony"
PRESET = ("--preset", "quickstart", "--data_root", str(ROOT))
BASE_STEPS, TASK_STEPS, STRETCH = 100, 60, 10
SEEDS = (0, 1, 2)


def make_towers(folder: Path, steps: int, device: torch.device) -> list[str]:
    """Flags that name two towers which have learnt the sample for so many steps."""
    flags = [*PRESET, "--device", device.type, "--eval_every", "1000000", "--save_every", "1000000"]
    run = measure_run(folder, SAMPLE, steps, folder / "base", flags)
    command = [str(ROOT / "bin" / "export.py"), run["run_dir"], "--to", "merged", "--output", str(folder / "towers")]
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"export of the towers: {done.stderr.strip()[-600:]}")
    return [
        word for side in ("audio", "text") for word in (f"--{side}_model", str(folder / "towers" / f"{side}_tower"))
    ]


def batches_of(data: Datasets, loader: Loader, device: torch.device) -> Iterator[FedBatch]:
    """Of one epoch after the other."""
    for epoch in itertools.count():
        yield from feed(loader, epoch, 0, device)


def losses(config: Config, data: Datasets, seed: int, steps: int, device: torch.device) -> list[float]:
    """Of each step."""
    torch.manual_seed(seed)
    emulates = config.model.base_dtype == "fp8" and device.type == "cpu"
    if emulates:
        config.model.base_dtype = "fp32"
    built = build_model(config.model, device)
    inject_lora(built.model, config.lora)
    if emulates:
        quantise_frozen(built.model)
    training = Training(built)
    built.model.train()
    for group in training.update.optimizer.param_groups:
        group["lr"] = config.train.lr
    loader = Loader(
        data.train, config.train.batch_size, built.tokenizer, config.data, seed=seed, glossary=data.glossary,
        windows=data.windows, reader=data.reader, pin=pinning(device),
    )  # fmt: skip
    found = training.curve(itertools.islice(batches_of(data, loader, device), steps))
    loader.close()
    return found


def curve(losses: Sequence[float], stretch: int) -> np.ndarray:
    """Means of stretches; a last, shorter one is left out."""
    whole = len(losses) // stretch * stretch
    return np.asarray(losses[:whole]).reshape(-1, stretch).mean(axis=1)


def distance(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one - other).mean())


def compare(found: Findings, runs: dict[str, list[float]], stretch: int) -> None:
    """Rows and the check. runs: losses of the first seed, of the others, then of fp8."""
    curves = {name: curve(run, stretch) for name, run in runs.items()}
    first, *others, ours = curves
    for name, values in curves.items():
        found.rows.append({
            "run": name, **{f"to {(i + 1) * stretch}": float(value) for i, value in enumerate(values)},
            "off the first": distance(values, curves[first]),
        })  # fmt: skip
    noise = float(np.mean([distance(curves[name], curves[first]) for name in others]))
    found.check("curve off bf16's, of the seeds' noise", distance(curves[ours], curves[first]) / noise, 1.0, "at most")


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Curves of a small real task in bf16 and in fp8."""
    device = bench_device()
    reason = why_no_fp8(device, torch.bfloat16)
    if device.type == "cuda" and reason is not None:
        raise RuntimeError(f"fp8 {reason}")
    storage, emulated = ("bf16", "") if device.type == "cuda" else ("fp32", " numbers in fp32 products")
    base_steps, steps, stretch = (2, 4, 2) if tiny else (BASE_STEPS, TASK_STEPS, STRETCH)
    found = Findings(f"loss of adapters on frozen small towers, {steps} steps on the sample of speech, {device.type}")
    runs: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as temporary:
        flags = [*PRESET, *make_towers(Path(temporary), base_steps, device), "--trainable", "lora"]
        data = load_datasets(parse(flags).data, World(0, 1, 0, device, "none", 0), None)
        seeds = SEEDS[:2] if tiny else SEEDS
        for kind, seed in [*((storage, seed) for seed in seeds), ("fp8", seeds[0])]:
            started = time.perf_counter()
            name = f"{kind}{emulated if kind == 'fp8' else ''}, seed {seed}"
            runs[name] = losses(parse([*flags, "--base_dtype", kind]), data, seed, steps, device)
            print(f"{name}: {time.perf_counter() - started:.0f} s", flush=True)
    compare(found, runs, stretch)
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
