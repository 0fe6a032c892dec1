import gc
import json
import weakref
from pathlib import Path

import pytest
import torch

from bench.ours import (
    Shapes,
    Training,
    batches,
    build,
    count_tokens,
    put_back,
    time_steps,
    trained,
    warm_up,
    without_dropout,
)
from bin import step
from bin.step import encode_in_passes

CPU = torch.device("cpu")


def test_the_published_shapes_are_the_7b_models() -> None:
    shapes = Shapes.of()
    assert shapes.audio["d_model"] == 1280
    assert shapes.text["hidden_size"] == 4096
    assert 0.62e9 < shapes.audio_parameters() < 0.64e9
    assert 6.4e9 < shapes.text_parameters() < 6.5e9
    assert shapes.vocabulary == 150_000
    assert shapes.operations(10, 0) == 40 * shapes.audio_parameters()
    halved = shapes.of_depth(16)
    assert halved.text_parameters() * 2 == shapes.text_parameters()
    assert halved.audio_parameters() * 2 == shapes.audio_parameters()


def test_counted_matrices_are_those_of_the_layers() -> None:
    shapes = Shapes.of(tiny=True)
    model = build(shapes, CPU).model
    for tower, counted in (
        (model.audio_tower, shapes.audio_parameters()),
        (model.language_model, shapes.text_parameters()),
    ):
        matrices = [p for n, p in tower.layers.named_parameters() if p.ndim == 2 and "lora_" not in n]
        assert sum(p.numel() for p in matrices) == counted


def test_steps_are_timed_and_train() -> None:
    torch.manual_seed(0)
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU, without_dropout()))
    fed = batches(shapes, CPU, 3, 2)
    before = float(training.backward(fed[0]))
    training.zero()
    timed = time_steps(training, fed, steps=3, in_a_row=2)
    assert float(training.backward(fed[0])) < before
    assert (timed.clips, timed.steps, timed.peak_gib) == (3, 3, None)
    assert (timed.captures, timed.capture_s, timed.waste) == (0, 0.0, 0.0)  # a CPU has no graphs
    assert timed.seconds > 0
    assert timed.seconds_in_a_row > 0
    audio, text = count_tokens(fed[0])
    assert audio == training.model.audio_tower.layout(fed[0].batch.num_samples, CPU).tokens.place_P.numel()
    assert text == len(fed[0].batch.token_ids_P)


def test_architecture_files_say_all_of_the_shapes(tmp_path: Path) -> None:
    named = Shapes.of().write(tmp_path)
    for path, config in ((named.audio_model, Shapes.of().audio), (named.text_model, Shapes.of().text)):
        assert json.loads(Path(str(path)).read_text()) == config


def test_a_curve_repeats_from_the_same_start_and_no_graph_outlives_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    shapes = Shapes.of(tiny=True)
    built = build(shapes, CPU)
    start, fed, kept = trained(built.model), batches(shapes, CPU, 3, 2), []
    real = step.loss_share

    def watched(*args: object) -> object:
        found = real(*args)
        kept.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(step, "loss_share", watched)
    curves = []
    gc.disable()
    for _ in range(2):
        put_back(built.model, start)
        torch.manual_seed(1)
        curves.append(Training(built).curve([*fed, fed[0]]))
    gc.enable()
    assert curves[0] == curves[1]
    assert curves[0][2] != curves[0][0]
    assert len(kept) == 6
    assert not any(reference() is not None for reference in kept)


def test_gradients_are_those_of_the_trainers_loss_and_add_up() -> None:
    torch.manual_seed(0)
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU, without_dropout()))
    [fed] = batches(shapes, CPU, 4, 1)
    training.zero()
    encoded = encode_in_passes(training.model, fed, 0).encoded
    training.share(fed, encoded).backward()
    expected = training.gradient()
    assert expected.abs().max() > 0
    for num_kept in (0, 1, 2):
        training.zero()
        training.backward(fed, 2, num_kept)
        torch.testing.assert_close(training.gradient(), expected, rtol=1e-4, atol=1e-6)
    training.backward(fed)
    torch.testing.assert_close(training.gradient(), 2 * expected, rtol=1e-4, atol=1e-6)


class Graphs:
    """Captures as many as it is told to, a number a step."""

    def __init__(self, wanted: list[int]) -> None:
        self.wanted, self.num_captures, self.capture_s, self.waste = wanted, 0, 0.0, 0.0

    def start(self) -> None:
        self.num_captures += self.wanted.pop(0) if self.wanted else 0


def test_captures_are_waited_for() -> None:
    shapes = Shapes.of(tiny=True)
    training = Training(build(shapes, CPU, without_dropout()))
    fed = batches(shapes, CPU, 2, 2)
    for wanted, num_steps in (([0, 2, 1, 0], 6), ([], 4), ([1] * 99, 8)):
        training.graphs = Graphs(wanted)
        training._num_steps = 0
        warm_up(training, fed)
        assert training._num_steps == num_steps
    with pytest.raises(RuntimeError, match="captured while steps were timed"):
        time_steps(training, fed, steps=1, in_a_row=1)
