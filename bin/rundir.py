"""The run directory as the loop uses it: which one, what goes into it, how a run goes on from it.

checkpoints/step-00000500/  a model folder + optim.safetensors state.json rng-rank*.safetensors [bank.safetensors]
model_best/ model_final/    model folders, and each as one file: model_best.pt, model_final.pt
"""

import json
import logging
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import ReduceLROnPlateau

from bin.config import Config, RunSettings
from bin.update import Update
from data.loader import Loader
from distributed.atomic import (
    json_bytes,
    read_tensors,
    save_single_file,
    write_folder_atomically,
    write_tensors,
)
from distributed.checkpoints import CheckpointStore
from distributed.collectives import broadcast_json, on_rank_0
from distributed.processes import World
from distributed.rundir import State, read_status, write_status
from distributed.training_state import pack_optimizer, pack_plateau, unpack_optimizer, unpack_plateau
from lora.adapter import KeyScheme
from losses.temperature import Temperature
from losses.terms import TermBank
from model.build import Built
from retrieval.metrics import EvalResult
from retrieval.model_files import load_trained, save_model, single_file_tensors

logger = logging.getLogger(__name__)

OPTIMIZER_FILE, STATE_FILE, BANK_FILE = "optim.safetensors", "state.json", "bank.safetensors"


@dataclass
class RunState:
    """How far a run is. Everything but weights, optimizer and random state that a resumed run must know."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    step_in_epoch: int = 0
    best_recall: float = -1.0
    best_step: int = 0
    stale_evaluations: int = 0  # in a row without a better Recall@10
    stopped_early: bool = False
    unmeasured: bool = False  # the evaluation at the end of an epoch is still to come
    before: EvalResult | None = None  # the test before training

    def is_over(self, total_steps: int, epochs: int) -> bool:
        """Whether nothing is left to do but the final test."""
        return not self.unmeasured and (self.stopped_early or self.step >= total_steps or self.epoch >= epochs)

    def to_json(self) -> dict[str, Any]:
        return {**vars(self), "before": None if self.before is None else self.before.to_json()}

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "RunState":
        before = saved["before"]
        return cls(**{**saved, "before": None if before is None else EvalResult.from_json(before)})


@dataclass
class Resumable:
    """What a checkpoint holds the state of."""

    config: Config
    built: Built
    temperature: Temperature
    update: Update
    named: list[tuple[str, nn.Parameter]]
    plateau: ReduceLROnPlateau
    loader: Loader


def choose_run_dir(run: RunSettings, world: World) -> Path:
    """The run's folder, the same on every rank: named, or the newest unfinished with --resume auto, or new by time."""
    name = run.run_name
    if name is None and world.is_main:
        name = _newest_unfinished(Path(run.runs_dir)) if run.resume == "auto" else None
        name = name or time.strftime("%Y%m%d_%H%M%S")
    return Path(run.runs_dir) / broadcast_json(name)


def _newest_unfinished(runs_dir: Path) -> str | None:
    unfinished = []
    for folder in runs_dir.glob("*/"):
        try:
            status = read_status(folder)
        except ValueError:
            status = None
        if status is not None and status["state"] != "finished" and (folder / "checkpoints").is_dir():
            unfinished.append((status["time"], folder.name))
    return max(unfinished)[1] if unfinished else None


def tell_status(run_dir: Path, name: State, state: RunState, message: str = "") -> None:
    """write_status that a full or vanished disk cannot stop: the run may still come to its end, or to its error."""
    try:
        write_status(run_dir, name, state.step, state.epoch, message)
    except OSError as error:
        logger.warning("status.json could not be written (%s); it should say %s: %s", error, name, message)


def save_checkpoint(store: CheckpointStore, run: Resumable, state: RunState, bank: TermBank | None) -> None:
    """A collective; see CheckpointStore.save for what it promises."""
    started = time.perf_counter()

    def write(folder: Path) -> None:
        save_model(folder, run.built, run.config.model, run.temperature.log_inv_temperature, {"step": state.step})
        tensors, hyper = pack_optimizer(run.update.optimizer, run.named, run.update.flat)
        write_tensors(folder / OPTIMIZER_FILE, tensors)
        if bank is not None:
            write_tensors(folder / BANK_FILE, {field.name: getattr(bank, field.name) for field in fields(bank)})
        saved = {
            "state": state.to_json(),
            "optimizer": hyper,
            "plateau": pack_plateau(run.plateau),
            "loader": run.loader.fingerprint,
        }
        (folder / STATE_FILE).write_bytes(json_bytes(saved))

    path = store.save(state.step, write)
    logger.info("checkpoint %s in %.1f s", path, time.perf_counter() - started)


def load_checkpoint(store: CheckpointStore, checkpoint: Path, run: Resumable) -> tuple[RunState, TermBank | None]:
    """Bring everything in `run`, and the random state, to where the checkpoint was taken.

    Raises ValueError when data, batch size, seed or model differ from the run's: it could not go on as it was.
    """
    saved = json.loads((checkpoint / STATE_FILE).read_bytes())
    if saved["loader"] != run.loader.fingerprint:
        raise ValueError(
            f"resume: training clips, seed, batch_size or windows differ from those of {checkpoint}; "
            "resume with the same, or start another --run_name"
        )
    log_inv_temperature = load_trained(checkpoint, run.built, run.config.model)
    with torch.no_grad():
        run.temperature.log_inv_temperature.copy_(log_inv_temperature)
    tensors = read_tensors(checkpoint / OPTIMIZER_FILE)
    unpack_optimizer(run.update.optimizer, run.named, tensors, saved["optimizer"], run.update.flat)
    unpack_plateau(run.plateau, saved["plateau"])
    run.plateau.optimizer.param_groups[0]["lr"] = saved["plateau"]["last_lr"][0]
    bank = None
    if (checkpoint / BANK_FILE).is_file():
        tensors = read_tensors(checkpoint / BANK_FILE)
        tensors["embeddings_KE"] = tensors["embeddings_KE"].to(run.built.model.device)
        bank = TermBank(**tensors)
    store.restore_rng(checkpoint)
    state = RunState.from_json(saved["state"])
    logger.info("resumed from %s: step %d, epoch %d", checkpoint, state.step, state.epoch)
    return state, bank


def save_trained(run_dir: Path, name: str, run: Resumable, state: RunState, metrics: dict[str, float]) -> None:
    """Replace <run>/<name>/ and <run>/<name>.pt by the model of this moment. A collective."""
    wanted = run.config.run.adapter_keys
    schemes: tuple[KeyScheme, ...] = ("v5", "v4") if wanted == "both" else (wanted,)
    info = {"step": state.step, "epoch": state.epoch, "metrics": metrics}

    def write() -> None:
        folder = run_dir / name
        write_folder_atomically(
            folder,
            lambda temporary: save_model(
                temporary, run.built, run.config.model, run.temperature.log_inv_temperature, info, schemes
            ),
        )
        tensors, settings = single_file_tensors(folder)
        save_single_file(run_dir / f"{name}.pt", tensors, settings)

    on_rank_0(write)
