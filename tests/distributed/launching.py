"""Starts ranks.py: the named checks, each in real gloo processes."""

import os
import socket
import subprocess
import sys
from pathlib import Path

RANKS = Path(__file__).resolve().parent / "ranks.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def launch(world_size: int, folder: Path, *checks: str, limit_s: float = 90.0) -> str:
    """Run "module:function" checks of ranks.py, which see `folder`; the output. Fails, showing it, when one does."""
    env = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "MASTER_"))}
    done = subprocess.run(
        [sys.executable, RANKS, str(world_size), str(free_port()), folder, *checks],
        env=env | {"OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=limit_s,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout
