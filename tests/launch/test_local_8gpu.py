"""launch/local_8gpu.sh: what it starts, what it refuses, and one real rehearsal."""

import json
import sys
from pathlib import Path

import pytest

from tests.bin.tones import write_samples
from tests.launch.standins import ROOT, Launcher, training_flags, write_program

SCRIPT = str(ROOT / "launch" / "local_8gpu.sh")
SAMPLE = ["--preset", "quickstart", "--device", "cpu"]  # settings that are valid without a GPU


@pytest.fixture
def launcher(tmp_path: Path) -> Launcher:
    return Launcher(tmp_path)


def test_all_gpus_one_torchrun_and_every_flag(launcher: Launcher) -> None:
    launcher.gpus([40000] * 8)
    done = launcher(["bash", SCRIPT, *SAMPLE, "--run_name", "a", "--no-enable_hard_neg", "--path_remap", "a b=c"])
    assert done.returncode == 0, done.stderr
    (torchrun,) = launcher.torchruns()
    assert torchrun[:2] == ["--standalone", "--nproc_per_node=8"]
    assert torchrun[2] == str(ROOT / "bin" / "train.py")
    flags = training_flags(torchrun)
    assert flags == [*SAMPLE, "--run_name", "a", "--no-enable_hard_neg", "--path_remap", "a b=c", "--run_name", "a"]
    assert "8 GPU(s), driver 570.86" in done.stderr
    assert next((launcher.folder / "logs").iterdir()).name.startswith("train_2")


def test_several_machines(launcher: Launcher) -> None:
    launcher.gpus([40000] * 4)
    variables = {"NNODES": "3", "NODE_RANK": "1", "MASTER_ADDR": "10.0.0.1", "GPUS": "1,3", "RDZV_ID": "job7"}
    plan = json.dumps({"run_dir": "runs/shared"})
    done = launcher(["bash", SCRIPT, *SAMPLE, "--run-name", "shared"], PLAN=plan, **variables)
    assert done.returncode == 0, done.stderr
    (torchrun,) = launcher.torchruns()
    assert torchrun[:6] == [
        "--nnodes=3", "--node_rank=1", "--rdzv_backend=c10d", "--rdzv_endpoint=10.0.0.1:29500", "--rdzv_id=job7",
        "--rdzv_conf=is_host=0",
    ]  # fmt: skip
    assert "--nproc_per_node=2" in torchrun
    assert "CUDA_VISIBLE_DEVICES=1,3" in torchrun
    assert training_flags(torchrun)[:2] == ["--resume", "auto"], "machines may be at different attempts"


def test_ranks_may_share_the_gpus_there_are(launcher: Launcher) -> None:
    launcher.gpus([40000] * 2)
    plan = json.dumps({"run_dir": "runs/a"})
    done = launcher(["bash", SCRIPT, *SAMPLE], PLAN=plan, EARMARK_RANKS_PER_GPU="4")
    assert done.returncode == 0, done.stderr
    assert "8 processes, 4 a GPU by turns" in done.stderr
    (torchrun,) = launcher.torchruns()
    assert "--nproc_per_node=8" in torchrun


def test_settings_that_leave_the_gpus_idle_are_told(launcher: Launcher) -> None:
    launcher.gpus([40000] * 2)
    for device, is_told in (("cpu", True), ("auto", False)):
        done = launcher(["bash", SCRIPT, *SAMPLE], PLAN=json.dumps({"run_dir": "runs/a", "device": device}))
        assert done.returncode == 0, done.stderr
        assert ("no GPU is used; --device cuda takes them" in done.stderr) == is_told


