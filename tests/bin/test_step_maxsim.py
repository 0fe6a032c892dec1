"""A step on two ranks with unequal batches has the gradients of one process, with either read-out."""

import json
import socket
import subprocess
import sys
from pathlib import Path

from tests.bin.tones import environment

WORKER = Path(__file__).with_name("step_worker.py")


def test_two_ranks_have_the_gradients_of_one_process(tones: Path, tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    output, ranks = tmp_path / "out.json", []
    for rank in range(2):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        env = environment(**{name: str(value) for name, value in variables.items()})
        command = [sys.executable, str(WORKER), str(tones), str(output)]
        ranks.append(subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    try:
        logs = [process.communicate(timeout=150)[0] for process in ranks]
    finally:
        for process in ranks:
            process.kill()
    assert [process.returncode for process in ranks] == [0, 0], logs
    for readout, result in json.loads(output.read_text()).items():
        assert result["largest"] > 1e-2, readout
        assert result["loss"] < 1e-11, (readout, result)
        assert result["gap"] < 1e-11, (readout, result)
        assert not result["untouched"], (readout, result)
