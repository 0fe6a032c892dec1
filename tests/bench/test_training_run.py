"""What is read out of a run directory, and what happens when a run does not fit or fails. No run is started here."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from bench import training_run
from bench.training_run import measure, read_run, sizes_mb, train_command


def write_run(folder: Path, num_steps: int = 6, steps_per_epoch: int = 3) -> Path:
    """A run directory whose steps take 1000 ms at first, 300 ms at the start of an epoch, and 100, 110, ... within."""
    folder.mkdir(parents=True)
    records: list[dict] = [{"step": 0, "epoch": 0.0, "time": 5.0, "before/recall@10": 0.1, "before/num_terms": 9}]
    for step in range(1, num_steps + 1):
        step_ms = 1000.0 if step == 1 else 300.0 if (step - 1) % steps_per_epoch == 0 else 100.0 + 10 * step
        records.append(
            {
                "step": step,
                "epoch": round(step / steps_per_epoch, 4),
                "time": 10.0 + step,
                "train/loss": 5.0 - step if step != 2 else None,
                "train/grad_norm": 1.0,
                "train/skipped_steps": 0.0,
                "train/step_ms": step_ms,
                "train/clips_per_s": 1000 / step_ms,
                "data/wait_ms": float(step),
                "gpu/peak_gib": 20.0 + step,
            }
        )
    records.append({"step": num_steps, "epoch": 2.0, "time": 30.0, "test/recall@10": 0.3})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "train_20260101_000000.log").write_text(
        "12:00 INFO earmark: model ready in 21.5 s: 19.2 M parameters train, of 7780.4 M; towers from {}\n"
        "12:01 INFO bin.rundir: checkpoint /runs/a/checkpoints/step-00000003 in 2.0 s\n"
        "12:02 INFO bin.rundir: checkpoint /runs/a/checkpoints/step-00000006 in 4.0 s\n"
    )
    return folder


def test_figures_of_a_run(tmp_path):
    found = read_run(write_run(tmp_path / "run"), launched=1.0)
    assert (found["steps"], found["steps_per_epoch"]) == (6, 3)
    assert found["first_step_after_s"] == 10.0
    assert (found["model_ready_s"], found["trainable_m"], found["parameters_m"]) == (21.5, 19.2, 7780.4)
    assert found["checkpoint_s"] == 3.0
    assert found["first_step_ms"] == 1000.0
    assert found["all_steps"]["num"] == 5
    assert found["all_steps"]["step_ms_median"] == 150.0  # of 120, 130, 300, 150, 160
    assert found["steps_within_epochs"]["num"] == 4
    assert found["steps_within_epochs"]["step_ms_median"] == 140.0  # of 120, 130, 150, 160
    assert found["peak_gib"] == 26.0
    assert found["loss"] == [4.0, None, 2.0, 1.0, 0.0, -1.0]
    assert found["before"] == {"recall@10": 0.1, "num_terms": 9}
    assert found["after"] == {"recall@10": 0.3}
    json.dumps(found, allow_nan=False)


def test_a_single_step_and_no_gpu(tmp_path):
    run_dir = write_run(tmp_path / "run", num_steps=1)
    lines = (run_dir / "metrics.jsonl").read_text().replace(', "gpu/peak_gib": 21.0', "")
    (run_dir / "metrics.jsonl").write_text(lines)
    found = read_run(run_dir, launched=0.0)
    assert found["peak_gib"] is None
    assert found["all_steps"]["step_ms_median"] == found["steps_within_epochs"]["step_ms_median"] == 1000.0


def test_a_run_without_steps_is_an_error(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "epoch": 0.0, "time": 1.0}\n')
    with pytest.raises(ValueError, match="no training step"):
        read_run(tmp_path, 0.0)


def test_sizes_of_files_and_folders(tmp_path):
    (tmp_path / "one").write_bytes(bytes(1_000_000))
    (tmp_path / "folder" / "inner").mkdir(parents=True)
    (tmp_path / "folder" / "inner" / "two").write_bytes(bytes(500_000))
    assert sizes_mb(tmp_path) == {"total": 1.5, "folder": 0.5, "one": 1.0}


def test_only_data_length_and_place_differ_from_the_defaults(tmp_path):
    command = train_command(tmp_path / "model", tmp_path / "clips", 30, tmp_path / "runs", "name", ["--seed", "3"])
    assert command[:3] == [sys.executable, "-m", "torch.distributed.run"]  # torchrun need not be on the PATH
    flags = [word for word in command[command.index("--model_name") :] if word.startswith("--")]
    assert set(flags) == {
        *("--model_name", "--train_samples_path", "--test_samples_path", "--glossary_path"),
        *("--max_steps", "--epochs", "--patience", "--log_every", "--runs_dir", "--run_name", "--seed"),
    }


@pytest.fixture
def fake_runs(monkeypatch):
    """Runs that print and end as told, one after the other; a good one writes a run directory."""
    commands: list[list[str]] = []

    def install(*endings: tuple[int, str]):
        left = iter(endings)

        def run(command, stdout, **kwargs):
            commands.append(command)
            code, printed = next(left)
            stdout.write(printed)
            stdout.flush()
            if code == 0:
                named = dict(itertools.pairwise(command))
                write_run(Path(named["--runs_dir"]) / named["--run_name"])
            return subprocess.CompletedProcess(command, code)

        monkeypatch.setattr(training_run.subprocess, "run", run)
        return commands

    return install


def test_out_of_memory_is_tried_again_with_checkpointing(tmp_path, fake_runs):
    commands = fake_runs((1, "torch.OutOfMemoryError: CUDA out of memory.\n"), (0, "fine"))
    found = measure(tmp_path / "model", tmp_path / "clips", 6, tmp_path / "runs", ["--batch_size", "512"])
    assert found["checkpointing"]
    assert [attempt["out_of_memory"] for attempt in found["attempts"]] == [True, False]
    assert ["--checkpointing" in command for command in commands] == [False, True]
    assert all("512" in command for command in commands)


def test_a_run_that_fits_is_not_repeated(tmp_path, fake_runs):
    commands = fake_runs((0, ""))
    found = measure(tmp_path / "model", tmp_path / "clips", 6, tmp_path / "runs")
    assert not found["checkpointing"]
    assert len(commands) == 1


@pytest.mark.parametrize("endings", [[(2, "bin/train.py: error: lr: got -1")], [(1, "OutOfMemoryError")] * 2])
def test_other_failures_show_the_end_of_what_was_printed(endings, tmp_path, fake_runs):
    fake_runs(*endings)
    with pytest.raises(RuntimeError, match=f"exit code {endings[-1][0]}(.|\n)*{endings[-1][1]}"):
        measure(tmp_path / "model", tmp_path / "clips", 6, tmp_path / "runs")
