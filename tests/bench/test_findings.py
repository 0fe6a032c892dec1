import json
from pathlib import Path

import pytest

from bench.findings import Check, Findings, number, run_alone
from bench.limits import Limits


def example() -> Findings:
    found = Findings("a title", rows=[{"size": 4096, "ms": 0.51234}, {"size": 8192, "x": "out of memory"}])
    found.check("ratio", 1.5, 1.6)
    found.check("memory", 0.02, 1 / 40, "at most")
    found.check("rate", None, 2)
    return found


def test_checks_hold_figures_against_targets() -> None:
    assert [check.is_met for check in example().checks] == [False, True, False]
    assert not Check("nan", float("nan"), 1.0).is_met
    assert Check("ratio", 1.5, 1.6).line() == "MISSED  ratio: 1.50, at least 1.60"
    assert Check("rate", None, 2).line() == "MISSED  rate: not measured, at least 2.00"


def test_text_has_every_row_and_check() -> None:
    lines = example().text().splitlines()
    assert lines[0] == "a title"
    assert lines[1].split() == ["size", "ms", "x"]
    assert lines[3].split() == ["4,096", "0.512", "-"]
    assert lines[4].split() == ["8,192", "-", "out", "of", "memory"]
    assert len(lines) == 8


def test_json_and_back() -> None:
    saved = json.loads(json.dumps(example().to_json()))
    assert [check["is_met"] for check in saved["checks"]] == [False, True, False]
    assert Findings.from_json(saved) == example()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *[(0.0, "0"), (12345.6, "12,346"), (56.78, "56.8"), (0.5, "0.500"), (3e-5, "3e-05"), (2e9, "2e+09")],
        *[(0.9994, "0.99940"), (1 - 1e-15, "1.0000000"), (0.95, "0.950")],
    ],
)
def test_numbers_are_written_for_people(value: float, text: str) -> None:
    assert number(value) == text


def test_a_benchmark_as_a_program(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = []

    def measure(limits: Limits, tiny: bool) -> Findings:
        asked.append((limits, tiny))
        return example()

    out = tmp_path / "found.json"
    assert run_alone(measure, ["--tiny", "--json", str(out)]) == 0
    assert asked[0][1] is True
    saved = json.loads(out.read_text())
    assert saved["limits"]["matrix_flops"] == asked[0][0].matrix_flops
    assert saved["title"] == "a title"
    assert "MISSED  ratio" in capsys.readouterr().out
