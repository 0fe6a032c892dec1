"""What a run tells: strict metrics, no step twice, a log that says each thing once, tables that survive any text."""

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
from bin.runlog import Interval, MetricsWriter, configure_logging, environment, progress_bar, show_examples, show_recall
from data.clips import Clip
from distributed.atomic import json_bytes
from retrieval.metrics import EvalResult, SubsetMetrics

logger = logging.getLogger("earmark")
# TensorBoard's reader imports botocore, where that is installed.
pytestmark = pytest.mark.filterwarnings("ignore:'cgi' is deprecated:DeprecationWarning")


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


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    return [strict(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def scalars(run_dir: Path, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(run_dir / "tb"))
    board.Reload()
    return [(event.step, round(event.value, 6)) for event in board.Scalars(key)]


# --- metrics ---------------------------------------------------------------------------------------------------------


def test_metrics_are_strict_json_written_at_once(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    writer.write({"train/loss": 1.5, "train/grad_norm": float("inf"), "eval/mrr": float("nan")}, 3, 0.123456)
    (line,) = lines_of(tmp_path)  # before the writer is closed: a killed run has told all it knew
    writer.close()
    assert isinstance(line.pop("time"), float)
    assert line == {"step": 3, "epoch": 0.1235, "train/loss": 1.5, "train/grad_norm": None, "eval/mrr": None}


def test_a_resumed_run_takes_out_what_it_will_do_again_and_half_a_line(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (0, 2, 4, 6):
        writer.write({"train/loss": float(step)}, step, 0)
    writer.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n"text"\n{"epoch": 1}\n{"step": 2, "train/lo')  # killed while it wrote
    writer = MetricsWriter(tmp_path, tensorboard=False, resumed_step=4)
    writer.write({"train/loss": 60.0}, 6, 0)
    writer.close()
    assert [(line["step"], line["train/loss"]) for line in lines_of(tmp_path)] == [(0, 0), (2, 2), (4, 4), (6, 60)]


def test_a_run_that_starts_anew_keeps_nothing_of_one_that_had_no_checkpoint(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        writer = MetricsWriter(tmp_path)
        for step in range(3):
            writer.write({"before/mrr": loss}, step, 0)
            if loss == 2.0:
                break
        writer.close()
    assert [(line["step"], line["before/mrr"]) for line in lines_of(tmp_path)] == [(0, 2.0)]
    assert scalars(tmp_path, "before/mrr") == [(0, 2.0)]


def test_tensorboard_gets_the_same_numbers_and_forgets_steps_done_again(tmp_path: Path) -> None:
    writer = MetricsWriter(tmp_path)
    for step in (0, 2, 4):
        writer.write({"train/loss": step / 4}, step, 0)
    writer.close()
    writer = MetricsWriter(tmp_path, resumed_step=2)
    writer.write({"train/loss": 9.0}, 4, 0)
    writer.close()
    assert scalars(tmp_path, "train/loss") == [(0, 0.0), (2, 0.5), (4, 9.0)]
    assert not list(tmp_path.glob("*tfevents*")), "events belong into tb/"


def test_without_tensorboard_there_is_no_folder(tmp_path: Path) -> None:
    MetricsWriter(tmp_path, tensorboard=False).close()
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_wandb_gets_the_same_numbers_under_the_runs_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    session = SimpleNamespace(
        log=lambda numbers, step: told.append((numbers, step)), finish=lambda: told.append("finished")
    )

    def init(**settings: Any) -> SimpleNamespace:
        told.append(settings)
        return session

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=init))
    writer = MetricsWriter(tmp_path / ".", False, "terms", {"train": {"lr": 1}})
    writer.write({"train/loss": 1.0}, 5, 0.5)
    writer.close()
    settings, *rest = told
    assert (settings["project"], settings["name"], settings["config"]) == ("terms", tmp_path.name, {"train": {"lr": 1}})
    assert settings["id"] == tmp_path.name
    assert settings["resume"] == "allow"
    assert rest == [({"train/loss": 1.0}, 5), "finished"]


def test_wandb_that_is_not_there_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb_project: the wandb package is missing; pip install wandb"):
        MetricsWriter(tmp_path, False, "terms")


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
