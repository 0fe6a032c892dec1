"""What a run tells people: log file, console lines, progress bar, closing tables. (Its numbers: bin/tracking.py.)

Rank 0 speaks; other ranks only log warnings, to standard error.
"""

import logging
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from bin.redaction import RedactingFormatter
from data.clips import Clip
from distributed.collectives import num_ranks
from retrieval.evaluate import recall_table
from retrieval.metrics import EvalResult

logger = logging.getLogger("earmark")
console = Console(stderr=False, highlight=False, soft_wrap=True)


def configure_logging(rank: int, log_path: Path | None) -> None:
    """Rank 0: INFO to console and file; the others: warnings to standard error, with their rank."""
    root = logging.getLogger()
    root.handlers.clear()
    root.setLevel(logging.INFO if rank == 0 else logging.WARNING)
    for noisy in ("transformers", "huggingface_hub", "torch", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if rank != 0:
        handler: logging.Handler = logging.StreamHandler()
        handler.setFormatter(RedactingFormatter(f"[rank {rank}] %(levelname)s %(message)s"))
        root.addHandler(handler)
        return
    if console.is_terminal:
        shown: logging.Handler = RichHandler(
            console=console,
            show_path=False,
            show_level=False,
            markup=False,
            log_time_format="%H:%M:%S",
            omit_repeated_times=False,
        )
        shown.setFormatter(RedactingFormatter("%(mark)s%(message)s"))
    else:
        shown = logging.StreamHandler(sys.stdout)
        shown.setFormatter(RedactingFormatter("%(asctime)s %(mark)s%(message)s", "%H:%M:%S"))
    shown.addFilter(_mark)
    root.addHandler(shown)
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        to_file = LogFile(log_path, encoding="utf-8")
        to_file.setFormatter(RedactingFormatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        root.addHandler(to_file)


class LogFile(logging.FileHandler):
    """A log file whose disk may fill up or vanish: the run then goes on with the console alone, and says so once."""

    def handleError(self, record: logging.LogRecord) -> None:
        logging.getLogger().removeHandler(self)
        logger.warning("log file %s cannot be written (%s); going on without it", self.baseFilename, sys.exc_info()[1])

    def close(self) -> None:
        try:
            super().close()
        except OSError:  # what could not be written has been told above
            self.stream = None  # type: ignore[assignment]


def _mark(record: logging.LogRecord) -> bool:
    """Lets the console, where levels are not shown, say WARNING or ERROR in front of the message."""
    record.mark = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
    return True


class Interval:
    """Counts clips, steps and the time spent waiting for data since it was made."""

    def __init__(self) -> None:
        self.num_clips = 0  # of all ranks
        self.num_steps = 0
        self._started = time.perf_counter()
        self._waited_s = 0.0

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Time the enclosed lines as waiting for a batch."""
        asked = time.perf_counter()
        yield
        self._waited_s += time.perf_counter() - asked

    def numbers(self) -> dict[str, float]:
        """Clips a second of all ranks, milliseconds a step and milliseconds a step of waiting; peak GPU memory."""
        seconds, steps = time.perf_counter() - self._started, max(1, self.num_steps)
        peak = {"gpu/peak_gib": torch.cuda.max_memory_allocated() / 2**30} if torch.cuda.is_initialized() else {}
        return peak | {
            "train/clips_per_s": self.num_clips / seconds,
            "train/step_ms": seconds / steps * 1e3,
            "data/wait_ms": self._waited_s / steps * 1e3,
        }


def progress_bar(enabled: bool) -> Progress:
    """A bar with clips, rate and time left; nothing at all when the output is no terminal."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("steps"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
        disable=not (enabled and console.is_terminal),
        transient=True,
    )


def show_recall(before: EvalResult | None, after: EvalResult, run_dir: Path) -> None:
    """The closing table, and where everything lies."""
    header, rows = recall_table(before or after, after)
    table = Table(title="Recall, before -> after training" if before else "Recall", title_justify="left")
    for i, name in enumerate(header):
        table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    places = {
        "model": str(run_dir / "model_best"),
        "one file": str(run_dir / "model_best.pt"),
        "log": str(max(run_dir.glob("train_*.log"), default=run_dir)),
        "metrics": str(run_dir / "metrics.jsonl"),
    }
    if (run_dir / "tb").is_dir():
        places["TensorBoard"] = f"tensorboard --logdir {run_dir / 'tb'}"
    for name, place in places.items():
        console.print(f"{name:12s}{place}", markup=False)


def show_examples(examples: list[tuple[Clip, list[str]]]) -> None:
    """A few test clips, what was said, and the top terms; those that are right in bold with a star."""
    table = Table(title="Some test clips", title_justify="left")
    for name in ("said", "terms in it", "top terms"):
        table.add_column(name, overflow="fold")
    for clip, found in examples:
        # Text, not markup: terms may hold brackets and backslashes.
        marked = [Text(f"{term}*", "bold") if term in clip.terms else Text(term) for term in found]
        table.add_row(Text(clip.text), Text(", ".join(clip.terms) or "(none)"), Text(", ").join(marked))
    console.print(table)


def environment(device: str) -> dict[str, Any]:
    """Versions, device and git revision for env.json; no variables that could hold a secret."""
    import transformers

    root = Path(__file__).resolve().parent.parent
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
        "world_size": num_ranks(),
        "cpu_count": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "argv": sys.argv,
        "git_revision": _git(root, "rev-parse", "HEAD"),
        "git_dirty": None,
    }
    if found["git_revision"]:
        found["git_dirty"] = bool(_git(root, "status", "--porcelain", "--untracked-files=no"))
    return found


def _git(root: Path, *args: str) -> str | None:
    try:
        done = subprocess.run(["git", "-C", str(root), *args], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
