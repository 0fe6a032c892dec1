"""The scheme tabled in model/init.py."""

import math

import pytest
import torch
from transformers.models.whisper.modeling_whisper import sinusoids as whisper_sinusoids

from model.build import build_model
from model.init import sinusoids
from model.settings import ModelSettings


@pytest.fixture
def model(architecture_files):
    settings = ModelSettings(audio_model=architecture_files[0], text_model=architecture_files[1], trainable="full")
    return build_model(settings).model


def test_scales(model):
    for path, parameter in model.named_parameters():
        owner, leaf = path.split(".")[-2:]
        if leaf == "bias":
            assert not parameter.any(), path
        elif "norm" in owner:
            assert (parameter == 1).all(), path
        elif owner == "embed_positions":
            continue
        else:
            fan_in = 1 if owner == "embed_tokens" else math.prod(parameter.shape[1:])
            branches = 4 if owner in ("out_proj", "fc2", "o_proj", "down_proj") else 1  # two layers of two branches
            assert parameter.std().item() == pytest.approx((fan_in * branches) ** -0.5, rel=0.15), path


def test_positions_are_whispers(model):
    torch.testing.assert_close(model.audio_tower.embed_positions.weight, whisper_sinusoids(1500, 32), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="d_model: got 31, must be even"):
        sinusoids(4, 31)


def test_the_stream_keeps_its_scale(model, make_pack):
    pack = make_pack([0.5])
    layout = model.audio_tower.layout(pack.num_samples, "cpu")
    scales = []

    def start(x_PD, delta_PD, *_):
        return x_PD if delta_PD is None else x_PD + delta_PD

    for layer in model.audio_tower.layers:
        layer.register_forward_hook(lambda _, args, out: scales.append((sum(out).std() / start(*args).std()).item()))
    model.audio_tower(model.log_mel(pack.pcm_S, layout), layout)
    assert all(0.8 < scale < 1.6 for scale in scales), scales
