"""launch/gpu_use.py with an nvidia-smi of our own: curves over the run's step, a table and a file at the end."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.launch.standins import ROOT, write_program

PROGRAM = str(ROOT / "launch" / "gpu_use.py")

# Two GPUs; each call is busier than the one before. The second tells no power. Asks are written down.
NVIDIA_SMI = """#!/bin/sh
echo "$*" >> "$ASKED"
n=$(wc -l < "$ASKED")
if [ "$n" = 2 ]; then echo "Unable to determine the device handle" >&2; exit 15; fi
echo "0, $((n * 10)), $((n * 1000)), 40960, 250.5, 61"
echo "1, 100, 39000, 40960, [N/A], 70"
"""


def test_samples_curves_and_summary(tmp_path: Path) -> None:
    asked, run_dir = tmp_path / "asked", tmp_path / "run"
    write_program(tmp_path / "tools" / "nvidia-smi", NVIDIA_SMI)
    (run_dir / "tb").mkdir(parents=True)
    (run_dir / "metrics.jsonl").write_text('{"step": 10}\n{"step": 20, "train/loss": 1.0}\n{"step": 3')  # cut off
    env = {**os.environ, "PATH": f"{tmp_path / 'tools'}:{os.environ['PATH']}", "ASKED": str(asked)}
    env |= {"CUDA_VISIBLE_DEVICES": "0,1", "NODE_RANK": "0"}
    process = subprocess.Popen(
        [sys.executable, PROGRAM, str(run_dir), "--interval_s", "0.05"],
        env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        until = time.monotonic() + 40
        while not (asked.exists() and asked.read_text().count("\n") >= 5):
            assert time.monotonic() < until
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, complained = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 0, complained
    assert asked.read_text().splitlines()[0].endswith("-i 0,1")
    assert complained.count("nvidia-smi does not answer") == 1

    figures = json.loads((run_dir / "gpu_use_node0.json").read_text())
    calls = asked.read_text().count("\n")
    first = figures["gpus"]["0"]
    assert figures["num_samples"] in (calls - 1, calls - 2)  # one failed, and one may have been under way
    assert first["peak_memory_mib"] == (figures["num_samples"] + 1) * 1000
    assert first["mean_power_w"] == 250.5
    assert figures["gpus"]["1"]["mean_power_w"] is None
    assert "GPU  1" in said
    assert "39000 of 40960" in said

    events = EventAccumulator(str(run_dir / "tb" / "gpu_node0")).Reload()
    assert set(events.Tags()["scalars"]) == {
        *(f"gpu0/{tag}" for tag in ("utilization_pct", "memory_mib", "power_w", "temperature_c")),
        *(f"gpu1/{tag}" for tag in ("utilization_pct", "memory_mib", "temperature_c")),
    }
    curve = events.Scalars("gpu0/utilization_pct")
    assert [point.value for point in curve][:2] == [10.0, 30.0]
    assert {point.step for point in curve} == {20}


def test_without_a_run_there_is_nothing_to_write(tmp_path: Path) -> None:
    write_program(tmp_path / "nvidia-smi", "#!/bin/sh\nexit 9\n")
    env = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    process = subprocess.Popen([sys.executable, PROGRAM, str(tmp_path / "none"), "--interval_s", "0.05"], env=env)
    time.sleep(0.5)
    process.terminate()
    assert process.wait(timeout=20) == 0
    assert not (tmp_path / "none").exists()
