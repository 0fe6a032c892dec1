"""One training run, started as a user starts it, and what its run directory and log tell of it.

`bin/train.py` runs in a process of its own under torchrun, with its default settings: only data, length and place are
given, and early stopping is off, since a recall that does not rise would end a short run. What is read back comes from
metrics.jsonl (one record a step with --log_every 1), the log and the file sizes.
"""

import json
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
OUT_OF_MEMORY = "OutOfMemoryError"
SHOWN_LINES = 40


def train_command(
    checkpoint: Path, clips: Path, steps: int, runs_dir: Path, run_name: str, more: Sequence[str]
) -> list[str]:
    """The command line; `more` are further flags of bin/train.py, which win over those set here."""
    return [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"),
        str(ROOT / "bin" / "train.py"),
        *("--model_name", str(checkpoint)),
        *("--train_samples_path", str(clips / "train.json"), "--test_samples_path", str(clips / "test.json")),
        *("--glossary_path", str(clips / "glossary.json")),
        *("--max_steps", str(steps), "--epochs", str(steps), "--patience", "0", "--log_every", "1"),
        *("--runs_dir", str(runs_dir), "--run_name", run_name),
        *more,
    ]


def measure(checkpoint: Path, clips: Path, steps: int, runs_dir: Path, more: Sequence[str] = ()) -> dict[str, Any]:
    """Train as is; out of GPU memory, once more with --checkpointing. RuntimeError with the console's end for any other
    failure."""
    runs_dir.mkdir(parents=True, exist_ok=True)
    attempts: list[dict[str, Any]] = []
    for extra in ([], ["--checkpointing"]):
        run_name = f"{time.strftime('%Y%m%d_%H%M%S')}{'_checkpointing' if extra else ''}"
        command = train_command(checkpoint, clips, steps, runs_dir, run_name, [*more, *extra])
        console = runs_dir / f"{run_name}.console.txt"
        launched, started = time.time(), time.perf_counter()
        with console.open("w", encoding="utf-8") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, check=False)
        printed = console.read_text(encoding="utf-8", errors="replace")
        attempt: dict[str, Any] = {
            "flags": command[command.index("--model_name") :],
            "exit_code": done.returncode,
            "out_of_memory": done.returncode != 0 and OUT_OF_MEMORY in printed,
            "seconds": time.perf_counter() - started,
        }
        attempts.append(attempt)
        if done.returncode == 0:
            # Of the largest process ever waited for, in KiB; pages of the mapped checkpoint count too.
            host_peak_gib = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 2**20
            return {
                "attempts": attempts,
                "checkpointing": "--checkpointing" in attempt["flags"],
                "seconds": attempt["seconds"],
                "host_peak_gib": host_peak_gib,
                **read_run(runs_dir / run_name, launched),
            }
        if not attempt["out_of_memory"] or "--checkpointing" in more:
            break
    # torchrun's own account of the death comes last and says nothing of the cause.
    own = printed.split("torch.distributed.elastic.multiprocessing.errors.ChildFailedError")[0]
    told = [line for line in own.splitlines() if "/torch/distributed/" not in line]
    tail = "\n".join(told[-SHOWN_LINES:])
    raise RuntimeError(f"training ended with exit code {done.returncode}; the end of {console}:\n{tail}")


def read_run(run_dir: Path, launched: float) -> dict[str, Any]:
    """Figures of a finished run. `launched`: when its process was started, in seconds since the epoch."""
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    steps = [record for record in records if "train/loss" in record]
    if not steps:
        raise ValueError(f"{run_dir / 'metrics.jsonl'}: no training step in it")
    steps_per_epoch = round(steps[-1]["step"] / steps[-1]["epoch"])  # the last: epochs are rounded to 4 places
    log = "\n".join(path.read_text(encoding="utf-8") for path in sorted(run_dir.glob("train_*.log")))
    return {
        "run_dir": str(run_dir),
        "steps": len(steps),
        "steps_per_epoch": steps_per_epoch,
        "first_step_after_s": steps[0]["time"] - launched,
        **_model_line(log),
        "checkpoint_s": _median(float(found) for found in re.findall(r"checkpoint \S+ in ([\d.]+) s", log)),
        "first_step_ms": steps[0]["train/step_ms"],
        "all_steps": _rates(steps[1:] or steps),
        # The first step of an epoch also embeds the glossary anew and starts the loader: with a sample of a few hundred
        # clips that is every third step, with a true data set one in thousands.
        "steps_within_epochs": _rates([s for s in steps if (s["step"] - 1) % steps_per_epoch] or steps[1:] or steps),
        "peak_gib": max((record["gpu/peak_gib"] for record in steps if "gpu/peak_gib" in record), default=None),
        "loss": [record["train/loss"] for record in steps],
        "grad_norm": [record["train/grad_norm"] for record in steps],
        "skipped_steps": steps[-1]["train/skipped_steps"],
        "before": _last_with(records, "before/"),
        "after": _last_with(records, "test/"),
        "mb_on_disk": sizes_mb(run_dir),
    }


def sizes_mb(folder: Path) -> dict[str, float]:
    """MB of each entry of the folder, and of all together."""
    sizes = {
        entry.name: sum(path.stat().st_size for path in (entry, *entry.rglob("*")) if path.is_file()) / 1e6
        for entry in sorted(folder.iterdir())
    }
    return {"total": sum(sizes.values()), **sizes}


def _rates(steps: Sequence[dict[str, Any]]) -> dict[str, float]:
    step_ms = [record["train/step_ms"] for record in steps]
    return {
        "num": len(steps),
        "step_ms_median": float(np.median(step_ms)),
        "step_ms_p90": float(np.percentile(step_ms, 90)),
        "clips_per_s_median": float(np.median([record["train/clips_per_s"] for record in steps])),
        "wait_ms_median": float(np.median([record["data/wait_ms"] for record in steps])),
        "wait_ms_p90": float(np.percentile([record["data/wait_ms"] for record in steps], 90)),
    }


def _model_line(log: str) -> dict[str, float | None]:
    found = re.search(r"model ready in ([\d.]+) s: ([\d.]+) M parameters train, of ([\d.]+) M", log)
    names = ("model_ready_s", "trainable_m", "parameters_m")
    return dict(zip(names, map(float, found.groups()) if found else (None, None, None), strict=True))


def _last_with(records: Sequence[dict[str, Any]], prefix: str) -> dict[str, float]:
    """Numbers of the last evaluation whose keys start with the prefix, without it."""
    for record in reversed(records):
        numbers = {key.removeprefix(prefix): value for key, value in record.items() if key.startswith(prefix)}
        if numbers:
            return numbers
    return {}


def _median(values: Iterable[float]) -> float | None:
    values = list(values)
    return statistics.median(values) if values else None
