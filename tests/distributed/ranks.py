"""Real ranks for the tests: imports torch once, forks a process a rank, and runs the named checks in each.

    python ranks.py WORLD_SIZE PORT FOLDER CHECK...

The exit code is 0 when every rank of every check came through. The checks stand in `checks_*.py` beside this file.
"""

import importlib
import os
import signal
import sys
import time
import traceback
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

import torch  # noqa: E402

from distributed import processes  # noqa: E402

COLLECTIVE_TIMEOUT_S = 20.0


def forks_itself(check):
    """Marks a check(port, folder) that runs once, in a bare process, and forks what it needs."""
    check.forks_itself = True
    return check


def fork_rank(rank: int, world_size: int, port: int, body, **env: str) -> int:
    """Run body() in a child that has torchrun's environment; returns its process id."""
    place = {
        "RANK": rank,
        "LOCAL_RANK": rank,
        "WORLD_SIZE": world_size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": port,
    }
    return fork(body, {name: str(value) for name, value in (place | env).items()})


def fork(body, env: dict[str, str] | None = None) -> int:
    """Run body() in a child process; returns its id. Exit code 1 and a traceback when it raises."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.environ.update(env or {})
        torch.set_num_threads(1)
        body()
        code = 0
    except BaseException:
        print(f"--- rank {os.environ.get('RANK')}", file=sys.stderr)
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait_all(pids: list[int], grace_s: float = 25.0) -> dict[int, int]:
    """Exit codes by process id (negative: signal). After the first failure the others get `grace_s`, then SIGKILL."""
    codes: dict[int, int] = {}
    deadline = None
    while len(codes) < len(pids):
        for pid in set(pids) - codes.keys():
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
                if codes[pid] and deadline is None:
                    deadline = time.monotonic() + grace_s
        if deadline and time.monotonic() > deadline:
            for pid in set(pids) - codes.keys():
                os.kill(pid, signal.SIGKILL)
            deadline = None
        time.sleep(0.01)
    return codes


def main(world_size: int, port: int, folder: Path, names: list[str]) -> int:
    checks = [(name, getattr(importlib.import_module(name.split(":")[0]), name.split(":")[1])) for name in names]
    if getattr(checks[0][1], "forks_itself", False):
        assert (len(checks), world_size) == (1, 1)
        checks[0][1](port, folder)
        return 0

    def body() -> None:
        world = processes.start("cpu", COLLECTIVE_TIMEOUT_S, 30.0)
        for name, check in checks:
            torch.manual_seed(world.rank)
            try:
                check(world, folder)
            except BaseException as error:
                error.add_note(f"in {name}")
                raise
        processes.stop()

    codes = wait_all([fork_rank(r, world_size, port, body) for r in range(world_size)])
    return int(any(codes.values()))


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4:]))
