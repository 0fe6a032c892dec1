"""The page is well formed, loads nothing, says what was measured, and takes no term for markup; a browser shows it."""

import base64
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from retrieval.judgements import Judgements
from retrieval.measured import Measured, account
from retrieval.ranks import rank_positives
from retrieval.report import Report, read_metrics, render, within_budget
from tests.retrieval.pages import Page
from tests.retrieval.runs import TERMS, bare_report, full_report, measured_run

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)


@pytest.fixture(scope="module")
def report() -> Report:
    return full_report()


@pytest.fixture(scope="module")
def page(report: Report) -> Page:
    return Page(render(report))


def test_the_page_is_well_formed_and_loads_nothing(page: Page) -> None:
    assert page.counts["script"] == page.counts["style"] == page.counts["title"] == 1
    assert page.loads
    assert all(value.startswith("data:audio/") for value in page.loads)
    assert "url(" not in page.raw
    assert "@import" not in page.raw
    assert not re.search(r"\b(fetch|XMLHttpRequest|import|WebSocket)\b", page.raw)
    policy = next(value for _, name, value in page.attributes if name == "content" and "default-src" in value)
    assert "default-src 'none'" in policy
    assert not re.search(r"https?://", render(full_report()))


def test_hostile_terms_and_texts_are_only_text(page: Page) -> None:
    shown = [term for term in TERMS if term in page.text]
    assert {"</script><script>alert('term')</script>", "שלום עולם", "🔥 fire & <b>ice</b>"} <= set(shown)
    assert "img" not in page.counts
    assert "b" not in {tag for tag, name, _ in page.attributes if name == "onerror"}
    assert "\u202e" not in page.text
    assert page.text.count("run </title><script>") == 2  # the title and the heading


def test_the_page_holds_the_numbers(page: Page, report: Report) -> None:
    size = report.account["sizes"][0]
    for key in ("recall@10", "recall@1", "mrr", "no_term_auroc"):
        assert f"{size['metrics'][key]:.3f}" in page.text
    at = size["at_threshold"]
    for expected in (
        "0.831", "precision=0.5", f"{at['precision']:.3f}", f"{at['false_alarm']:.1%}", "123,456", "silent",
        "a.json:<3>",
        "9.9.9", "abcdef0123", "0.125 untrained", "best 0.600", "Training finished", "16", "44.0 clips/s", "12.5 s",
        "2 process(es)", "term_too_short", "Made 2026-01-02 03:04", "dev_samples_path",
    ):  # fmt: skip
        assert expected in page.text, expected
    worst = report.misses[0]
    assert f"came {worst.rank} of 6" in page.text
    assert f"{worst.found[0][1]:.2f}" in page.text
    for bucket in report.account["breakdowns"]["words"]:
        assert f"{bucket['metrics']['recall@10']:.3f}" in page.text


def test_sounds_are_in_the_page_up_to_a_budget(page: Page, report: Report) -> None:
    assert page.loads == [f"data:audio/wav;base64,{base64.b64encode(report.sounds[0][1]).decode()}"]
    assert page.text.count("The sound is not in this page") == len(report.misses) - 1
    sounds = [("audio/wav", bytes(60)), None, ("audio/wav", bytes(50)), ("audio/wav", bytes(1))]
    assert within_budget(sounds, 100) == [sounds[0], None, None, None]


def test_an_evaluation_without_a_run_leaves_out_what_is_not_there() -> None:
    page = Page(render(bare_report()))
    assert "Training loss" not in page.text
    assert "Among 6 terms. bin/evaluate.py --distractors FILE" in page.text
    assert "No threshold was calibrated" in page.text
    assert "Every term of every clip came before all others" in page.text


@pytest.mark.parametrize("kept", [[3, 7], []], ids=["no clip with a term", "no clip at all"])
def test_there_may_be_next_to_nothing_to_report(kept: list[int], report: Report) -> None:
    judgements = Judgements.from_terms(TERMS, [() for _ in range(24)])
    ranks = rank_positives(torch.rand(len(kept), 6), kept, judgements, num_top=10)
    measured = Measured(measured_run().clips, TERMS, 6, {6: ranks})
    nothing = account(measured, {"value": 0.5, "k": 10}, {}, num_resamples=5)
    page = Page(render(replace(report, account=nothing, misses=measured.misses(50), sounds=(), metrics=())))
    assert f"{len(kept)} clips against 6 terms" in page.text


def test_the_page_warns_of_what_makes_its_figures_too_good(report: Report) -> None:
    assert not [name for _, name, value in Page(render(report)).attributes if (name, value) == ("class", "warn")]
    account = {**report.account, "num_clips": 30, "run": {**report.account["run"], "samples": "dev.json"}}
    text = Page(render(replace(report, settings={"data": {}}, account=account))).text
    assert "There were no dev clips" in text
    assert "calibrated on the very clips" in text
    assert "6 of 30 clips could not be read" in text


def test_half_a_line_of_metrics_is_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_metrics(path) == []
    path.write_text('{"step": 1, "train/loss": 2.0}\n[1]\n{"step": 2, "tra')
    assert read_metrics(path) == [{"step": 1, "train/loss": 2.0}]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here: the page is only checked as text")
def test_a_browser_shows_the_page_without_errors(report: Report, tmp_path: Path) -> None:
    """Offline and headless: scripts run, charts answer the pointer, nothing is wider than a small phone."""
    probe = """<script>
    window.addEventListener("load", () => {
      const svg = document.querySelector("svg.chart"), box = svg.getBoundingClientRect();
      const spot = {clientX: box.left + box.width * 0.7, clientY: box.top + 60, bubbles: true};
      svg.dispatchEvent(new PointerEvent("pointermove", spot));
      document.body.dataset.tip = document.getElementById("tip").textContent;
      document.body.dataset.wide = Math.max(0, document.documentElement.scrollWidth - innerWidth);
      document.body.dataset.scripts = document.scripts.length;
    });
    </script>"""
    path = tmp_path / "report.html"
    path.write_text(render(report).replace("</head>", f"{probe}</head>"), encoding="utf-8")
    quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync")
    command = [
        str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", *quiet,
        "--enable-logging=stderr",
        f"--user-data-dir={tmp_path / 'profile'}", "--window-size=400,900", "--virtual-time-budget=3000", "--dump-dom",
        path.as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=90, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "CONSOLE" not in done.stderr, done.stderr[-2000:]
    body = re.search(r"<body[^>]*>", done.stdout)
    assert body is not None
    tip = re.search(r'data-tip="([^"]*)"', body[0])
    assert tip is not None, body[0]
    assert "Recall@10" in tip[1]
    assert 'data-wide="0"' in body[0]
    assert 'data-scripts="2"' in body[0]  # ours and the probe: no term became one
