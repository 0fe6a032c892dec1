"""At small shapes on the CPU, where packs are filled up and nothing is captured."""

import pytest
import torch

from bench import graphs
from bench.ours import Training

SMALL = ["--clips", "5", "--shapes", "tiny", "--device", "cpu", "--steps", "3", "--batches", "2"]


def test_parity_of_padded_and_plain_steps(capsys: pytest.CaptureFixture[str]) -> None:
    assert graphs.main(SMALL) == 0
    printed = capsys.readouterr().out
    assert "gradient at 5 clips, dropout off: cosine 1.0000000, norm ratio 1.00000" in printed
    assert printed.count("largest difference 0.0000") == 2


def test_another_gradient_and_another_curve_are_told(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real_gradient, real_step = Training.gradient, Training.step

    def other_gradient(training: Training) -> torch.Tensor:
        found = real_gradient(training)
        return found if training.graphs is None else found + found.std()

    monkeypatch.setattr(Training, "gradient", other_gradient)
    assert graphs.main(SMALL) == 1
    monkeypatch.setattr(Training, "gradient", real_gradient)

    def other_step(training: Training, *more: object) -> torch.Tensor:
        return real_step(training, *more) + (0.0 if training.graphs is None else 0.1)

    monkeypatch.setattr(Training, "step", other_step)
    assert graphs.main(SMALL) == 1
    assert "eager/graphed" in capsys.readouterr().out


def test_each_training_begins_with_the_same_weights_and_graphs_stand_in() -> None:
    shapes = graphs.Shapes.of(tiny=True)
    torch.manual_seed(0)
    built = graphs.build(shapes, torch.device("cpu"))
    start = graphs.trained(built.model)
    fed = graphs.batches(shapes, torch.device("cpu"), 2, 2)
    curves = [graphs.curve(built, start, mode, 0.1, fed, 3) for mode in ("padded", "eager", "padded")]
    assert curves[0] == curves[2]
    assert curves[0] != curves[1]  # the padded shape draws another dropout
    training = graphs.begin(built, start, "padded", 0.0)
    assert training.graphs is built.model.graphs is not None
    assert all(torch.equal(value, start[name]) for name, value in graphs.trained(built.model).items())
    training.release()
    assert built.model.graphs is training.graphs is None
