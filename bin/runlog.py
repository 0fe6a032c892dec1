"""What a run tells: log file, console lines, metrics.jsonl, TensorBoard, W&B, progress bar.

One dict of slash-keyed numbers (`train/loss`, `data/wait_ms`, `eval/recall@10`) goes to all of them at once, from rank
0. Other ranks only log warnings, to standard error.
"""

import json
import logging
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from data.clips import Clip
from distributed.atomic import write_file_atomically
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
        handler.setFormatter(logging.Formatter(f"[rank {rank}] %(levelname)s %(message)s"))
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
        shown.setFormatter(logging.Formatter("%(mark)s%(message)s"))
    else:
        shown = logging.StreamHandler(sys.stdout)
        shown.setFormatter(logging.Formatter("%(asctime)s %(mark)s%(message)s", "%H:%M:%S"))
    shown.addFilter(_mark)
    root.addHandler(shown)
    if log_path is not None:
        log_path.parent.mkdir(parents=True, exist_ok=True)
        to_file = logging.FileHandler(log_path, encoding="utf-8")
        to_file.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
        root.addHandler(to_file)


def _mark(record: logging.LogRecord) -> bool:
    """Lets the console, where levels are not shown, say WARNING or ERROR in front of the message."""
    record.mark = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
    return True


class MetricsWriter:
    """Appends each dict of numbers, with step, epoch and time, to metrics.jsonl, TensorBoard and W&B."""

    def __init__(
        self,
        run_dir: Path,
        tensorboard: bool = True,
        wandb_project: str | None = None,
        settings: dict[str, Any] | None = None,
        resumed_step: int = 0,
    ) -> None:
        """resumed_step: what an earlier attempt wrote beyond this step will be done again, and is taken out. 0: all."""
        self.path = run_dir / "metrics.jsonl"
        if self.path.exists():
            lines = [
                line for line in self.path.read_text(encoding="utf-8").splitlines() if _is_kept(line, resumed_step)
            ]
            write_file_atomically(self.path, "".join(f"{line}\n" for line in lines).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._board = self._wandb = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._board = SummaryWriter(str(run_dir / "tb"), purge_step=resumed_step + 1 if resumed_step else 0)
        if wandb_project:
            try:
                import wandb
            except ImportError:
                raise ValueError(
                    "wandb_project: the wandb package is missing; pip install wandb, then wandb login"
                ) from None
            self._wandb = wandb.init(
                project=wandb_project, name=run_dir.name, id=run_dir.name, resume="allow", config=settings
            )

    def write(self, numbers: Mapping[str, float], step: int, epoch: float) -> None:
        """NaN and infinities become null in the file: strict JSON knows neither."""
        record: dict[str, float | None] = {"step": step, "epoch": round(epoch, 4), "time": round(time.time(), 3)}
        record |= {k: (v if math.isfinite(v) else None) for k, v in numbers.items()}
        self._file.write(json.dumps(record, allow_nan=False) + "\n")
        self._file.flush()
        if self._board is not None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(dict(numbers), step=step)

    def close(self) -> None:
        self._file.close()
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


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
        """Clips a second of all ranks, milliseconds a step and milliseconds a step of waiting."""
        seconds, steps = time.perf_counter() - self._started, max(1, self.num_steps)
        return {
            "train/clips_per_s": self.num_clips / seconds,
            "train/step_ms": seconds / steps * 1e3,
            "data/wait_ms": self._waited_s / steps * 1e3,
        }


def _is_kept(line: str, resumed_step: int) -> bool:
    """Whether a line is whole (a killed process may leave half of one) and not beyond the step."""
    try:
        return resumed_step > 0 and bool(json.loads(line)["step"] <= resumed_step)
    except (ValueError, KeyError, TypeError):
        return False


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
    import torch
    import transformers

    root = Path(__file__).resolve().parent.parent
    found: dict[str, Any] = {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "cuda": torch.version.cuda,
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.processor() or "cpu",
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
