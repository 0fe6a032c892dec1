"""Where the numbers of a run go: metrics.jsonl, TensorBoard, Weights & Biases. Rank 0 writes, the others do nothing.

    metrics.jsonl   every dict of slash-keyed numbers, with step, epoch and time
    tb/             the same as scalars; settings as text and, with the result, as hparams; missed test clips as audio
                    and the glossary's embeddings for the projector
    W&B             the numbers and the settings, under an id that stays with the run directory

A sink that fails (a full disk, a server out of reach) is dropped with one warning: training goes on.
"""

import json
import logging
import math
import os
import secrets
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from bin.config import Config, to_toml
from data.audio import SAMPLE_RATE, AudioError
from data.reader import AudioReader
from distributed.atomic import json_bytes, write_file_atomically
from retrieval.measured import Miss

logger = logging.getLogger(__name__)

WANDB_ID_FILE = "wandb_run.json"
MAX_PROJECTED = 5000  # terms; the projector's page becomes slow beyond that


class Tracker:
    """Made on every rank; only the one with a run directory writes."""

    def __init__(self, run_dir: Path | None, config: Config, steps_per_epoch: int, resumed_step: int = 0) -> None:
        """resumed_step: what an earlier attempt wrote beyond this step will be done again, and is taken out. 0: all."""
        self.settings, self.steps_per_epoch, self.step = to_toml(config), steps_per_epoch, resumed_step
        self._file: Any = None
        self._board: Any = None
        self._wandb: Any = None
        self._run_dir = run_dir
        if run_dir is None:
            return
        path = run_dir / "metrics.jsonl"
        if path.exists():
            lines = [line for line in path.read_text(encoding="utf-8").splitlines() if _is_kept(line, resumed_step)]
            write_file_atomically(path, "".join(f"{line}\n" for line in lines).encode())
        self._file = path.open("a", encoding="utf-8")
        if config.run.tensorboard:
            try:
                from torch.utils.tensorboard import SummaryWriter
            except ImportError:
                raise ValueError(
                    "tensorboard: the tensorboard package is missing; pip install tensorboard, or --no-tensorboard"
                ) from None
            self._board = SummaryWriter(str(run_dir / "tb"), purge_step=resumed_step + 1 if resumed_step else 0)
            rows = [f"| {g} | {k} | {v} |" for g, table in self.settings.items() for k, v in table.items()]
            text = "\n".join(["| group | setting | value |", "|---|---|---|", *rows])
            self._guarded("TensorBoard", lambda: self._board.add_text("settings", text, resumed_step))
        if config.run.wandb or os.environ.get("WANDB_API_KEY"):
            self._start_wandb(config, run_dir)

    def write(self, numbers: Mapping[str, float], step: int) -> None:
        """NaN and infinities become null in the file: strict JSON knows neither."""
        if self._run_dir is None:
            return
        self.step = step
        record: dict[str, float | None] = {"step": step, "epoch": round(step / self.steps_per_epoch, 4)}
        record |= {"time": round(time.time(), 3)}
        record |= {k: (v if math.isfinite(v) else None) for k, v in numbers.items()}

        def append() -> None:
            self._file.write(json.dumps(record, allow_nan=False) + "\n")
            self._file.flush()

        def add_scalars() -> None:
            for key, value in numbers.items():
                self._board.add_scalar(key, value, step)

        self._guarded("metrics.jsonl", append)
        self._guarded("TensorBoard", add_scalars)
        self._guarded("W&B", lambda: self._wandb.log(dict(numbers), step=step))

    def show_misses(self, misses: Iterable[Miss], reader: AudioReader) -> None:
        """Test clips with a right term that others were ranked before, to listen to and to read."""

        def add() -> None:
            for i, miss in enumerate(misses):
                clip = miss.clip
                try:
                    pcm_S = reader.read(clip.audio_path, clip.start_s, clip.end_s)
                except AudioError as error:
                    logger.warning("missed clip %s cannot be shown: %s", clip.clip_id, error)
                    continue
                found = ", ".join(term for term, _, _ in miss.found)
                said = f"said: {clip.text}  \nmissed: {miss.term}, at rank {miss.rank}  \ntop terms: {found}"
                wave_S = np.asarray(pcm_S, dtype=np.float32) / 32768.0
                self._board.add_audio(f"misses/{i}", wave_S[None], self.step, SAMPLE_RATE)
                self._board.add_text(f"misses/{i}", said, self.step)

        self._guarded("TensorBoard", add)

    def show_terms(self, term_NE: Tensor, terms: Sequence[str]) -> None:
        """The glossary in TensorBoard's projector; term_NE: [N, E]."""

        def add() -> None:
            shown = min(len(terms), MAX_PROJECTED)
            labels = [" ".join(term.split()) for term in terms[:shown]]  # one line a term
            self._board.add_embedding(term_NE[:shown].cpu(), metadata=labels, tag="terms", global_step=self.step)

        self._guarded("TensorBoard", add)

    def show_result(self, result: Mapping[str, float]) -> None:
        """The settings with the final numbers, for TensorBoard's table of hyperparameters."""
        flat = {f"{g}.{k}": v for g, table in self.settings.items() for k, v in table.items()}
        plain = {k: v if isinstance(v, bool | int | float | str) else str(v) for k, v in flat.items()}
        numbers = {f"hparam/{k}": v for k, v in result.items() if math.isfinite(v)}
        self._guarded("TensorBoard", lambda: self._board.add_hparams(plain, numbers, run_name="."))

    def close(self) -> None:
        """Also on an error path: events that are still queued would be lost."""
        self._guarded("metrics.jsonl", lambda: self._file.close())
        self._guarded("TensorBoard", lambda: self._board.close())
        self._guarded("W&B", lambda: self._wandb.finish())
        self._file = self._board = self._wandb = None

    def _guarded(self, name: str, action: Callable[[], None]) -> None:
        """Run the action unless its sink is not in use; a failure drops the sink."""
        slot = {"metrics.jsonl": "_file", "TensorBoard": "_board", "W&B": "_wandb"}[name]
        if getattr(self, slot) is None:
            return
        try:
            action()
        except Exception as error:  # whatever a tracking library raises, training is worth more
            logger.warning("%s cannot be written (%s: %s); going on without it", name, type(error).__name__, error)
            setattr(self, slot, None)

    def _start_wandb(self, config: Config, run_dir: Path) -> None:
        try:
            import wandb
        except ImportError:
            if config.run.wandb:
                raise ValueError(
                    "wandb: the wandb package is missing; pip install wandb, or leave --wandb out"
                ) from None
            logger.warning("WANDB_API_KEY is set, but the wandb package is missing: pip install wandb")
            return
        id_file = run_dir / WANDB_ID_FILE
        if not id_file.exists():
            write_file_atomically(id_file, json_bytes({"id": secrets.token_hex(4)}))
        has_login = bool(os.environ.get("WANDB_API_KEY") or wandb.api.api_key)
        mode: Any = os.environ.get("WANDB_MODE") or ("online" if has_login else "offline")
        if mode == "offline":
            logger.warning("W&B is offline: later, wandb sync %s", run_dir / "wandb" / "offline-run-*")

        def begin() -> None:
            self._wandb = wandb.init(
                project=config.run.wandb_project,
                name=run_dir.name,
                id=json.loads(id_file.read_bytes())["id"],
                resume="allow",
                mode=mode,
                dir=str(run_dir),
                config=self.settings,
            )

        self._wandb = wandb  # so that a failure to begin is guarded too
        self._guarded("W&B", begin)


def _is_kept(line: str, resumed_step: int) -> bool:
    """Whether a line is whole (a killed process may leave half of one) and not beyond the step."""
    try:
        return resumed_step > 0 and bool(json.loads(line)["step"] <= resumed_step)
    except (ValueError, KeyError, TypeError):
        return False
