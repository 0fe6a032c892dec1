"""The runner: parts in processes of their own, what fails is reported, and everything is written."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from bench import all as every
from bench.findings import Findings
from bench.limits import Limits

ROOT = Path(__file__).resolve().parent.parent.parent
LIMITS = {"device": "Some Chip 80GB", "torch": "2", "matrix_flops": 1e15, "copy_bytes": 1e12}


def found(value: float) -> dict[str, object]:
    one = Findings("a part", rows=[{"side": "ours", "clips": 16, "clips/s": 100.0, "ms": 1.0}])
    one.check("ratio", value, 2.0)
    return one.to_json() | {"seconds": 1.0}


def test_a_failed_part_is_reported_and_the_others_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run_part(name: str, tiny: bool, limits: Limits | None, limit_s: float) -> dict[str, object]:
        assert limit_s <= every.WHOLE_S
        parts = {"limits": LIMITS | {"environment": {}}, "step": found(3.0), "loss": {"error": "boom", "seconds": 1.0}}
        return parts.get(name, found(1.0))

    monkeypatch.setattr(every, "run_part", run_part)
    assert every.main(["--parts", "step", "loss", "tower", "--out", str(tmp_path)]) == 1
    report = json.loads((tmp_path / "Some-Chip-80GB.json").read_text())
    assert list(report["parts"]) == ["step", "loss", "tower"]
    assert report["parts"]["step"]["checks"][0]["is_met"]
    assert not report["parts"]["tower"]["checks"][0]["is_met"]
    plot = tmp_path / "Some-Chip-80GB.png"
    assert plot.exists() == (find_spec("matplotlib") is not None)
    assert not plot.exists() or plot.stat().st_size > 10_000
    table = next(part for part in capsys.readouterr().out.split("\n\n") if part.startswith("part")).splitlines()
    assert [line.split()[0] for line in table[2:]] == ["step", "loss", "tower"]
    assert "FAILED" in table[3]
    assert table[2].endswith("ok")
    assert table[4].endswith("MISSED")


def test_parts_together_end_in_time() -> None:
    assert every.WHOLE_S < 9 * 60
    assert set(every.PARTS) >= {"step", "tower", "lora", "loss", "bank", "memory", "bigbatch"}


def test_a_part_runs_in_a_process_of_its_own() -> None:
    """Run in a process of its own itself: the one that the parts are forked from lives as long as it."""
    code = (
        "import json\n"
        "from bench import all as every\n"
        "from bench.limits import Limits\n"
        f"limits = Limits(**{LIMITS!r})\n"
        "parts = [('limits', None, 120.0), ('no_such_part', limits, 120.0), ('limits', None, 0.01)]\n"
        "found = [every.run_part(name, True, given, limit_s) for name, given, limit_s in parts]\n"
        "print(json.dumps(found))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    measured, failed, hung = json.loads(done.stdout.splitlines()[-1])
    assert measured["matrix_flops"] > 0
    assert "torch" in measured["environment"]
    assert "No module named 'bench.no_such_part'" in failed["error"]
    assert hung["error"].startswith("stopped after 0 s")


def test_parts_measured_now_join_an_earlier_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = dict(LIMITS)

    def run_part(name: str, tiny: bool, limits: Limits | None, limit_s: float) -> dict[str, object]:
        return device | {"environment": {}} if name == "limits" else found(1.0)

    monkeypatch.setattr(every, "run_part", run_part)
    for parts in (["step"], ["tower"]):
        assert every.main(["--parts", *parts, "--out", str(tmp_path)]) == 0
    path = tmp_path / "Some-Chip-80GB.json"
    assert list(json.loads(path.read_text())["parts"]) == ["step", "tower"]
    device["torch"] = "3"  # figures of another torch say nothing beside these
    assert every.main(["--parts", "loss", "--out", str(tmp_path)]) == 0
    assert list(json.loads(path.read_text())["parts"]) == ["loss"]
