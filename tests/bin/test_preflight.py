"""bin/preflight.py: one JSON object when a run may start, one line with the remedy when not."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from bin import preflight

Flags = Callable[..., list[str]]


def plan(capsys: pytest.CaptureFixture[str], *argv: str) -> dict[str, object]:
    assert preflight.main(list(argv)) == 0
    return json.loads(capsys.readouterr().out)


def test_names_the_run_and_writes_nothing(flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--processes", "2", "--", *flags())
    assert found["run_dir"] == str(tmp_path / "runs" / "run")
    assert (found["run_name"], found["resume"], found["batch_size"]) == ("run", "never", 8)
    assert "train_clips" not in found
    assert not (tmp_path / "runs").exists()


def test_counts_what_a_run_would_do(flags: Flags, capsys: pytest.CaptureFixture[str]) -> None:
    found = plan(capsys, "--check_data", "--", *flags("--epochs", "3"))
    assert found["train_clips"] == 24
    assert found["test_clips"] == 10
    assert (found["most_steps"], found["most_clips"]) == (9, 72)
    assert plan(capsys, "--check_data", "--", *flags("--max_steps", "2"))["most_steps"] == 2


def test_the_newest_unfinished_run_is_named_for_resume_auto(
    flags: Flags, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, state, time in (("old", "failed", "2026-01-01"), ("new", "preempted", "2026-01-02")):
        (tmp_path / "runs" / name / "checkpoints").mkdir(parents=True)
        status = {"state": state, "step": 1, "epoch": 0, "time": time, "message": ""}
        (tmp_path / "runs" / name / "status.json").write_text(json.dumps(status))
    argv = [a for a in flags("--resume", "auto") if a not in ("--run_name", "run")]
    assert plan(capsys, "--", *argv)["run_name"] == "new"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--train_samples_path", "none.json"), "--train_samples_path is 'none.json'"),
        (("--glossary_path", "none.json"), "--glossary_path is 'none.json'"),
        (("--lr", "0"), "lr: got 0"),
        (("--batch_size", "1"), "batch_size: got 1 for 2 processes"),
    ],
)
def test_faults_are_one_line(
    flags: Flags, capsys: pytest.CaptureFixture[str], more: tuple[str, ...], message: str
) -> None:
    assert preflight.main(["--processes", "2", "--", *flags(*more)]) == 2
    told = capsys.readouterr()
    assert told.out == ""
    assert message in told.err
    assert told.err.count("\n") == 1


def test_a_gpu_that_torch_does_not_see(
    flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert preflight.main(["--", *flags("--device", "auto")]) == 2
    assert "is a CPU build" in capsys.readouterr().err
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert preflight.main(["--", *flags("--device", "auto")]) == 2
    assert "wants CUDA 12.8: a newer driver" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert preflight.main(["--processes", "2", "--", *flags("--device", "auto")]) == 2
    assert "torch sees 1 GPUs" in capsys.readouterr().err
    monkeypatch.setenv("EARMARK_RANKS_PER_GPU", "2")
    assert preflight.main(["--processes", "2", "--", *flags("--device", "auto")]) == 0
    assert preflight.main(["--processes", "3", "--", *flags("--device", "auto")]) == 2


def test_too_little_room(flags: Flags, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(preflight, "NEEDED_DISK_GIB", 1e9)
    assert preflight.main(["--", *flags()]) == 2
    assert "set --runs_dir to another disk" in capsys.readouterr().err


def test_host_memory_is_a_plausible_amount() -> None:
    found = preflight.host_memory_gib()
    assert found is None or 0 < found < 1e5
