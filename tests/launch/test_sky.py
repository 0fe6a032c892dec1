"""launch/sky.yaml: what SkyPilot is asked for, and its run section executed: the argv of a local start."""

import json
from pathlib import Path

import yaml

from tests.launch.standins import ROOT, Launcher, training_flags

TASK = yaml.safe_load((ROOT / "launch" / "sky.yaml").read_text(encoding="utf-8"))
TASK_ID = "sky-managed-2026-11-24-08-00-00-123456_earmark_3-0"


def run(launcher: Launcher, nodes: int, rank: int, flags: str) -> list[str]:
    for name in ("launch", "bin", "pyproject.toml"):  # SkyPilot runs in the copied checkout
        (launcher.folder / name).symlink_to(ROOT / name)
    done = launcher(
        ["bash", "-c", TASK["run"]],
        FLAGS=flags,
        PLAN=json.dumps({"run_dir": f"/earmark/runs/{TASK_ID}"}),
        SKYPILOT_NUM_NODES=str(nodes),
        SKYPILOT_NODE_RANK=str(rank),
        SKYPILOT_NODE_IPS="10.1.0.4\n10.1.0.5",
        SKYPILOT_TASK_ID=TASK_ID,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (torchrun,) = launcher.torchruns()
    return torchrun


def test_one_machine_starts_as_a_local_one_does(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    launcher.gpus([40000] * 8)
    torchrun = run(launcher, 1, 0, "--epochs 2 --path_remap 'a b=c'")
    assert torchrun[:2] == ["--standalone", "--nproc_per_node=8"]
    mounts = ["--runs_dir", "/earmark/runs", "--data_root", "/earmark/data"]
    name = ["--run_name", TASK_ID]
    expected = [*mounts, *name, "--resume", "auto", "--epochs", "2", "--path_remap", "a b=c", *name]
    assert training_flags(torchrun) == expected


def test_several_machines_meet_at_the_first(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    launcher.gpus([40000] * 8)
    torchrun = run(launcher, 2, 1, "")
    assert f"--rdzv_id={TASK_ID}" in torchrun
    assert {"--nnodes=2", "--node_rank=1", "--rdzv_endpoint=10.1.0.4:29500"} <= set(torchrun)


def test_what_is_asked_for() -> None:
    resources = TASK["resources"]
    assert resources["use_spot"] is True
    assert list(resources["accelerators"]) == ["A100:8", "A100-80GB:8", "H100:8"]
    assert resources["job_recovery"] == {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": 2}
    assert TASK["file_mounts"]["/earmark/runs"] == {"source": "${RUNS_BUCKET}", "mode": "MOUNT_CACHED"}
    assert TASK["workdir"] == "."
    assert set(TASK["envs"]) == {"FLAGS", "DATA_BUCKET", "RUNS_BUCKET"}
