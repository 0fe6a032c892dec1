import torch

from bench.ours import Shapes, Training, batches, build, count_tokens, time_steps, without_dropout

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
    timed = time_steps(training, fed, steps=3, in_a_row=2)
    assert float(training.backward(fed[0])) < before
    assert (timed.clips, timed.steps, timed.peak_gib) == (3, 3, None)
    assert timed.seconds > 0
    assert timed.seconds_in_a_row > 0
    audio, text = count_tokens(fed[0])
    assert audio == training.model.audio_tower.layout(fed[0].batch.num_samples, CPU).tokens.place_P.numel()
    assert text == len(fed[0].batch.token_ids_P)
