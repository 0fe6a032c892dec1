"""What a launcher must know before it starts processes: are the settings valid, is the data there, where is the run.

    python bin/preflight.py --processes 8 [--check_data] -- FLAG ...       flags of bin/train.py

Prints one JSON object: run_dir, resume, steps and clips as far as known. A fault is one line that names the remedy, and
exit code 2. With --check_data all samples are read and all audio headers checked, as the run would (which finds them in
the cache then); without, only the files must be there. Nothing is written, no model is loaded, no GPU is used.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import logging
import shutil
import time
from typing import Any

import torch

from bin.config import Config, parse
from bin.datasets import load_datasets
from bin.ending import tell_error
from bin.rundir import choose_run_dir
from data.records import find_file
from distributed.processes import World, ranks_per_gpu

GIB = 2**30
# Three checkpoints of adapters (r = 16) with optimizer state, the best and the final model twice, logs: about 2 GiB.
NEEDED_DISK_GIB = 4.0
# What one process takes on the host before any data: the CUDA and torch libraries, tokenizer, loader.
NEEDED_HOST_GIB = 2.0
FILE_FLAGS = ("train_samples_path", "test_samples_path", "dev_samples_path", "glossary_path", "word_times_path")


def check_files(config: Config) -> None:
    """Every file of samples and terms must be there. Raises ValueError naming the flag."""
    for flag in FILE_FLAGS:
        path = getattr(config.data, flag)
        if path is not None:
            find_file(path, config.data.data_root, f"--{flag}")


def check_devices(config: Config, processes: int) -> None:
    """A GPU for each process here, or a share of one where that is wished, seen by torch and not only by the driver.
    Raises ValueError with the remedy."""
    if config.distributed.device == "cpu":
        return
    if not torch.cuda.is_available():
        if torch.version.cuda is None:
            why = f"this torch {torch.__version__} is a CPU build; install one with CUDA (launch/setup.sh does)"
        else:
            why = f"torch {torch.__version__} wants CUDA {torch.version.cuda}: a newer driver, or a visible GPU"
        raise ValueError(f"device: torch finds no GPU: {why}; --device cpu trains without")
    if torch.cuda.device_count() * ranks_per_gpu() < processes:
        raise ValueError(
            f"processes: {processes} were asked for, but torch sees {torch.cuda.device_count()} GPUs; set GPUS="
        )


def check_room(config: Config, processes: int) -> None:
    """Disk for the run and memory for its processes. Raises ValueError with what there is and what is needed."""
    place = Path(config.run.runs_dir).absolute()
    while not place.exists():
        place = place.parent
    free_gib = shutil.disk_usage(place).free / GIB
    if free_gib < NEEDED_DISK_GIB:
        raise ValueError(
            f"runs_dir: {place} has {free_gib:.1f} GiB free, a run needs about {NEEDED_DISK_GIB:.0f}; "
            "free some, or set --runs_dir to another disk"
        )
    available_gib = host_memory_gib()
    needed_gib = processes * NEEDED_HOST_GIB
    if available_gib is not None and available_gib < needed_gib and config.distributed.device != "cpu":
        raise ValueError(
            f"memory: {available_gib:.1f} GiB of host memory are available, {processes} processes need about "
            f"{needed_gib:.0f}; stop other programs, or start fewer processes (GPUS=)"
        )


def host_memory_gib() -> float | None:
    """Memory that programs may still take, in GiB; None where the system does not tell."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = {line.split(":")[0]: line.split()[1] for line in lines if ":" in line}
    return float(found["MemAvailable"]) * 1024 / GIB if "MemAvailable" in found else None


def count_steps(config: Config) -> dict[str, Any]:
    """Read the data as a run would, and count. Raises ValueError for what the run would refuse."""
    alone = World(0, 1, 0, torch.device("cpu"), "none", 0)
    found = load_datasets(config.data, alone, None)
    num_clips = len(found.train) + (
        0 if found.windows is None else round(config.data.window_fraction * len(found.train))
    )
    steps = config.train.epochs * max(1, num_clips // config.train.batch_size)
    steps = min(steps, config.train.max_steps or steps)
    return {
        "train_clips": len(found.train),
        "clips_per_epoch": num_clips,
        "test_clips": len(found.test),
        "terms": len(found.terms),
        "most_steps": steps,
        "most_clips": steps * config.train.batch_size,
        "dropped": found.drops.summary(),
    }


def preflight(flags: list[str], processes: int, check_data: bool) -> dict[str, Any]:
    """All checks. Returns what a launcher needs; raises ValueError for the first fault."""
    config = parse(flags)
    check_files(config)
    check_devices(config, processes)
    check_room(config, processes)
    if config.train.batch_size < processes * config.train.grad_accum_steps:
        raise ValueError(
            f"batch_size: got {config.train.batch_size} for {processes} processes with grad_accum_steps "
            f"{config.train.grad_accum_steps}; allowed: one clip or more a process and micro-batch"
        )
    run_dir = choose_run_dir(config.run, World(0, 1, 0, torch.device("cpu"), "none", 0))
    plan: dict[str, Any] = {
        "run_dir": str(run_dir),
        "run_name": run_dir.name,
        "resume": config.run.resume,
        "batch_size": config.train.batch_size,
        "epochs": config.train.epochs,
        "device": config.distributed.device,
    }
    return plan | (count_steps(config) if check_data else {})


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    own, flags = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    parser = argparse.ArgumentParser(prog="bin/preflight.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--processes", type=int, default=1, help="processes on this machine")
    parser.add_argument("--check_data", action="store_true", help="read all samples and audio headers, and count")
    given = parser.parse_args(own)
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    started = time.perf_counter()
    try:
        plan = preflight(flags, given.processes, given.check_data)
    except ValueError as error:
        return tell_error("preflight", error)
    print(json.dumps(plan | {"seconds": round(time.perf_counter() - started, 2)}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