@pytest.mark.parametrize(
    ("variables", "free", "message", "remedy"),
    [
        ({}, None, "no GPU", "REHEARSE=8"),
        ({"GPUS": "9"}, [40000] * 8, "GPUS=9, but only 8", ""),
        ({"GPUS": "many"}, [40000] * 8, "GPUS=many; allowed", ""),
        ({}, [40000, 900], "GPU 1 has 900 of 40960 MiB free", "nvidia-smi names it"),
        ({"CUDA_VISIBLE_DEVICES": ""}, [40000], "CUDA_VISIBLE_DEVICES is empty", "unset it"),
        ({"REHEARSE": "no"}, [40000], "REHEARSE=no; allowed", ""),
        ({"RETRIES": "-1"}, [40000], "RETRIES=-1; allowed", ""),
        ({"EARMARK_RANKS_PER_GPU": "0"}, [40000], "EARMARK_RANKS_PER_GPU=0; allowed", ""),
        ({"NNODES": "2"}, [40000], "NODE_RANK is not set", "Each machine needs"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "x"}, [40000], "NODE_RANK=2; allowed: 0 to 1", ""),
        ({"NNODES": "2", "NODE_RANK": "0", "MASTER_ADDR": "x"}, [40000], "needs --run_name", ""),
    ],
)
def test_refusals_name_the_remedy(
    launcher: Launcher, variables: dict[str, str], free: list[int] | None, message: str, remedy: str
) -> None:
    if free is None:
        # A PATH without nvidia-smi, wherever the test runs.
        write_program(launcher.tools / "bash", "#!/bin/sh\nexit 0\n").unlink()
        for name in ("bash", "dirname", "date", "head", "cut", "wc"):
            (launcher.tools / name).symlink_to(Path("/usr/bin") / name)
        variables = {**variables, "PATH": str(launcher.tools)}
    else:
        launcher.gpus(free)
    done = launcher(["bash", SCRIPT, "--device", "cpu"], **variables)
    assert done.returncode == 2
    assert message in done.stderr
    assert remedy in done.stderr
    assert not launcher.torchruns()


def test_a_broken_driver_is_told_in_its_own_words(launcher: Launcher) -> None:
    write_program(launcher.tools / "nvidia-smi", "#!/bin/sh\necho 'Driver/library version mismatch'\nexit 18\n")
    done = launcher(["bash", SCRIPT])
    assert done.returncode == 2
    assert "Driver/library version mismatch" in done.stderr
    assert "restart the machine" in done.stderr


def test_what_the_doctor_finds_stops_it(launcher: Launcher) -> None:
    launcher.gpus([40000] * 2)
    checkout = launcher.folder / "checkout"
    (checkout / "launch").mkdir(parents=True)
    for name in ("local_8gpu.sh", "setup.sh", "attempts.py", "gpu_use.py"):
        (checkout / "launch" / name).symlink_to(ROOT / "launch" / name)
    (checkout / "pyproject.toml").symlink_to(ROOT / "pyproject.toml")
    write_program(checkout / "bin" / "doctor.py", "")
    command = ["bash", str(checkout / "launch" / "local_8gpu.sh"), "--run_name", "r"]
    plan = json.dumps({"run_dir": "runs/r"})
    done = launcher(command, PLAN=plan, DOCTOR_EXIT="1")
    assert done.returncode == 2
    assert "finding of the doctor" in done.stderr
    assert not launcher.torchruns()
    assert launcher(command, PLAN=plan, DOCTOR_EXIT="1", DOCTOR="off").returncode == 0
    assert launcher(command, PLAN=plan).returncode == 0
    assert len(launcher.torchruns()) == 2


def test_wrong_settings_and_missing_data_start_nothing(launcher: Launcher) -> None:
    launcher.gpus([40000] * 2)
    done = launcher(["bash", SCRIPT, "--device", "cpu", "--train_samples_path", "none.json"])
    assert done.returncode == 2
    assert "--train_samples_path is 'none.json'" in done.stderr
    assert not launcher.torchruns()
    assert not (launcher.folder / "runs").exists()


def test_a_real_rehearsal_trains_and_ends_by_the_status(launcher: Launcher, tmp_path: Path) -> None:
    for name, seed in (("train", 1), ("test", 2)):
        write_samples(tmp_path, name, 8, seed)
    flags = [
        *("--train_samples_path", "train.json", "--test_samples_path", "test.json", "--glossary_path", "None"),
        *("--word_times_path", "None", "--window_fraction", "0", "--no-window_words_as_terms", "--data_root", "."),
        *("--batch_size", "4", "--max_steps", "2", "--run_name", "r", "--check_cache_path", "checks"),
    ]
    variables = {"REHEARSE": "2", "EARMARK_RANKS_PER_GPU": "2", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = launcher(["bash", SCRIPT, *flags], **variables)
    assert done.returncode == 0, done.stdout + done.stderr
    status = json.loads((tmp_path / "runs" / "r" / "status.json").read_text())
    assert (status["state"], status["step"]) == ("finished", 2)
    (log,) = (tmp_path / "logs").glob("train_*.log")
    assert "step      2/2" in log.read_text()
    assert "2 process(es)" in done.stdout
    assert "EARMARK_RANKS_PER_GPU means nothing on the CPU" in done.stderr


def test_help_and_dry_run_go_straight_to_the_trainer(launcher: Launcher) -> None:
    for flags in (["--help"], ["--epochs", "2", "--dry_run"]):
        done = launcher(["bash", SCRIPT, *flags])
        assert done.returncode == 0, done.stderr
        assert done.stdout == f"train.py {' '.join(flags)}\n"
