"""Real processes: gradients at 2, 4 and 8 ranks equal the one-process reference, temperature included.

Guards two traps: gathers without gradient give encoders 1/world_size of theirs, and recipes that multiply the loss by
the world size give a learned temperature world_size times its own.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

WORKER = Path(__file__).with_name("gathered_worker.py")


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_gradients_equal_the_one_process_reference(world_size, tmp_path):
    output, processes = tmp_path / "out.json", []
    for rank in range(world_size):
        environment = {
            **os.environ,
            "RANK": str(rank),
            "WORLD_SIZE": str(world_size),
            "STORE": str(tmp_path / "store"),
            "OMP_NUM_THREADS": "1",
            "GLOO_SOCKET_IFNAME": "lo",
        }
        with (tmp_path / f"rank{rank}.txt").open("w") as log:
            processes.append(
                subprocess.Popen([sys.executable, str(WORKER), str(output)], env=environment, stdout=log, stderr=log)
            )
    try:
        codes = [process.wait(timeout=120) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((tmp_path / f"rank{rank}.txt").read_text()[-2000:] for rank in range(world_size))
    assert codes == [0] * world_size, logs

    results = json.loads(output.read_text())
    assert len(results) == 9
    for case, values in results.items():
        for name, value in values.items():
            if name.startswith("scale of"):
                assert value > 1e-3, (case, name, value)
            else:
                assert value < 1e-12, (case, name, value)
