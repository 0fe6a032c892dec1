"""What metrics.jsonl, TensorBoard and W&B are given, and that none of them can stop a run."""

import json
import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import soundfile as sf
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from bin.config import Config, parse
from bin.tracking import Tracker
from data.clips import Clip
from data.reader import AudioReader
from retrieval.measured import Miss


@pytest.fixture(autouse=True)
def no_key(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)


def config(*flags: str) -> Config:
    return parse(["--batch_size", "24", *flags])


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def events(run: Path) -> EventAccumulator:
    found = EventAccumulator(str(run / "tb"), size_guidance={"tensors": 0, "audio": 0})
    found.Reload()
    return found


def test_numbers_go_to_the_file_and_to_the_board(tmp_path: Path) -> None:
    tracker = Tracker(tmp_path, config(), steps_per_epoch=4)
    tracker.write({"train/loss": 0.5, "train/grad_norm": float("nan")}, step=2)
    tracker.close()
    (line,) = lines(tmp_path)
    assert (line["step"], line["epoch"], line["train/loss"], line["train/grad_norm"]) == (2, 0.5, 0.5, None)
    assert events(tmp_path).Scalars("train/loss")[0].value == 0.5


def test_a_resumed_run_takes_out_what_will_be_done_again(tmp_path: Path) -> None:
    first = Tracker(tmp_path, config("--no-tensorboard"), steps_per_epoch=4)
    for step in (1, 2, 3):
        first.write({"train/loss": float(step)}, step)
    first.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('[1]\n"text"\n{"epoch": 1}\n{"step": 4, "tra')  # killed while writing
    second = Tracker(tmp_path, config("--no-tensorboard"), steps_per_epoch=4, resumed_step=2)
    second.write({"train/loss": 9.0}, 3)
    second.close()
    assert [(line["step"], line["train/loss"]) for line in lines(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 9.0)]


def test_a_run_that_starts_anew_keeps_nothing_of_one_that_had_no_checkpoint(tmp_path: Path) -> None:
    for loss in (1.0, 2.0):
        tracker = Tracker(tmp_path, config(), steps_per_epoch=4)
        tracker.write({"before/mrr": loss}, 0)
        tracker.close()
    assert [line["before/mrr"] for line in lines(tmp_path)] == [2.0]
    assert [event.value for event in events(tmp_path).Scalars("before/mrr")] == [2.0]


def test_other_ranks_write_nothing(tmp_path: Path) -> None:
    tracker = Tracker(None, config("--wandb"), steps_per_epoch=4)
    tracker.write({"train/loss": 1.0}, 1)
    tracker.show_terms(torch.zeros(1, 2), ["a"])
    tracker.close()
    assert not list(tmp_path.iterdir())


def test_settings_result_misses_and_terms_are_on_the_board(tmp_path: Path) -> None:
    wave_S = 0.1 * np.sin(np.arange(16_000) / 9)
    sf.write(tmp_path / "a.wav", wave_S, 16_000)
    clip = Clip("c", str(tmp_path / "a.wav"), None, None, "call the mailbox", ("mailbox",), (), ("mailbox",), False, "")
    tracker = Tracker(tmp_path, config("--lr", "0.25"), steps_per_epoch=4, resumed_step=8)
    tracker.show_misses([Miss(clip, "mailbox", 7, 0.1, [("keypad", 0.9, False)])], AudioReader(0))
    tracker.show_terms(torch.eye(3), ["mailbox", "two\twords", "keypad"])
    tracker.show_result({"test/recall@10": 0.75})
    tracker.close()
    found = events(tmp_path)
    assert found.Tags()["audio"] == ["misses/0"]
    assert found.Audio("misses/0")[0].sample_rate == 16_000
    text = {tag: found.Tensors(tag)[0].tensor_proto.string_val[0].decode() for tag in found.Tags()["tensors"]}
    assert "| train | lr | 0.25 |" in text["settings/text_summary"]
    assert "call the mailbox" in text["misses/0/text_summary"]
    assert "keypad" in text["misses/0/text_summary"]
    assert found.Scalars("hparam/test/recall@10")[0].value == 0.75
    assert (next(tmp_path.glob("tb/*/terms/metadata.tsv"))).read_text().split("\n")[1] == "two words"


