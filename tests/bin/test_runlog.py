"""What a run tells: a log that says each thing once, tables that survive any text."""

import io
import json
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

import bin.runlog
from bin.runlog import Interval, configure_logging, environment, progress_bar, show_examples, show_recall
from data.clips import Clip
from distributed.atomic import json_bytes
from retrieval.metrics import EvalResult, SubsetMetrics

logger = logging.getLogger("earmark")


@pytest.fixture(autouse=True)
def logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level
    yield
    for handler in root.handlers:
        if isinstance(handler, logging.FileHandler):
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What a terminal of 100 columns would show."""
    shown = io.StringIO()
    monkeypatch.setattr(bin.runlog, "console", Console(file=shown, force_terminal=True, width=100, highlight=False))
    return shown


def plain(shown: io.StringIO) -> str:
    """Without colours."""
    return re.sub(r"\x1b\[[\d;]*m", "", shown.getvalue())


def strict(line: str) -> dict[str, Any]:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    return json.loads(line, parse_constant=refuse)


def test_an_interval_counts_all_ranks_clips_and_the_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = SimpleNamespace(now=10.0)
    monkeypatch.setattr(bin.runlog, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    interval = Interval()
    for waited_s in (0.25, 0.75):
        with interval.waiting():
            clock.now += waited_s
        clock.now += 1.5
        interval.num_clips += 32
        interval.num_steps += 1
    assert interval.numbers() == {"train/clips_per_s": 16.0, "train/step_ms": 2000.0, "data/wait_ms": 500.0}


# --- log -------------------------------------------------------------------------------------------------------------


def test_rank_0_tells_the_console_and_the_file_each_thing_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    configure_logging(0, tmp_path / "run" / "train.log")
    logger.debug("a detail")
    logger.info("loss is %.1f", 2)
    logging.getLogger("data.leaks").warning("%d clips are odd", 3)
    logging.getLogger("transformers.modeling").info("chatter")
    shown = capsys.readouterr()
    assert re.fullmatch(r"\d\d:\d\d:\d\d loss is 2.0\n\d\d:\d\d:\d\d WARNING: 3 clips are odd\n", shown.out)
    assert shown.err == ""
    info, warning = (tmp_path / "run" / "train.log").read_text().splitlines()
    assert re.fullmatch(r"[\d-]+ [\d:,]+ INFO    earmark: loss is 2.0", info)
    assert re.fullmatch(r"[\d-]+ [\d:,]+ WARNING data.leaks: 3 clips are odd", warning)


def test_on_a_terminal_brackets_are_no_markup(tmp_path: Path, terminal: io.StringIO) -> None:
    configure_logging(0, None)
    logger.info("adapters on [bold] of audio_tower.*[/nonsense]")
    logger.error("the run failed")
    shown = plain(terminal)
    assert "adapters on [bold] of audio_tower.*[/nonsense]" in shown
    assert "ERROR: the run failed" in shown


def test_other_ranks_say_warnings_alone_to_standard_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(3, tmp_path / "train.log")
    logger.info("step 1")
    logger.warning("a clip is missing")
    assert capsys.readouterr() == ("", "[rank 3] WARNING a clip is missing\n")
    assert not list(tmp_path.iterdir()), "the log file is rank 0's"


def test_configuring_twice_does_not_say_things_twice(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, None)
    configure_logging(0, None)
    logger.info("once")
    assert capsys.readouterr().out.count("once") == 1


def test_a_full_log_disk_is_told_once_and_the_console_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(0, Path("/dev/full"))
    for step in range(3):
        logging.getLogger("x").info("step %d", step)
    out, err = capsys.readouterr()
    assert out.count("log file /dev/full cannot be written") == 1
    assert [f"step {i}" in out for i in range(3)] == [True] * 3
    assert "Traceback" not in err


def test_secrets_are_not_in_the_log_nor_on_the_console(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123")
    configure_logging(0, tmp_path / "train.log")
    try:
        raise ValueError("no access with hf_canary_0123")
    except ValueError:
        logging.getLogger("x").exception("failed")  # the traceback too
    for text in (capsys.readouterr().out, (tmp_path / "train.log").read_text()):
        assert "<HF_TOKEN>" in text
        assert "canary" not in text


# --- progress, tables, environment -----------------------------------------------------------------------------------


def test_the_bar_shows_on_a_terminal_only(terminal: io.StringIO, monkeypatch: pytest.MonkeyPatch) -> None:
    for enabled in (True, False):
        with progress_bar(enabled) as bar:
            bar.update(bar.add_task("training", total=4, note=""), completed=3, note="loss 0.123")
            bar.refresh()
        assert ("3/4" in terminal.getvalue()) is enabled
        assert ("loss 0.123" in terminal.getvalue()) is enabled
        terminal.truncate(0)
    piped = io.StringIO()
    monkeypatch.setattr(bin.runlog, "console", Console(file=piped))
    with progress_bar(True) as bar:
        bar.update(bar.add_task("training", total=4, note=""), completed=3)
        bar.refresh()
    assert piped.getvalue() == ""


def result(recall: float, subsets: tuple[str, ...] = ("all", "seen", "unseen")) -> EvalResult:
    by_k = {1: recall, 5: recall, 10: recall}
    one = SubsetMetrics(7, 9, by_k, by_k, by_k, recall)
    return EvalResult(8, 1, 123, 0.5, dict.fromkeys(subsets, one))


def test_the_closing_table_has_before_and_after_and_where_things_lie(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir = tmp_path / "[red]run"  # a folder's name is no markup either
    run_dir.mkdir()
    for name in ("train_20260101_000000.log", "train_20260102_000000.log"):
        (run_dir / name).touch()
    show_recall(result(0.25), result(0.75, ("all", "seen")), run_dir)
    shown = capsys.readouterr().out
    assert "before -> after" in shown
    assert shown.count("0.250 -> 0.750") == 6
    assert re.search(r"unseen\W+-\W+-\W+-\W+0\W+123", shown), "absent is not zero"
    for place in ("model_best", "model_best.pt", "train_20260102_000000.log", "metrics.jsonl"):
        assert f"{run_dir / place}\n" in shown
    assert "tensorboard" not in shown, "there is none to look at"
    (run_dir / "tb").mkdir()
    show_recall(None, result(0.75), run_dir)
    shown = capsys.readouterr().out
    assert f"tensorboard --logdir {run_dir}/tb\n" in shown
    assert "before -> after" not in shown


def clip(text: str, terms: tuple[str, ...]) -> Clip:
    return Clip("c", "", None, None, text, terms, (), terms, not terms, "c")


@pytest.mark.parametrize("strange", ["[bold]", "[/bold]", "[/]", "[link=x]", "a[0]", "\\", "[red]a\\"])
def test_examples_show_any_term_as_it_is(strange: str, terminal: io.StringIO) -> None:
    examples = [
        (clip(f"say {strange} now", (strange, "keypad")), [strange, "mailbox"]),
        (clip("", ()), [strange]),
    ]
    show_examples(examples)
    shown = plain(terminal)
    assert f"say {strange} now" in shown
    assert f"{strange}*, mailbox" in shown, "a star marks what is right"
    assert "mailbox*" not in shown
    assert "(none)" in shown
    assert f"\x1b[1m{strange}*" in terminal.getvalue()


def test_the_environment_is_strict_json_and_holds_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    secrets = {"HF_TOKEN": "hf_s3cret", "WANDB_API_KEY": "wb_s3cret", "MY_PASSWORD": "pw_s3cret"}
    for name, value in secrets.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["bin/train.py", "--lr", "1"])
    written = json_bytes(environment("cpu")).decode()
    assert not [text for text in (*secrets, *secrets.values()) if text in written]
    found = strict(written)
    assert found["argv"] == ["bin/train.py", "--lr", "1"]
    assert found["python"] == sys.version.split()[0]
    assert re.fullmatch("[0-9a-f]{40}", found["git_revision"] or "0" * 40)
    assert {"torch", "transformers", "cuda", "device", "platform", "cpu_count"} <= found.keys()


def test_without_git_the_revision_is_unknown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    found = environment("cpu")
    assert found["git_revision"] is None
    assert found["git_dirty"] is None
