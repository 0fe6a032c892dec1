"""Layers recomputed from parked inputs: the values, gradients and random numbers of layers that are kept."""

import pytest
import torch
from torch import nn

from lora.inject import inject_lora
from lora.settings import LoraSettings
from model.build import build_model
from model.parking import Parking, run_layers
from model.settings import ModelSettings

DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"))]


class Layer(nn.Module):
    """Dropout of a product, and the sum that was there."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8, device=device)

    def forward(self, x, delta, scale):
        assert delta is None
        y = nn.functional.dropout(self.linear(x), 0.3, training=True)
        return x * scale, y


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("is_frozen", [True, False])
def test_gradients_are_those_of_kept_layers(device, is_frozen):
    torch.manual_seed(0)
    layers = [Layer(device) for _ in range(4)]
    start = torch.randn(5, 8, device=device, requires_grad=not is_frozen)
    found = []
    for parks in (False, True):
        torch.manual_seed(1)
        parking, x = Parking(torch.device(device)), start
        for layer in layers:
            x, delta = parking.run(layer, x, 0.5) if parks else layer(x, None, 0.5)
            x = x + delta
        x.square().sum().backward()
        after = torch.rand(3)
        found.append([x.detach(), after, *(layer.linear.weight.grad for layer in layers)])
        found[-1] += [] if is_frozen else [start.grad]
        start.grad = None
        for layer in layers:
            layer.zero_grad(set_to_none=True)
        assert len(parking.places) == (4 if parks else 0)
    for own, expected in zip(*found, strict=True):
        torch.testing.assert_close(own, expected)


@pytest.mark.parametrize("device", DEVICES)
def test_towers_with_adapters_and_dropout(device, write_qwen2_audio, make_pack):
    settings = ModelSettings(model_name=str(write_qwen2_audio("v4")), tower_dropout=0.2)
    model = build_model(settings, device, torch.float32).model.train()
    inject_lora(model, LoraSettings(lora_r=2, lora_dropout=0.2))
    with torch.no_grad():
        for name, param in model.named_parameters():
            if name.endswith("lora_B"):
                param.normal_()
    pack = make_pack([0.3, 0.25])
    found = []
    for counts, parks in ((0, False), (2, False), (2, True)):
        model.audio_tower.num_checkpointed, model.audio_tower.parks_checkpoints = counts, parks
        model.zero_grad(set_to_none=True)
        torch.manual_seed(5)
        model.encode_audio(pack)[:, 0].sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[2].keys()
    for other in found[1:]:
        for name, grad in other.items():
            torch.testing.assert_close(grad, found[0][name], rtol=1e-4, atol=1e-6 if device == "cpu" else 1e-5)


@pytest.mark.parametrize(("num_recomputed", "parks"), [(2, False), (2, True), (4, True)])
def test_a_walk_gives_the_same_however_many_layers_are_recomputed(num_recomputed, parks):
    seen = []

    def layer(x, delta, scale, remakes=False):
        x = x if delta is None else x + delta
        seen.append((delta is None, remakes))
        return x, torch.nn.functional.dropout(torch.sin(x * scale), 0.3)

    def walk(count, parks):
        torch.manual_seed(1)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).requires_grad_()
        stream, rest = run_layers([layer] * 4, x, (3.0,), count, parks, remakes=True)
        (stream + rest).pow(2).sum().backward()
        return stream + rest, x.grad

    expected, found = walk(0, False), walk(num_recomputed, parks)
    assert seen[4:8] == [(True, False)] * num_recomputed + [(False, True)] * (4 - num_recomputed)
    assert len(seen) == 8 + num_recomputed
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)
    x = torch.zeros(2)
    assert run_layers([], x, (), 0, False, False) == (x, None)
