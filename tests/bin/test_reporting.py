"""Reports are written from what a run left behind, and a failing one fails nothing."""

import io
import json
import logging
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
from rich.console import Console

from bin.reporting import data_facts, show_test, write_report, write_run_report
from data.drops import DropLog
from data.reader import AudioReader
from retrieval.measured import Measured, account
from tests.retrieval.pages import Page
from tests.retrieval.runs import measured_run, metrics_lines


@pytest.fixture
def measured(tmp_path: Path) -> Measured:
    """Clips of one real file, but for those of every third, whose file is missing."""
    sf.write(tmp_path / "a.wav", np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000, subtype="PCM_16")
    found = measured_run()
    paths = [str(tmp_path / ("gone.wav" if i % 3 == 0 else "a.wav")) for i in range(24)]
    return replace(found, clips=[replace(c, audio_path=p) for c, p in zip(found.clips, paths, strict=True)])


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    path = tmp_path / "my run"
    path.mkdir()
    (path / "config.toml").write_text('[train]\nlr = 0.001\n[data]\ntrain_samples_path = "train.json"\n')
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics_lines()))
    return path


def test_a_run_gets_its_page_with_curves_settings_and_sounds(measured: Measured, run_dir: Path) -> None:
    drops = DropLog()
    drops.seen(25)
    drops.add("silent", "train.json:3", "peak 0")
    write_run_report(run_dir, measured, measured.clips[:9], AudioReader(), drops, "cpu")
    page = Page((run_dir / "report.html").read_text(encoding="utf-8"))
    for expected in (
        "my run",
        "Training loss",
        "0.001",
        "1 of 25 records dropped",
        "silent: train.json:3 peak 0",
        "torch",
    ):
        assert expected in page.text, expected
    num_misses = len(measured.misses(50))
    num_gone = sum(miss.clip.audio_path.endswith("gone.wav") for miss in measured.misses(50))
    assert page.counts["audio"] == num_misses - num_gone > 0
    assert num_gone > 0
    assert page.text.count("The sound is not in this page") == num_gone


def test_the_console_gets_the_table_and_examples(
    measured: Measured, run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    console = Console(record=True, file=io.StringIO(), width=120)
    monkeypatch.setattr("bin.runlog.console", console)
    show_test(None, measured, run_dir, 2)
    text = console.export_text()
    assert f"{measured.result().recall(5):.3f}" in text
    assert text.count("onerror=alert") == 2


def test_a_failing_report_is_logged_and_no_more(
    measured: Measured, run_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (run_dir / "config.toml").write_text("not toml [")
    with caplog.at_level(logging.ERROR):
        write_run_report(run_dir, measured, [], AudioReader(), DropLog(), "cpu")
    assert "the report could not be written; the run itself is complete" in caplog.text
    assert "TOMLDecodeError" in caplog.text
    assert not (run_dir / "report.html").exists()


def test_without_a_run_the_page_is_named_after_the_model(measured: Measured, tmp_path: Path) -> None:
    found = account(measured, num_resamples=5)
    found["run"] = data_facts(measured, None, DropLog()) | {"model_dir": "/models/mine"}
    write_report(tmp_path / "new" / "page.html", None, measured, found, AudioReader())
    page = Page((tmp_path / "new" / "page.html").read_text(encoding="utf-8"))
    assert "mine" in page.text
    assert "Training loss" not in page.text


def test_facts_count_clips_and_terms(measured: Measured) -> None:
    counts = data_facts(measured, measured.clips, DropLog())["counts"]
    assert counts["Training clips"] == 24
    assert (counts["with a term"], counts["without a term"], counts["Terms ranked"]) == (18, 6, 6)
    assert counts["Audio measured"] == "0.4 min"
    assert "Training clips" not in data_facts(measured, None, DropLog())["counts"]
