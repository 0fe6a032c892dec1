import json

import pytest
import torch

from bench import memory
from bench.limits import Limits
from bench.memory import check_gradient, main, measure, set_plan
from bench.ours import Shapes, Training, batches, build

CPU = torch.device("cpu")


def test_a_side_prints_a_line_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--side", "recomputed", "--tiny"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [next(iter(line)) for line in lines] == ["model_gib", "cosine", "clips", "clips"]
    assert lines[1]["cosine"] > 0.99999
    assert lines[2]["formula_gib"] > 0


def test_a_gradient_that_differs_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU))
    fed = batches(shapes, CPU, 2, 3)
    real = iter(fed)
    monkeypatch.setattr(memory, "gradient", lambda training, _: memory_gradient(training, next(real)))
    with pytest.raises(RuntimeError, match="gradient with recomputed layers: cosine"):
        check_gradient(training, shapes, 2)


memory_gradient = memory.gradient


def test_a_plan_is_set() -> None:
    training = Training(build(Shapes.of(tiny=True), CPU))
    set_plan(training, 2, 1)
    assert (training.model.audio_tower.num_checkpointed, training.model.language_model.num_checkpointed) == (2, 1)


def test_parts_become_rows_and_the_largest_that_fits_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    line = {"num_audio": 0, "parks": False, "num_text": 0, "peak_gib": 30.0, "before_gib": 15.0, "formula_gib": 14.0,
            "audio_mib_a_clip": 60.0, "text_mib_a_clip": 30.0}  # fmt: skip
    sides = {
        "whole": [line | {"clips": 240}, line | {"clips": 280, "out_of_memory": True}],
        "recomputed": [{"cosine": 1.0}, line | {"clips": 4000, "num_audio": 32}],
    }
    monkeypatch.setattr(memory, "run_side", lambda command, _: (sides.get(command[2], []), None))
    found = measure(Limits("some chip", "2", 1e12, 1e11), tiny=True)
    checks = {check.name: (check.value, check.is_met) for check in found.checks}
    assert checks["clips without recomputing"] == (240, False)
    assert checks["clips with recomputed layers"] == (4000, True)
    assert [row["GiB"] for row in found.rows] == [30.0, "out of memory", 30.0]
