import pytest
import torch

from bench import memory
from bench.findings import Findings
from bench.limits import Limits
from bench.memory import TINY_SIZES, Tried, check_gradient, measure, report, set_plan, try_sizes
from bench.ours import Shapes, Training, batches, build
from model.memory import Plan

CPU = torch.device("cpu")


def test_a_whole_measurement() -> None:
    found = measure(Limits("some chip", "2", 1e12, 1e11), tiny=True)
    assert [row["clips"] for row in found.rows] == [*TINY_SIZES, *TINY_SIZES]
    assert all(row["formula"] > 0 for row in found.rows)
    assert found.checks[0].value > 0.99999


def test_sizes_end_with_the_first_that_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU))
    real = training.step

    def step(fed: object) -> torch.Tensor:
        if fed.batch.num_clips > 2:
            raise torch.OutOfMemoryError("too large")
        return real(fed)

    monkeypatch.setattr(training, "step", step)
    tried = try_sizes(training, shapes, False, (1, 2, 3, 4))
    assert [(one.clips, one.fits) for one in tried] == [(1, True), (2, True), (3, False)]


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


def test_the_largest_that_fits_is_checked() -> None:
    def tried(clips: int, fits: bool, num_audio: int) -> Tried:
        plan = Plan(num_audio, 0, 0, fits)
        return Tried(clips, plan, fits, 30.0 if fits else None, 15.0 if fits else None, 14.0, 60.0, 30.0, 1.0)

    found = Findings("memory")
    report(found, [tried(240, True, 0), tried(280, False, 0)], [tried(4000, True, 32)], 1.0)
    checks = {check.name: (check.value, check.is_met) for check in found.checks}
    assert checks["clips without recomputing"] == (240, False)
    assert checks["clips with recomputed layers"] == (4000, True)
    assert [row["GiB"] for row in found.rows] == [30.0, "out of memory", 30.0]
