import pytest
import torch

from bench import bigbatch
from bench.bigbatch import check_gradient, largest_in_one_pass, many_clips, measure
from bench.limits import Limits
from bench.ours import Shapes, Training, batches, build

CPU = torch.device("cpu")


def test_a_whole_measurement(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigbatch, "NUM_DRAWN", 8)
    found = measure(Limits("some chip", "2", 1e12, 1e11), tiny=True)
    assert [(row["step"], row["clips"], row["a pass"]) for row in found.rows] == [
        ("one pass", 4, 4), ("two passes", 8, 4), ("naive two passes", 8, 4), ("two passes", 16, 4)
    ]  # fmt: skip
    assert found.checks[0].is_met
    assert found.checks[0].value > 0.9999999


def test_a_wrong_gradient_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU))
    real = training.backward

    def wrong(fed: object, clips_per_pass: int, num_kept: int) -> torch.Tensor:
        return real(fed, 0 if num_kept == 1 else clips_per_pass, num_kept)  # other chunks, so another dropout

    monkeypatch.setattr(training, "backward", wrong)
    with pytest.raises(RuntimeError, match="two-pass gradient: cosine"):
        check_gradient(training, batches(shapes, CPU, 4, 1)[0], 2)


def test_the_largest_size_that_fits(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU))
    real = training.step

    def step(fed: object, *more: int) -> torch.Tensor:
        if fed.batch.num_clips > 2:
            raise torch.OutOfMemoryError("too large")
        return real(fed, *more)

    monkeypatch.setattr(training, "step", step)
    assert largest_in_one_pass(training, shapes, (4, 3, 2, 1))[0] == 2
    with pytest.raises(RuntimeError, match="not even 3 clips fit"):
        largest_in_one_pass(training, shapes, (4, 3))


def test_waveforms_return_but_terms_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bigbatch, "NUM_DRAWN", 4)
    batch = many_clips(8, Shapes.of(tiny=True), CPU).batch
    assert batch.num_samples[:4] == batch.num_samples[4:]
    assert len(set(batch.term_keys_N.tolist())) == batch.num_terms
