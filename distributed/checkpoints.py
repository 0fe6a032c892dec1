"""Checkpoints of a run: saved by all ranks together, never half there, verified when read.

    checkpoints/step-00000500/   what the caller's `write` puts there (rank 0), rng-rank{r}.safetensors (each rank),
                                 MANIFEST.json (written last)

The run directory must be on a file system that all ranks share. Every decision is rank 0's and reaches all ranks, and a
failure on any rank is raised on all: no rank goes on alone.
"""

import errno
import logging
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from distributed.atomic import (
    damage,
    make_temporary_folder,
    read_tensors,
    remove_folder,
    remove_strays,
    replace_folder,
    seal_folder,
    settle_and_describe,
    write_tensors,
)
from distributed.collectives import broadcast_json, gather_json, on_rank_0, own_rank
from distributed.training_state import pack_rng, restore_rng

logger = logging.getLogger(__name__)

STEP_FOLDER = re.compile(r"step-(\d{8,})")


class CheckpointError(RuntimeError):
    """A checkpoint could not be written; those before it are untouched."""


class CheckpointStore:
    """The checkpoints in one folder. All methods are collective: every rank calls them together."""

    def __init__(self, root: Path, keep: int = 3) -> None:
        if keep < 1:
            raise ValueError(f"keep is {keep}; allowed: 1 or above")
        self.root = Path(root)
        self.keep = keep

    def prepare(self) -> None:
        """Make the folder and clear it of what killed attempts left. Call once at start, holding the run's lock."""

        def clean() -> None:
            self.root.mkdir(parents=True, exist_ok=True)
            for name in remove_strays(self.root):
                logger.info("removed %s, left by an attempt that was killed while it saved", self.root / name)

        on_rank_0(clean)

    def save(self, step: int, write: Callable[[Path], None]) -> Path:
        """Write checkpoint `step` and remove the oldest beyond `keep`. Returns its folder.

        write(folder): called on rank 0 alone with a temporary folder, so it must not use collectives. Each rank's
        random state is added. Raises CheckpointError on all ranks when any rank fails; the temporary folder is then
        gone and older checkpoints are intact.
        """
        path = self.root / f"step-{step:08d}"
        temporary = Path(on_rank_0(lambda: str(make_temporary_folder(path))))
        entries, failure = {}, None
        try:
            if own_rank() == 0:
                write(temporary)
            own_file = temporary / _rng_name()
            if not temporary.is_dir():
                raise FileNotFoundError(f"{temporary} is not there: do all machines share the run directory?")
            write_tensors(own_file, pack_rng())
            entries = {own_file.name: settle_and_describe(own_file)}
        except Exception as error:
            failure = error
        reports = gather_json({"entries": entries, "error": None if failure is None else _reason(failure)})
        error_by_rank = {r: report["error"] for r, report in enumerate(reports) if report["error"]}
        known = {name: entry for report in reports for name, entry in report["entries"].items()}

        error_at_end = None
        if own_rank() == 0:
            try:
                if not error_by_rank:
                    seal_folder(temporary, known, step=step)
                    replace_folder(temporary, path)
            except Exception as error:
                failure, error_at_end = error, _reason(error)
            if error_by_rank or error_at_end:
                shutil.rmtree(temporary, ignore_errors=True)
        error_at_end = broadcast_json(error_at_end)
        if error_at_end:
            error_by_rank[0] = error_at_end
        if error_by_rank:
            rank, reason = min(error_by_rank.items())
            raise CheckpointError(
                f"checkpoint of step {step} was not saved to {self.root}: rank {rank}: {reason}. "
                "Older checkpoints are untouched"
            ) from failure
        if own_rank() == 0:
            self._prune(step)
        return path

    def latest_good(self) -> Path | None:
        """The newest checkpoint that matches its manifest byte by byte, the same on all ranks; None when there is none.

        Each damaged one that is passed over is named in a warning on rank 0.
        """
        chosen = on_rank_0(self._find_latest_good)
        return None if chosen is None else Path(chosen)

    def restore_rng(self, checkpoint: Path) -> bool:
        """Set this rank's random state. False, with a warning, when more ranks run now than wrote the checkpoint."""
        file = checkpoint / _rng_name()
        if not file.exists():
            logger.warning("%s has no random state of rank %d: the number of ranks has grown", checkpoint, own_rank())
            return False
        restore_rng(read_tensors(file))
        return True

    def steps(self) -> list[int]:
        """Steps on disk, good or not, ascending. Not collective."""
        found = [STEP_FOLDER.fullmatch(item.name) for item in self.root.glob("step-*")]
        return sorted(int(match[1]) for match in found if match)

    def _find_latest_good(self) -> str | None:
        steps = self.steps()
        for step in reversed(steps):
            path = self.root / f"step-{step:08d}"
            reason = damage(path)
            if reason is None:
                if step != steps[-1]:
                    logger.warning("falling back to checkpoint %s", path)
                return str(path)
            logger.warning("checkpoint %s is damaged and passed over: %s", path, reason)
        return None

    def _prune(self, newest: int) -> None:
        """Keep the last few up to the one just written. Later ones are of a line that was left: never touched."""
        for step in [s for s in self.steps() if s <= newest][: -self.keep]:
            path = self.root / f"step-{step:08d}"
            try:
                remove_folder(path)
            except OSError as error:
                logger.warning("old checkpoint %s could not be removed: %s", path, error)


def _rng_name() -> str:
    return f"rng-rank{own_rank()}.safetensors"


def _reason(error: Exception) -> str:
    if getattr(error, "errno", None) == errno.ENOSPC or "No space left" in str(error):
        return f"the disk is full ({error}); free some space or point the run directory at a larger disk"
    return f"{type(error).__name__}: {error}"
