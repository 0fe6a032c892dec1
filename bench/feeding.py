"""Does the GPU wait for data? Batches fed to the device alone, and beside the real training step.

    python bench/feeding.py --checkpoint random --num_clips 20000 --batch_size 256 --num_workers 4

Alone: every batch is copied to the device and waited for, nothing is computed; once as fast as batches come, once at
the pace of a step that takes --pace clips a second. Beside the step: bin/train.py under torchrun on the packed clips,
whose `data/wait_ms` of each step is read back; the first step of an epoch starts the loader anew and is left out.
Without --checkpoint only the first part is run, on whatever device there is.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import json
import math
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import tyro

from bench.clip_set import SPEECH, make_clips
from bench.ours import Shapes
from bench.training_run import measure
from bin.feed import feed, pinning
from data.clips import iterate_clips
from data.drops import DropLog
from data.loader import Loader
from data.packing import pack_clips
from data.settings import DataSettings
from data.shards import open_packed
from model.tokenizer import ByteTokenizer


@dataclass
class FeedBench:
    """How long the device waits for batches."""

    checkpoint: str | None = None
    """Model folder to train, or `random`: the published shapes, drawn on the device, with tokens of bytes. Without it
    only feeding is measured."""
    num_clips: int = 4000
    seconds: float = 2.0
    """Length of a clip."""
    batch_size: int = 256
    num_workers: int = 4
    steps: int = 60
    """Training steps."""
    pace: float = 2000.0
    """Clips a second that a device takes."""
    more: tuple[str, ...] = ()
    """Further flags of bin/train.py, as one string each: --more=--learn_temperature."""


def make_set(folder: Path, count: int, seconds: float, seed: int) -> Path:
    """A packed folder of `count` clips."""
    samples = make_clips(folder / f"loose-{seed}", count, seconds, seed=seed)
    drops = DropLog()
    pack_clips(iterate_clips(samples, DataSettings(), drops), folder / f"packed-{seed}", drops, num_workers=4)
    return folder / f"packed-{seed}"


def random_towers(folder: Path) -> list[str]:
    """Flags for towers of the published shapes with random weights."""
    named = Shapes.of().write(folder)
    return ["--audio_model", str(named.audio_model), "--text_model", str(named.text_model)]


def feed_alone(packed: Path, settings: FeedBench, device: torch.device, pace: float = math.inf) -> dict[str, float]:
    """Clips a second on the device with nothing computed, and the waits for batches, in ms. pace: clips a second, at
    most, that are asked for."""
    data = DataSettings(num_workers=settings.num_workers)
    loader = Loader(open_packed(packed), settings.batch_size, ByteTokenizer(), data, pin=pinning(device))
    count, total_s, waits_ms = 0, 0.0, []
    for epoch in range(4 if math.isinf(pace) else 2):
        batches = feed(loader, epoch, 0, device)
        next(batches)  # starts the epoch
        started = time.perf_counter()
        due, taken = started, 0
        while True:
            time.sleep(max(0.0, due - time.perf_counter()))
            asked = time.perf_counter()
            fed = next(batches, None)
            if fed is None:
                break
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            waits_ms.append((time.perf_counter() - asked) * 1e3)
            due, taken = due + fed.batch.num_clips / pace, taken + fed.batch.num_clips
        if epoch == 0:  # warms up
            waits_ms = []
        else:
            count, total_s = count + taken, total_s + time.perf_counter() - started
    loader.close()
    return {"clips_per_s": count / total_s, **shares(waits_ms)}


def shares(waits_ms: Sequence[float]) -> dict[str, float]:
    return {
        "median_ms": float(np.median(waits_ms)), "p99_ms": float(np.percentile(waits_ms, 99)), "most_ms": max(waits_ms)
    }  # fmt: skip


def waits(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Of a run's records, one a step: waits within epochs, and their share of the time."""
    steps = [record for record in records if "train/loss" in record]
    last = steps[-1]
    steps_per_epoch = max(1, round(last["step"] / last["epoch"]))
    within = [step for step in steps[1:] if (step["step"] - 1) % steps_per_epoch] or steps[1:] or steps
    wait_ms = [step["data/wait_ms"] for step in within]
    step_ms = [step["train/step_ms"] for step in within]
    clips_per_s = float(np.median([step["train/clips_per_s"] for step in within]))
    return {"steps": len(within), "clips_per_s": clips_per_s, **shares(wait_ms), "share": sum(wait_ms) / sum(step_ms)}


def graphs_of(record: dict[str, Any]) -> float:
    return record.get("train/num_graphs", 0.0)


def main(argv: Sequence[str] | None = None) -> None:
    settings = tyro.cli(FeedBench, args=argv, use_underscores=True, prog="bench/feeding.py")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    print(f"{name}, {settings.num_workers} workers, batches of {settings.batch_size} clips of {settings.seconds:g} s")
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        train = make_set(folder, settings.num_clips, settings.seconds, seed=0)
        found = feed_alone(train, settings, device)
        told = "{clips_per_s:,.0f} clips/s, wait {median_ms:.2f} ms, p99 {p99_ms:.2f} ms, at most {most_ms:.2f} ms"
        print("feeding alone: " + told.format(**found), flush=True)
        paced = feed_alone(train, settings, device, settings.pace)
        print(f"at the pace of {settings.pace:,.0f} clips/s: {told.format(**paced)}", flush=True)
        if settings.checkpoint is None:
            return
        test = make_set(folder, 64, settings.seconds, seed=1)
        flags = [
            *("--train_samples_path", str(train), "--test_samples_path", str(test), "--eval_every", "1000000"),
            *("--batch_size", str(settings.batch_size), "--num_workers", str(settings.num_workers)),
            *("--word_times_path", "None", *settings.more),
        ]
        if settings.checkpoint == "random":
            flags += random_towers(folder)
        run = measure(Path(settings.checkpoint), SPEECH.parent, settings.steps, folder / "runs", flags)
        lines = (Path(run["run_dir"]) / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        records = [json.loads(line) for line in lines]
        print(
            "beside training: {steps} steps of {clips_per_s:,.0f} clips/s; data/wait_ms {median_ms:.2f}, "
            "p99 {p99_ms:.2f}, at most {most_ms:.2f}; waiting is {share:.2%} of the time".format(**waits(records))
        )
        steps = [record for record in records if "train/loss" in record]
        longest = sorted(steps, key=lambda r: -r["data/wait_ms"])[:8]
        print("longest waits, at steps: " + ", ".join(f"{r['step']}: {r['data/wait_ms']:.1f} ms" for r in longest))
        captured = [r["step"] for r, p in zip(steps[1:], steps, strict=False) if graphs_of(r) > graphs_of(p)]
        print(f"steps that captured CUDA graphs: {captured}, {graphs_of(steps[-1]):.0f} size classes in all")


if __name__ == "__main__":
    main()
