"""The lock and status.json, in one process. What needs other processes: checks_checkpoints.py."""

import json
import os

import pytest

from distributed.rundir import RunLock, read_status, write_status


def test_lock_refuses_a_second_job_and_opens_after_release(tmp_path):
    with RunLock(tmp_path / "run"), pytest.raises(ValueError, match=rf"in use by process {os.getpid()} on .* since"):
        RunLock(tmp_path / "run")
    RunLock(tmp_path / "run").release()


def test_status_is_replaced_and_checked(tmp_path):
    assert read_status(tmp_path) is None
    write_status(tmp_path, "training", 3, 1)
    write_status(tmp_path, "failed", 4, 1, "loss is nan")
    status = json.loads((tmp_path / "status.json").read_text())
    assert status | {"time": ""} == {"state": "failed", "step": 4, "epoch": 1, "time": "", "message": "loss is nan"}
    assert read_status(tmp_path) == status
    with pytest.raises(ValueError, match="state is 'done'; allowed: starting, training"):
        write_status(tmp_path, "done", 0, 0)
    assert [item.name for item in tmp_path.iterdir()] == ["status.json"]
