"""The whole report on a tiny checkpoint, as a user runs it, and its parts that can go wrong on a borrowed machine."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from bench import findings, parity, training_run
from bench.random_checkpoint import write_checkpoint
from bench.true_size import choose_inputs, draw_loss, main

ROOT = Path(__file__).resolve().parents[2]
CLIPS = ROOT / "samples" / "telephony"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "checkpoint"
    write_checkpoint(folder, "tiny", device="cpu")
    return folder


def test_whole_report_on_the_cpu(checkpoint, tmp_path):
    program = [sys.executable, str(ROOT / "bench" / "true_size.py"), "--checkpoint", str(checkpoint)]
    flags = ["--steps", "3", "--num_inputs", "6", "--out", str(tmp_path / "out")]
    train = ["--batch_size", "8", "--eval_every", "1000", "--check_cache_path", str(tmp_path / "checks.jsonl")]
    done = subprocess.run(
        [*program, *flags, "--", *train, "--num_workers", "0", "--no-tensorboard"],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads((tmp_path / "out" / "true_size.json").read_text())
    assert all(one["min_cosine"] > 0.99999 for one in report["parity"]["agreements"].values())
    assert report["environment"]["torch"]
    trained = report["train"]
    assert len(trained["loss"]) == trained["steps"] == 3
    assert trained["attempts"][0]["flags"][-3:] == ["--num_workers", "0", "--no-tensorboard"]
    assert 0 <= trained["before"]["recall@10"] <= 1
    assert 0 <= trained["after"]["recall@10"] <= 1
    assert trained["model_ready_s"] > 0
    assert trained["mb_on_disk"]["model_final"] > 0
    for line in ("parity tower", "parity lm", "parity text", "train  3 steps", "Recall@1/5/10 after"):
        assert line in done.stdout, done.stdout


def test_inputs_are_of_all_lengths_and_distinct():
    waves, strings = choose_inputs(CLIPS, 24)
    assert len(waves) == 24
    assert all(wave.dtype == np.int16 for wave in waves)
    assert [len(wave) for wave in waves] == sorted(len(wave) for wave in waves)
    assert len(waves[-1]) > 2 * len(waves[0])
    assert len(set(strings)) == len(strings) == 24


def test_a_part_that_fails_leaves_the_other_its_figures(checkpoint, tmp_path, monkeypatch, capsys):
    def fail(*args):
        raise TypeError("an interface has moved")

    agreement = parity.Agreement(2, 0.9, 0.95, 0.5, 0.6, 0.3, 2)
    measured = {"agreements": {"text": agreement}, "is_good": False, "ours_load_s": 1.0, "theirs_load_s": 2.0}
    arguments = ["--checkpoint", str(checkpoint), "--out", str(tmp_path)]
    monkeypatch.setattr(training_run, "measure", fail)
    monkeypatch.setattr(parity, "measure", lambda *args: measured)
    assert main(arguments) == 1
    shown = capsys.readouterr()
    assert "BELOW" in shown.out
    assert "train FAILED" in shown.out
    assert "an interface has moved" in shown.err
    report = json.loads((tmp_path / "true_size.json").read_text())
    assert report["train"] == {"error": "TypeError: an interface has moved"}
    assert report["parity"]["agreements"]["text"]["min_cosine"] == 0.9
    assert main([*arguments, "--parts", "parity"]) == 1  # a cosine below its target alone


def test_missing_files_are_named(checkpoint, tmp_path, capsys):
    with pytest.raises(SystemExit):
        main(["--checkpoint", str(tmp_path), "--out", str(tmp_path)])
    assert f"{tmp_path / 'config.json'} does not exist" in capsys.readouterr().err


def test_no_plot_without_matplotlib(tmp_path, monkeypatch):
    def absent(name):
        raise ImportError(name)

    monkeypatch.setattr(findings.importlib, "import_module", absent)
    assert not draw_loss([1.0, None, 0.5], tmp_path / "loss.png")
    assert not (tmp_path / "loss.png").exists()
