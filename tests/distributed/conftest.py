import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

RANKS = Path(__file__).resolve().parent / "ranks.py"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture
def run_ranks(tmp_path):
    """run_ranks(world_size, "checks_x:name", ...): the checks in real gloo processes; the output shows what failed."""

    def run(world_size: int, *checks: str, limit_s: float = 90.0) -> str:
        env = {key: value for key, value in os.environ.items() if not key.startswith(("TORCHELASTIC", "MASTER_"))}
        done = subprocess.run(
            [sys.executable, RANKS, str(world_size), str(free_port()), tmp_path, *checks],
            env=env | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=limit_s,
        )
        assert done.returncode == 0, done.stdout[-6000:]
        return done.stdout

    return run
