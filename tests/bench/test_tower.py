import pytest
import torch

from bench import tower
from bench.limits import Limits
from bench.ours import Shapes
from bench.tower import Clips, check_parity, measure, our_tower, their_tower

CPU = torch.device("cpu")


def test_both_towers_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tower, "SECONDS", (1, 2))
    found = measure(Limits("some chip", "2", 1e12, 1e11), tiny=True)
    assert [row["clips"] for row in found.rows] == ["2 of 1 s", "2 of 2 s"]
    assert all(row["x both"] > 0 for row in found.rows)
    assert [check.value is not None for check in found.checks] == [True, True]


def test_towers_that_differ_are_refused() -> None:
    shapes = Shapes.of(tiny=True)
    ours = our_tower(shapes, CPU, torch.float32)
    theirs = their_tower(ours, shapes, CPU, torch.float32)
    clips = Clips(1, 2, ours, CPU, torch.float32)
    assert check_parity(ours, theirs, clips) > 0.99999
    with torch.no_grad():
        theirs.layers[1].fc2.weight.normal_()
    with pytest.raises(RuntimeError, match="do not compute the same"):
        check_parity(ours, theirs, clips)
