"""The two read-outs, mean and maxsim, trained alike over several seeds and measured on held-out clips.

    python bench/readout.py --epochs 12                                  the repository's sample
    python bench/readout.py --folder FOLDER --epochs 20 --device cuda --parallel 6

FOLDER holds samples.jsonl, manifest.jsonl (id, audio, duration_s, speaker) and words.jsonl (id, words) beside its
audio; a chunk's stretch of its clip is in extended_start_time and extended_end_time. Clips are split by recording, or
by speaker: no clip, and with `--split speaker` no voice cluster, is on both sides.

Everything but the read-out is the same: towers from nothing, data, batches, steps, seeds. Windows are given in frames
of the small tower, 20 ms, so that they last as long as 2 to 24 frames of Qwen2-Audio's, 40 ms.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import hashlib
import json
import os
import shlex
import statistics
import subprocess
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import tyro

from data.records import iterate_records

ROOT = Path(__file__).resolve().parent.parent
READOUTS = ("mean", "maxsim")
KS = (1, 5, 10)


@dataclass
class BenchSettings:
    """Compare the read-outs."""

    folder: str | None = None
    """A data set of term chunks as above; by default the repository's sample."""
    split: Literal["clip", "speaker"] = "clip"
    """What no two sides of the split share (the sample has its own split)."""
    test_share: float = 0.15
    """Share of the chunks that are held out."""
    seeds: int = 3
    """Runs of each read-out."""
    epochs: int = 12
    """Passes over the training chunks."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Where to train."""
    parallel: int = 1
    """Runs at a time."""
    maxsim_windows: tuple[int, ...] = (4, 8, 16, 24, 32, 48)
    """Windows of maxsim, in 20 ms frames."""
    maxsim_stride: int = 4
    """Stride of maxsim, in 20 ms frames."""
    output: str | None = None
    """Also write the figures of all runs to this JSON file."""
    flags: str = ""
    """Further flags of bin/train.py, for both read-outs alike: --flags="--batch_size 64"."""


def main(argv: Sequence[str] | None = None) -> int:
    settings = tyro.cli(BenchSettings, args=argv, use_underscores=True, prog="bench/readout.py")
    with tempfile.TemporaryDirectory(prefix="readout-") as scratch:
        common = ["--preset", "quickstart", "--device", settings.device, "--epochs", str(settings.epochs)]
        if settings.folder is not None:
            common += split_data(Path(settings.folder), Path(scratch), settings.split, settings.test_share)
        jobs = [(readout, seed) for seed in range(settings.seeds) for readout in READOUTS]
        started = time.perf_counter()
        with ThreadPoolExecutor(settings.parallel) as pool:
            runs = list(pool.map(lambda job: train(job[0], job[1], common, Path(scratch), settings), jobs))
        seconds = time.perf_counter() - started
    data = "telephony" if settings.folder is None else f"{Path(settings.folder).name}, split by {settings.split}"
    print(f"\n{data}: {settings.epochs} epochs, {settings.device}, {len(runs)} runs in {seconds:.0f} s")
    print(table(runs))
    if settings.output is not None:
        Path(settings.output).write_text(json.dumps({"settings": vars(settings), "runs": runs}, indent=1) + "\n")
    return 0


