"""The benchmark of fp8 products: both sides run at tiny shapes from one start, and figures are those of the sides."""

import pytest
import torch

from bench import fp8
from bench.findings import Findings
from bench.fp8 import Side, compare, measure
from bench.limits import Limits
from bench.ours import Shapes

LIMITS = Limits("some chip", "2", 1e12, 1e11)


def test_both_sides_are_measured_from_one_start(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "TASK_STEPS", 3)
    found = measure(LIMITS, tiny=True)
    assert [row["products"] for row in found.rows] == ["bf16", "fp8"]
    checks = {check.name.partition(":")[0]: check for check in found.checks}
    assert 0.9 < checks["audio"].value < 0.999999, "not even this much off: was anything quantised?"
    assert 0.9 < checks["terms"].value < 0.999999
    first, other, ours = (
        [float(value) for value in note.partition(": ")[2].split()] for note in found.notes if note.startswith("loss, ")
    )
    assert len(first) == len(other) == len(ours) == 3
    assert abs(first[0] - other[0]) < 0.01, "both begin with the same adapters"
    assert abs(first[0] - ours[0]) < 0.1
    assert first[-1] < first[0], "it learns"


def test_the_ratio_is_of_the_best_and_distances_are_told() -> None:
    unit_BE = torch.eye(4)
    plain = Side("bf16", 1.0, unit_BE, unit_BE, [[2.0, 1.0], [2.2, 0.8]])
    ours = Side("fp8", 1.0, unit_BE, unit_BE, [[2.1, 1.1]], timed={256: None})
    found = Findings("")
    compare(found, Shapes.of(tiny=True), LIMITS, plain, ours)
    ratio, audio, terms = found.checks
    assert ratio.value is None
    assert found.rows == [{"products": "fp8", "clips": 256, "ms": "out of memory"}]
    assert (audio.value, terms.value) == (1.0, 1.0)
    assert "fp8 0.1000, other dropout 0.2000" in found.notes[-2]


def test_a_chip_without_fp8_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fp8, "why_no_fp8", lambda *_: "needs another chip")
    with pytest.raises(RuntimeError, match="fp8 needs another chip"):
        measure(LIMITS)