def test_a_sink_that_fails_is_dropped_with_one_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    tracker = Tracker(tmp_path, config(), steps_per_epoch=4)
    tracker._file.close()
    tracker._file = Path("/dev/full").open("w")  # noqa: SIM115
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            tracker.write({"train/loss": 1.0}, step)
    tracker.close()
    assert caplog.text.count("metrics.jsonl cannot be written (OSError") == 1
    assert len(events(tmp_path).Scalars("train/loss")) == 2  # the others go on


@pytest.fixture
def fake_wandb(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The package as far as it is used; `runs` and `logged` tell what came."""
    fake = SimpleNamespace(api=SimpleNamespace(api_key=None), runs=[], logged=[], finished=0)

    def init(**given: Any) -> SimpleNamespace:
        fake.runs.append(given)
        return SimpleNamespace(log=lambda n, step: fake.logged.append((step, n)), finish=lambda: None)

    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


@pytest.mark.parametrize(
    ("flags", "environment", "mode"),
    [
        ([], {}, None),
        (["--wandb"], {}, "offline"),
        ([], {"WANDB_API_KEY": "canary-key-123"}, "online"),
        (["--wandb"], {"WANDB_API_KEY": "canary-key-123", "WANDB_MODE": "offline"}, "offline"),
    ],
)
def test_wandb_starts_when_asked_or_when_there_is_a_key(
    tmp_path: Path, fake_wandb: Any, monkeypatch: pytest.MonkeyPatch, flags: list[str], environment: dict, mode: str
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    tracker = Tracker(tmp_path, config("--no-tensorboard", *flags), steps_per_epoch=4)
    tracker.write({"train/loss": 1.0}, 1)
    tracker.close()
    assert [run["mode"] for run in fake_wandb.runs] == ([mode] if mode else [])
    assert fake_wandb.logged == ([(1, {"train/loss": 1.0})] if mode else [])
    assert "canary" not in str(fake_wandb.runs)


def test_wandb_goes_on_under_the_same_id_and_another_run_has_another(tmp_path: Path, fake_wandb: Any) -> None:
    for name in ("a", "a", "b"):
        (tmp_path / name).mkdir(exist_ok=True)
        Tracker(tmp_path / name, config("--no-tensorboard", "--wandb"), steps_per_epoch=4).close()
    ids = [run["id"] for run in fake_wandb.runs]
    assert ids[0] == ids[1] != ids[2]
    assert all(run["resume"] == "allow" for run in fake_wandb.runs)


def test_a_server_out_of_reach_does_not_stop_the_run(
    tmp_path: Path, fake_wandb: Any, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(**given: Any) -> None:
        raise ConnectionError("no route")

    fake_wandb.init = refuse
    tracker = Tracker(tmp_path, config("--no-tensorboard", "--wandb"), steps_per_epoch=4)
    tracker.write({"train/loss": 1.0}, 1)
    assert "W&B cannot be written (ConnectionError: no route)" in caplog.text
    assert len(lines(tmp_path)) == 1


@pytest.mark.parametrize(("flags", "key", "fails"), [(["--wandb"], None, True), ([], "canary-key-123", False)])
def test_a_missing_package_is_an_error_only_when_it_was_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, flags: list[str], key: str | None, fails: bool
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    if key:
        monkeypatch.setenv("WANDB_API_KEY", key)
    make: Callable[[], Tracker] = lambda: Tracker(tmp_path, config("--no-tensorboard", *flags), 4)  # noqa: E731
    if fails:
        with pytest.raises(ValueError, match="pip install wandb"):
            make()
    else:
        make().close()


def test_the_real_package_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = Tracker(tmp_path, config("--no-tensorboard", "--wandb"), steps_per_epoch=4)
    tracker.write({"train/loss": 1.0}, 1)
    tracker.close()
    assert list(tmp_path.glob("wandb/offline-run-*/*.wandb"))
