"""Facts that two rooms state agree, and a dry run tells what would run, or what is wrong, and writes nothing."""

import json
import logging
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import data.audio
import model.logmel
from bin.checks import check_rooms_agree, describe_plan
from bin.config import parse
from distributed.processes import World
from model.build import build_model
from model.dual import DualEncoder
from model.settings import ModelSettings
from tests.bin.tones import AUDIO, TEXT

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
Flags = Callable[..., list[str]]


def build(folder: Path, max_source_positions: int = 1500) -> DualEncoder:
    (folder / "audio.json").write_text(json.dumps({**AUDIO, "max_source_positions": max_source_positions}))
    (folder / "text.json").write_text(json.dumps(TEXT))
    paths = {f"{name}_model": str(folder / f"{name}.json") for name in ("audio", "text")}
    return build_model(ModelSettings(**paths, trainable="full", proj_dim=8)).model


def plan_of(caplog: pytest.LogCaptureFixture) -> dict[str, str]:
    """The table of the log: name -> what it says."""
    lines = [record.getMessage() for record in caplog.records if record.name == "earmark"]
    return {found[1]: found[2] for line in lines if (found := re.fullmatch(r"([a-z]+(?: [a-z]+)?) +(.*)", line))}


def test_an_audio_tower_of_30_s_reads_every_clip(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_rooms_agree(build(tmp_path))
    assert not caplog.records


def test_a_shorter_audio_tower_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    check_rooms_agree(build(tmp_path, max_source_positions=100))
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "this audio tower reads 2.0 s at most" in caplog.text  # two frames of 10 ms a position


@pytest.mark.parametrize("room", [data.audio, model.logmel], ids=["data", "model"])
def test_rooms_of_different_sample_rates_do_not_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, room: object
) -> None:
    built = build(tmp_path)
    monkeypatch.setattr(room, "SAMPLE_RATE", 8_000)
    with pytest.raises(AssertionError):
        check_rooms_agree(built)


def test_the_plan_counts_what_would_run_and_writes_nothing(
    flags: Flags, tmp_path: Path, tones: Path, caplog: pytest.LogCaptureFixture
) -> None:
    files = {path: path.read_bytes() for path in (*tones.iterdir(), *tmp_path.rglob("*")) if path.is_file()}
    with caplog.at_level(logging.INFO):
        describe_plan(parse(flags("--epochs", "3", "--grad_accum_steps", "2", "--batch_size", "12")), ALONE)
    plan = plan_of(caplog)
    assert plan["processes"] == "1 on cpu"
    assert plan["towers"] == "random | random"
    assert plan["adapters"] == "none (trainable=full)"
    assert plan["training clips"] == "24 and 0 random windows an epoch"
    assert plan["test clips"] == "10"
    assert plan["terms ranked"] == "8, 6 of them seen in training"
    assert plan["steps"] == "2 an epoch, 6 in all"
    assert re.fullmatch(r"6 clips, \d\.\d s, \d terms on this process", plan["first batch"])
    assert plan["dropped"] == "0 of 34 records dropped"
    trains, total = (float(number) for number in re.findall(r"([\d.]+) M", plan["parameters"]))
    assert 0.01 < trains < total, "the audio tower's positions stay fixed"
    assert not (tmp_path / "runs").exists()
    assert {path: path.read_bytes() for path in files} == files
    assert {path.name for path in tmp_path.iterdir()} <= {"checks.jsonl"}


def test_the_plan_of_adapters_a_dev_set_and_a_limit_of_steps(
    flags: Flags, tones: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    dev = tmp_path / "dev.json"
    record = json.loads((tones / "test.json").read_text())[0]
    dev.write_text(json.dumps([{**record, "term_chunk_audio": str(tones / record["term_chunk_audio"])}]))
    adapted = ("--trainable", "lora", "--lora_targets", "*.q_proj", "--lora_r", "4")
    with caplog.at_level(logging.INFO):
        describe_plan(parse(flags(*adapted, "--dev_samples_path", str(dev), "--max_steps", "5")), ALONE)
    plan = plan_of(caplog)
    assert plan["adapters"] == "2 layers, r 4"
    assert plan["test clips"] == "10, dev 1"
    assert plan["steps"] == "3 an epoch, 5 in all"


def test_the_plan_is_told_once(flags: Flags, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bin.datasets.barrier", lambda: None)
    with caplog.at_level(logging.INFO):
        describe_plan(parse(flags()), replace(ALONE, rank=1, world_size=2))
    assert plan_of(caplog) == {}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (("--batch_size", "30", "--grad_accum_steps", "30", "--epochs", "1"), "batch_size: got 30, but an epoch has"),
        (("--batch_size", "200", "--grad_accum_steps", "4"), "batch_size: got 200, but an epoch has only 24 clips"),
        (("--test_samples_path", "{tones}/train.json"), "test clips have the same id"),
        (("--trainable", "lora", "--lora_targets", "*.qq_proj"), r"lora_targets: '\*.qq_proj' matches no module"),
        (("--attention", "flash"), "flash"),
        (("--glossary_path", "nowhere.json"), "--glossary_path is 'nowhere.json'"),
    ],
)
def test_the_plan_finds_what_would_stop_the_run(
    flags: Flags, tones: Path, wrong: tuple[str, ...], message: str
) -> None:
    config = parse(flags(*(flag.format(tones=tones) for flag in wrong)))
    with pytest.raises(ValueError, match=message):
        describe_plan(config, ALONE)
