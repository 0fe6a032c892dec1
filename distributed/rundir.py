"""A run directory's lock and its status file."""

import errno
import fcntl
import json
import logging
import os
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, get_args

from distributed.atomic import json_bytes, write_file_atomically
from distributed.collectives import on_rank_0

logger = logging.getLogger(__name__)

State = Literal["starting", "training", "evaluating", "preempted", "finished", "failed"]

LOCK_FILE = ".lock"
STATUS_FILE = "status.json"


class RunLock:
    """Keeps a second job out of a run directory for as long as this object, or the process of rank 0, lives.

    Collective. It is an flock on an open file: the system releases it even after a kill -9, so no lock goes stale.
    Raises ValueError on all ranks (RuntimeError beyond rank 0) when another process holds it, or when the folder cannot
    be written.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = Path(run_dir) / LOCK_FILE
        self._descriptor: int | None = None
        on_rank_0(self._acquire)

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)  # the file stays: removing it would let two jobs lock two files of one name
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.release()

    def _acquire(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            if error.errno not in (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.ENOTDIR):
                raise
            raise ValueError(
                f"run directory {self.path.parent} cannot be written ({error.strerror}); give another --runs_dir"
            ) from None
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(descriptor, 200).decode(errors="replace").strip()
            os.close(descriptor)
            raise ValueError(
                f"run directory {self.path.parent} is in use by {holder or 'another process'}; "
                "wait for that job, stop it, or give this one another run directory"
            ) from None
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                os.close(descriptor)
                raise
            logger.warning("%s cannot be locked on this file system (%s): start only one job there", self.path, error)
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {_now()}\n".encode(), 0)
        self._descriptor = descriptor


def write_status(run_dir: Path, state: State, step: int, epoch: int, message: str = "") -> None:
    """Replace status.json. For rank 0. What ended a run is read here, as torchrun's exit code does not tell."""
    if state not in get_args(State):
        raise ValueError(f"state is {state!r}; allowed: {', '.join(get_args(State))}")
    status = {"state": state, "step": step, "epoch": epoch, "time": _now(), "message": message}
    write_file_atomically(Path(run_dir) / STATUS_FILE, json_bytes(status))


def read_status(run_dir: Path) -> dict[str, Any] | None:
    """What `write_status` wrote last; None when there is none."""
    try:
        return json.loads((Path(run_dir) / STATUS_FILE).read_bytes())
    except FileNotFoundError:
        return None


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
