"""What `auto` chooses for a small model under caps, and that training under it gives the same gradients."""

import itertools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import bin.train
from bench.drawn import as_batch, draw
from bench.ours import Shapes, build
from bin.config import Config, parse
from bin.fit import FRAGMENTS, costs, count_tokens, fit_memory, room_bytes
from bin.step import encode_in_passes
from data.batches import Batch
from model.dual import DualEncoder

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def model() -> DualEncoder:
    torch.manual_seed(0)
    return build(Shapes.of(tiny=True), CPU).model


@pytest.fixture(scope="module")
def batches() -> list[Batch]:
    generator = torch.Generator().manual_seed(0)
    return [as_batch(draw(6, generator), i, Shapes.of(tiny=True).vocabulary) for i in range(3)]


def fitted(model: DualEncoder, batches: Any, cap_gib: float, layers: Any = "auto", passes: Any = 0) -> tuple[Any, ...]:
    config = Config()
    config.model.checkpointing, config.model.memory_cap_gib, config.train.clips_per_pass = layers, cap_gib, passes
    config.validate()
    model.audio_tower.num_checkpointed = model.language_model.num_checkpointed = 0
    clips = fit_memory(config, model, iter(batches)).clips_per_pass
    return model.audio_tower.num_checkpointed, model.language_model.num_checkpointed, clips


def cap_for(model: DualEncoder, num_bytes: float) -> float:
    """GiB that leave so many bytes to a step."""
    at_10 = room_bytes(10.0, model)
    assert at_10 is not None
    return 10.0 + (num_bytes - at_10) / 2**30 / (1 - FRAGMENTS)


def test_nothing_is_chosen_where_nothing_is_auto(model: DualEncoder) -> None:
    assert fitted(model, (), 1.0, False, 5) == (0, 0, 5)


def test_a_cpu_without_a_cap_is_unlimited(
    model: DualEncoder, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO):
        assert fitted(model, batches, 0.0) == (0, 0, 0)
    assert "unlimited on cpu" in caplog.text


def test_layers_are_recomputed_from_the_audio_tower_on(
    model: DualEncoder, batches: list[Batch], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("model.memory.AUDIO_FRONT_BYTES", 0)  # more than all layers of a model this small
    depth = (len(model.audio_tower.layers), len(model.language_model.layers))
    assert fitted(model, batches, 100.0) == (0, 0, 0)
    audio, text = costs(model)
    counts = [count_tokens(model, batch) for batch in batches]
    whole = 1.12 * sum(
        cost.bytes_of(0, max(n)) for cost, n in zip((audio, text), zip(*counts, strict=True), strict=True)
    )
    chosen = [
        fitted(model, batches, cap_for(model, num_bytes))[:2]
        for num_bytes in (whole, 0.9 * whole, 0.8 * whole, 0.6 * whole, 0)
    ]
    assert chosen == sorted(chosen)
    assert chosen[-1] == depth
    assert chosen[0] == (0, 0)


def test_too_small_a_cap_is_told_or_refused(
    model: DualEncoder, batches: list[Batch], caplog: pytest.LogCaptureFixture
) -> None:
    fitted(model, batches, 0.5)
    assert "may not fit" in caplog.text
    with pytest.raises(ValueError, match=r"memory_cap_gib: -\d.* too little for one clip"):
        fitted(model, batches, 0.5, False, "auto")


def test_passes_take_over_where_layers_do_not_do(model: DualEncoder, batches: list[Batch]) -> None:
    assert fitted(model, batches, 100.0, False, "auto") == (0, 0, 0)
    assert fitted(model, batches, 100.0, "auto", "auto") == (0, 0, 0)
    tight = fitted(model, batches, cap_for(model, 1e6), "auto", "auto")
    assert tight[:2] == (0, 0)
    assert 1 <= tight[2] < 6
    assert fitted(model, batches, cap_for(model, 1e6), False, "auto") == tight


def test_recomputed_layers_give_the_same_gradients(model: DualEncoder, batches: list[Batch]) -> None:
    found = []
    for counts in ((0, 0), (1, 0), (2, 1)):
        model.audio_tower.num_checkpointed, model.language_model.num_checkpointed = counts
        model.zero_grad(set_to_none=True)
        torch.manual_seed(3)
        encoded = encode_in_passes(model, batches[0], 0).encoded
        (encoded.audio_BE.sum() + encoded.text_TE.square().sum() + encoded.term_LE.sum()).backward()
        found.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    model.zero_grad(set_to_none=True)
    for other in found[1:]:
        torch.testing.assert_close(other, found[0], rtol=1e-5, atol=1e-7)


def test_tokens_are_those_of_the_layouts(model: DualEncoder, batches: list[Batch]) -> None:
    audio, text = count_tokens(model, batches[0])
    assert audio == model.audio_tower.layout(batches[0].num_samples, CPU).tokens.place_P.numel()
    assert text == len(batches[0].token_ids_P)


def test_a_run_on_auto_learns_as_one_that_keeps_everything(flags: Callable[..., list[str]], tmp_path: Path) -> None:
    curves = []
    for name, more in (("kept", ()), ("auto", ("--checkpointing", "auto", "--memory_cap_gib", "0.5"))):
        assert bin.train.train(parse(flags("--run_name", name, "--epochs", "1", "--trainable", "lora", *more))) == 0
        lines = [json.loads(line) for line in (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()]
        curves.append([line["train/loss"] for line in lines if "train/loss" in line])
    assert "layers are recomputed" in next((tmp_path / "runs" / "auto").glob("train_*.log")).read_text()
    assert curves[0] == pytest.approx(curves[1], rel=1e-6)


def test_graphs_that_do_not_fit_beside_a_step_are_off_and_nothing_is_recomputed(
    model: DualEncoder, batches: list[Batch], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Recomputed layers keep graphs away as well, so that to recompute for them would be to lose twice."""
    monkeypatch.setattr("model.memory.AUDIO_FRONT_BYTES", 0)
    tight = next(cap for cap in (cap_for(model, 1000.0 * n) for n in itertools.count(1)) if not any(
        fitted(model, batches, cap)
    ))  # fmt: skip
    loose = cap_for(model, 1.31 * (room_bytes(tight, model) or 0.0))
    monkeypatch.setattr("bin.fit.graphs_spread", lambda *_: 1.3)
    config = Config()
    config.model.checkpointing = "auto"
    for wanted, cap, expected in (("auto", tight, "off"), ("auto", loose, "auto"), ("on", tight, "on")):
        config.model.cuda_graphs, config.model.memory_cap_gib = wanted, cap
        with caplog.at_level(logging.INFO):
            assert fit_memory(config, model, iter(batches)).cuda_graphs == expected
        assert model.audio_tower.num_checkpointed == model.language_model.num_checkpointed == 0
    assert caplog.text.count("no CUDA graphs, with which a step would take up to") == 1
    assert fitted(model, batches, tight, False, "auto")[2] > 0, "passes leave room for graphs"
