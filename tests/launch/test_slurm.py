"""launch/slurm.sbatch with stand-ins for srun and scontrol: a local start's argv on every machine, and requeueing."""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.launch.standins import ROOT, Launcher, training_flags, write_program

SCRIPT = ROOT / "launch" / "slurm.sbatch"
PLAN = json.dumps({"run_dir": "runs/slurm-4711"})
FLAGS = ["--preset", "quickstart", "--device", "cpu", "--path_remap", "a b=c"]

SRUN = """#!/usr/bin/env bash
while [[ "$1" == --* ]]; do echo "$1" >> "$RECORD.srun"; shift; done
code=0
for ((node = 0; node < SLURM_JOB_NUM_NODES; node++)); do
    SLURM_NODEID=$node "$@" || code=$?
done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
if [[ "$1" == show ]]; then printf 'gpu07\\ngpu08\\n'; else echo "$*" >> "$RECORD.scontrol"; fi
"""


@pytest.fixture
def slurm(tmp_path: Path) -> Launcher:
    launcher = Launcher(tmp_path)
    launcher.gpus([40000] * 8)
    write_program(launcher.tools / "srun", SRUN)
    write_program(launcher.tools / "scontrol", SCONTROL)
    shutil.copy(SCRIPT, tmp_path / "slurm_script")  # Slurm runs a copy of its own
    return launcher


def submit(slurm: Launcher, nodes: int, *flags: str, **extra: str) -> subprocess.CompletedProcess[str]:
    variables = {"SLURM_JOB_ID": "4711", "SLURM_JOB_NODELIST": "gpu[07-08]", "SLURM_JOB_NUM_NODES": str(nodes)}
    variables |= {"SLURM_SUBMIT_DIR": str(slurm.folder), "EARMARK_ROOT": str(ROOT), "PLAN": PLAN, **extra}
    return slurm(["bash", str(slurm.folder / "slurm_script"), *flags], **variables)


def test_every_machine_starts_as_a_local_one_does(slurm: Launcher) -> None:
    done = submit(slurm, 2, *FLAGS)
    assert done.returncode == 0, done.stderr
    torchruns = slurm.torchruns()
    assert len(torchruns) == 2
    for node, torchrun in enumerate(torchruns):
        assert torchrun[:7] == [
            "--nnodes=2", f"--node_rank={node}", "--rdzv_backend=c10d", "--rdzv_endpoint=gpu07:24711",
            "--rdzv_id=4711-0", f"--rdzv_conf=is_host={int(node == 0)}", "--nproc_per_node=8",
        ]  # fmt: skip
        name = ["--run_name", "slurm-4711"]
        assert training_flags(torchrun) == ["--resume", "auto", *name, "--resume", "auto", *FLAGS, *name]


def test_one_machine_needs_no_rendezvous(slurm: Launcher) -> None:
    assert submit(slurm, 1, *FLAGS).returncode == 0
    assert slurm.torchruns()[0][:2] == ["--standalone", "--nproc_per_node=8"]


@pytest.mark.parametrize(
    ("state", "restarts", "code", "requeued"),
    [("preempted", 0, 0, True), ("preempted", 50, 75, False), ("finished", 0, 0, False), ("failed", 0, 2, False)],
)
def test_back_to_the_queue_only_after_a_stop(
    slurm: Launcher, state: str, restarts: int, code: int, requeued: bool
) -> None:
    status = json.dumps({"state": state, "step": 5, "message": "ValueError: x" if state == "failed" else ""})
    done = submit(slurm, 1, *FLAGS, STATUS=status, SLURM_RESTART_COUNT=str(restarts))
    assert done.returncode == code, done.stdout + done.stderr
    record = Path(f"{slurm.record}.scontrol")
    assert (record.read_text() if record.exists() else "") == ("requeue 4711\n" if requeued else "")


def test_outside_a_checkout_it_says_what_to_set(slurm: Launcher) -> None:
    done = submit(slurm, 1, EARMARK_ROOT="")
    assert done.returncode == 2
    assert "set EARMARK_ROOT" in done.stderr


def test_options_are_those_that_requeueing_needs() -> None:
    source = SCRIPT.read_text(encoding="utf-8")
    options = [line.removeprefix("#SBATCH ") for line in source.splitlines() if line.startswith("#SBATCH ")]
    assert {"--requeue", "--open-mode=append", "--signal=TERM@180", "--ntasks-per-node=1"} <= set(options)
    # sbatch stops reading options at the first command.
    assert source.index("#SBATCH --signal") < source.index("\nset -euo pipefail\n")
    assert subprocess.run(["bash", "-n", str(SCRIPT)], check=False).returncode == 0
