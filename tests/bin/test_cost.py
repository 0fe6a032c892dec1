"""Hours and dollars: arithmetic by hand, a real run directory's shape, budgets, the price file."""

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from bin.config import Config, to_toml
from bin.cost import PRICES, CostSettings, main, named_gpu, offers, workload

SMALL: dict[str, Any] = {
    "date": "2030-01-01",
    "clips_per_s_per_gpu": {"A": 100.0, "B-80": 200.0},
    "lost_per_interruption": {"hours": 0.5},
    "modal": {"gpu_hour": {"A": 2.0}, "cpu_core_hour": 0.05, "memory_gib_hour": 0.01},
    "clouds": {
        "modal": {"as_of": "2030", "interruptions_per_hour": 0.0},
        "other": {
            "as_of": "2029",
            "spot_as_of": "2028",
            "storage_gib_month": 7.3,
            "interruptions_per_hour": 0.0,
            "spot_interruptions_per_hour": 0.1,
            "gpu_hour": {"A": 3.0, "B-80": 5.0},
            "spot_gpu_hour": {"B-80": 1.0},
        },
    },
}


@pytest.fixture
def prices(tmp_path: Path) -> Path:
    path = tmp_path / "prices.toml"
    path.write_text(tomli_w.dumps(SMALL))
    return path


def found(**settings: Any) -> dict[tuple[str, str, str], Any]:
    cfg = CostSettings(efficiency=0.5, storage_gib=100.0, **settings)
    return {(o.cloud, o.gpu, o.kind): o for o in offers(workload(cfg, SMALL), cfg, SMALL)}


def test_hours_and_dollars_by_hand() -> None:
    """3.6 M clips x 2 epochs at 100 a second on 4 GPUs: 5 h of steps, 10 h at efficiency 0.5."""
    table = found(clips=3_600_000, epochs=2, gpus=4)
    on_modal = table["modal", "A", "on demand"]
    assert on_modal.hours == pytest.approx(10.0)
    assert on_modal.gpu_dollars == pytest.approx(10 * 4 * 2.0)
    assert on_modal.machine_dollars == pytest.approx(10 * 4 * (8 * 0.05 + 32 * 0.01))
    assert on_modal.storage_dollars == 0.0
    elsewhere = table["other", "A", "on demand"]
    assert elsewhere.total == pytest.approx(10 * 4 * 3.0 + 10 * 100 * 7.3 / 730)
    assert (elsewhere.as_of, table["other", "B-80", "spot"].as_of) == ("2029", "2028")
    spot = table["other", "B-80", "spot"]  # 5 h, and 0.5 interruptions of half an hour
    assert (spot.interruptions, spot.hours) == (pytest.approx(0.5), pytest.approx(5.25))


def test_a_measured_rate_is_carried_over_in_proportion() -> None:
    table = found(clips=3600, epochs=1, gpus=1, clips_per_s=10.0, measured_on="A")
    assert table["other", "A", "on demand"].hours == pytest.approx(0.2)
    assert table["other", "B-80", "on demand"].hours == pytest.approx(0.1)


def test_a_run_directory_is_read(tmp_path: Path, prices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = to_toml(Config())
    config["train"] |= {"batch_size": 8, "epochs": 3}
    (tmp_path / "config.toml").write_text(tomli_w.dumps(config))
    (tmp_path / "env.json").write_text(json.dumps({"device": "NVIDIA B-SXM4-80GB", "world_size": 2}))
    rates = [1.0, 400.0, 420.0, 410.0]  # the first counts warm-up
    lines = [{"step": i + 1, "epoch": (i + 1) / 100, "train/clips_per_s": rate} for i, rate in enumerate(rates)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4}]))
    assert main(["--run", str(tmp_path), "--prices", str(prices), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["workload"]
    assert (told["clips"], told["epochs"]) == (800, 3)  # 100 steps an epoch
    assert told["rates"] == {"A": 102.5, "B-80": 205.0}  # of one of the two processes


def test_a_budget_that_nothing_fits_ends_with_1(prices: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--clips", "3600000", "--epochs", "2", "--prices", str(prices)]
    assert main([*flags, "--budget", "1000"]) == 0
    assert main([*flags, "--budget", "0.5"]) == 1
    assert "nothing fits: the cheapest is" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "clips: not given; allowed"),
        (["--clips", "0"], "allowed: 1 or more"),
        (["--clips", "9", "--efficiency", "0"], "efficiency: got 0"),
        (["--clips", "9", "--clips_per_s", "5"], "measured_on: got None; allowed: T4"),
        (["--run", "/nowhere"], "/nowhere is no run directory"),
    ],
)
def test_wrong_settings_name_their_field(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("NVIDIA A100-SXM4-40GB", "A100-40GB"),
        ("NVIDIA A100 80GB PCIe", "A100-80GB"),
        ("NVIDIA H100 80GB HBM3", "H100"),
        ("NVIDIA L40S", "L40S"),
        ("NVIDIA L4", "L4"),
        ("x86_64", None),
    ],
)
def test_devices_by_name(device: str, name: str | None) -> None:
    assert named_gpu(device, list(tomllib.loads(PRICES.read_text())["clips_per_s_per_gpu"])) == name


def test_the_price_file_is_whole() -> None:
    prices = tomllib.loads(PRICES.read_text())
    known = set(prices["clips_per_s_per_gpu"])
    for name, cloud in prices["clouds"].items():
        assert cloud["as_of"][:2] == "20", name
        assert cloud["source"].startswith("https://"), name
        gpus = (prices[name]["gpu_hour"] if name in prices else cloud["gpu_hour"]).keys()
        assert gpus <= known, name
        assert set(cloud.get("spot_gpu_hour", {})) <= set(gpus), name