def train(readout: str, seed: int, common: list[str], scratch: Path, settings: BenchSettings) -> dict[str, Any]:
    """One run in a process of its own; its test figures. Raises RuntimeError with the end of its output."""
    name = f"{readout}-{seed}"
    command = [sys.executable, str(ROOT / "bin" / "train.py"), *common, *shlex.split(settings.flags)]
    command += ["--readout", readout, "--seed", str(seed), "--run_name", name, "--runs_dir", str(scratch / "runs")]
    command += ["--no-tensorboard", "--show_examples", "0", "--check_cache_path", str(scratch / f"{name}.checks")]
    if readout == "maxsim":
        command += ["--maxsim_windows", *map(str, settings.maxsim_windows)]
        command += ["--maxsim_stride", str(settings.maxsim_stride)]
    threads = str(max(1, (os.cpu_count() or 1) // settings.parallel))
    started = time.perf_counter()
    done = subprocess.run(
        command, env={**os.environ, "OMP_NUM_THREADS": threads}, capture_output=True, text=True, check=False
    )
    if done.returncode != 0:
        raise RuntimeError(f"{name} failed:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
    lines = [record for _, record in iterate_records(scratch / "runs" / name / "metrics.jsonl")]
    last = next(line for line in reversed(lines) if "test/num_clips" in line)
    figures = {key.removeprefix("test/"): value for key, value in last.items() if key.startswith("test/")}
    steps = [line["train/step_ms"] for line in lines if "train/step_ms" in line]
    run = {"readout": readout, "seed": seed, "seconds": time.perf_counter() - started, **figures}
    run["step_ms"] = statistics.median(steps)
    shown = "  ".join(f"R@{k} {run[f'recall@{k}']:.3f}" for k in KS)
    print(f"{name}: {shown}  {run['seconds']:.0f} s", flush=True)
    return run


def table(runs: list[dict[str, Any]]) -> str:
    """Mean and sample standard deviation over the seeds, for all, seen and unseen terms."""
    lines = [f"{'terms':8s}{'read-out':10s}" + "".join(f"{f'Recall@{k}':>18s}" for k in KS) + f"{'step':>10s}"]
    for suffix, label in (("", "all"), ("_seen", "seen"), ("_unseen", "unseen")):
        for readout in READOUTS:
            own = [run for run in runs if run["readout"] == readout and f"recall@1{suffix}" in run]
            if not own:
                continue
            cells = "".join(f"{spread([run[f'recall@{k}{suffix}'] for run in own]):>18s}" for k in KS)
            step = f"{statistics.mean(run['step_ms'] for run in own):7.0f} ms" if not suffix else ""
            lines.append(f"{label:8s}{readout:10s}{cells}{step:>10s}")
    return "\n".join(lines)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.3f}{deviation}"


# ---------------------------------------------------------------------------------------------------------- data


def split_data(folder: Path, scratch: Path, by: str, test_share: float) -> list[str]:
    """Writes train.jsonl, test.jsonl, words.jsonl of the training clips and glossary.json; the flags that name them."""
    recordings = {record["id"]: record for _, record in iterate_records(folder / "manifest.jsonl")}
    chunks = [as_chunk(record) for _, record in iterate_records(folder / "samples.jsonl")]
    owner = {record["audio"]: record["speaker"] if by == "speaker" else name for name, record in recordings.items()}
    held_out = choose_owners([owner[chunk["term_chunk_audio"]] for chunk in chunks], test_share)
    sides: dict[bool, list[dict[str, Any]]] = {False: [], True: []}
    for chunk in chunks:
        sides[owner[chunk["term_chunk_audio"]] in held_out].append(chunk)
    words = [
        {**record, "audio": recordings[record["id"]]["audio"], "duration_s": recordings[record["id"]]["duration_s"]}
        for _, record in iterate_records(folder / "words.jsonl")
        if owner[recordings[record["id"]]["audio"]] not in held_out
    ]
    terms = sorted({term for chunk in chunks for term in chunk["term_chunk_audio_ground_truth_terms"]})
    for name, records in (("train", sides[False]), ("test", sides[True]), ("words", words)):
        (scratch / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (scratch / "glossary.json").write_text(json.dumps(terms))
    print(f"{len(sides[False])} chunks to train on, {len(sides[True])} held out, {len(terms)} terms", flush=True)
    return [
        *("--train_samples_path", str(scratch / "train.jsonl"), "--test_samples_path", str(scratch / "test.jsonl")),
        *("--glossary_path", str(scratch / "glossary.json"), "--word_times_path", str(scratch / "words.jsonl")),
        *("--audio_root", str(folder)),
    ]


def as_chunk(record: dict[str, Any]) -> dict[str, Any]:
    """With the stretch of the clip under the names that say so: by themselves the extended times would count from the
    start of an utterance that is not at hand."""
    start_s, end_s = record["extended_start_time"], record["extended_end_time"]
    return {**record, "term_chunk_audio_start": start_s, "term_chunk_audio_end": end_s}


def choose_owners(owners: list[str], test_share: float) -> set[str]:
    """Recordings or speakers, in an order that only their names decide, until they own `test_share` of the chunks."""
    held_out: set[str] = set()
    num_held = 0
    for owner in sorted(set(owners), key=lambda name: hashlib.sha256(name.encode()).digest()):
        num_own = owners.count(owner)
        if owner != "unknown" and num_held + num_own <= test_share * len(owners):
            held_out.add(owner)
            num_held += num_own
    return held_out


if __name__ == "__main__":
    sys.exit(main())
