"""What the Modal apps share: GPU names and counts, which files go along."""

import tomllib
from pathlib import Path

import modal_setup as setup
import pytest

from tests.launch.standins import ROOT


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("A100-40GB:8", ("A100-40GB", 8)),
        ("a100-80gb:4", ("A100-80GB", 4)),
        ("H100", ("H100", 1)),
        ("l40s:2", ("L40S", 2)),
    ],
)
def test_gpus_as_users_write_them(text: str, found: tuple[str, int]) -> None:
    assert setup.parse_gpu(text) == found


@pytest.mark.parametrize("text", ["A100:8", "H100:9", "A10:8", "H100:0", "H100:many", "", "A100-40GB:8:2", "RTX4090"])
def test_what_modal_does_not_have_is_refused_here(text: str) -> None:
    with pytest.raises(ValueError, match=r"gpu: got .*; allowed: "):
        setup.parse_gpu(text)


def test_every_gpu_has_a_price_and_a_speed() -> None:
    prices = tomllib.loads((ROOT / "launch" / "prices.toml").read_text())
    assert set(prices["modal"]["gpu_hour"]) == set(setup.GPUS) == set(prices["clips_per_s_per_gpu"])
    assert setup.parse_gpu(setup.DEFAULT_GPU) == ("A100-40GB", 8)


def test_cores_and_memory_go_with_the_gpus() -> None:
    assert setup.resources("A100-40GB", 8) == (64, 262_144)
    assert setup.resources("H100", 1) == (8, 32_768)


@pytest.mark.parametrize(
    "path",
    ["bin/train.py", "model/text_tower.py", "launch/configs/quickstart.toml", "launch/configs/towers/small_audio.json",
     "launch/attempts.py", "samples/telephony/train.json", "samples/telephony/audio/hello.ogg", "pyproject.toml"],
)  # fmt: skip
def test_code_settings_and_sample_go_along(path: str) -> None:
    assert (ROOT / path).exists()
    assert not setup.is_left_out(Path(path))


@pytest.mark.parametrize(
    "path",
    ["data/xl_term_level_chunks_merged.json", "data/samples/xl/term_level_chunks_500000_1000000.json", ".git/config",
     "data/audio/a.wav", "runs/a/model_best.pt", ".venv/bin/python", "bin/__pycache__/train.pyc", "tests/bin/tones.py",
     "logs/train.log", "launch/.secret.json", "notes.txt", ".env"],
)  # fmt: skip
def test_data_runs_and_hidden_files_stay(path: str) -> None:
    assert setup.is_left_out(Path(path))


def test_requirements_are_pinned_by_the_constraints() -> None:
    wanted = setup.requirements(ROOT)
    assert any(line.startswith("torch>=") for line in wanted)
    pins = {line.split("==")[0].lower() for line in (ROOT / "launch" / "constraints.txt").read_text().splitlines()}
    names = {line.split(">")[0].split("=")[0].strip().lower() for line in wanted}
    assert {name.replace("_", "-") for name in names} <= {pin.replace("_", "-") for pin in pins}
