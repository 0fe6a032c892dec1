"""All checks that need several processes, in few launches."""

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from distributed.rundir import read_status

HERE = Path(__file__).resolve().parent


def _names(module: str, kind: str) -> list[str]:
    """`module:function` of its checks: those that every rank runs, or those that fork their own ranks."""
    sys.path.insert(0, str(HERE))
    try:
        loaded = __import__(module)
    finally:
        sys.path.remove(str(HERE))
    found = []
    for name, function in vars(loaded).items():
        if inspect.isfunction(function) and function.__module__ == module and not name.startswith("_"):
            own_ranks = getattr(function, "forks_itself", False)
            in_ranks = list(inspect.signature(function).parameters) == ["world", "folder"]
            if own_ranks if kind == "forks itself" else in_ranks:
                found.append(f"{module}:{name}")
    assert found, module
    return found


@pytest.mark.parametrize("world_size", [2, 4])
def test_checks_in_every_rank(run_ranks, world_size):
    modules = ("checks_collectives", "checks_sync", "checks_checkpoints")
    run_ranks(world_size, *(name for module in modules for name in _names(module, "in every rank")))


@pytest.mark.parametrize(
    "check", _names("checks_processes", "forks itself") + _names("checks_checkpoints", "forks itself")
)
def test_faults(run_ranks, check):
    run_ranks(1, check)


def test_torchrun_restarts_after_a_kill(tmp_path):
    """The whole chain: torchrun, a rank killed with -9, a second attempt that resumes from the checkpoint."""
    program = tmp_path / "program.py"
    program.write_text(
        f"""
import os, signal, sys
sys.path.insert(0, {str(HERE.parents[1])!r})
from pathlib import Path
from distributed import processes
from distributed.checkpoints import CheckpointStore
from distributed.rundir import RunLock, write_status

world = processes.start("cpu", 20.0, 30.0)
lock = RunLock(Path({str(tmp_path)!r}))
store = CheckpointStore(Path({str(tmp_path)!r}) / "checkpoints")
store.prepare()
good = store.latest_good()
step = 0 if good is None else int(good.name[5:])
while step < 4:
    step += 1
    store.save(step, lambda folder: None)
    if step == 2 and world.attempt == 0 and world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
if world.is_main:
    write_status(Path({str(tmp_path)!r}), "finished", step, 0, f"attempt {{world.attempt}} resumed at {{good.name}}")
processes.stop()
"""
    )
    options = ["--standalone", "--nproc-per-node=2", "--max-restarts=2", "--monitor-interval=0.2"]
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", *options, str(program)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stdout[-4000:]
    status = read_status(tmp_path)
    assert status is not None
    assert (status["state"], status["step"]) == ("finished", 4)
    assert re.fullmatch(r"attempt 1 resumed at step-0000000[12]", status["message"]), status
