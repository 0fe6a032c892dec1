"""Injection by full module path."""

import pytest
import torch
from torch import nn

from lora.inject import inject_lora, lora_layers, lora_parameters
from lora.layers import LoraLinear
from lora.settings import LoraSettings


def test_default_targets_are_qkv_of_both_towers(tiny_model):
    model = tiny_model()
    paths = inject_lora(model, LoraSettings())
    assert paths == sorted(
        f"{tower}.layers.{layer}.self_attn.{name}_proj"
        for tower in ("audio_tower", "language_model")
        for layer in range(2)
        for name in "qkv"
    )
    assert all(isinstance(model.get_submodule(path), LoraLinear) for path in paths)
    assert type(model.audio_tower.layers[0].self_attn.out_proj) is nn.Linear


def test_settings_reach_the_layers(tiny_model):
    model = tiny_model()
    inject_lora(model.train(), LoraSettings(lora_r=3, lora_alpha=5, lora_dropout=0.25, lora_fused=False))
    for _, layer in lora_layers(model):
        assert (layer.r, layer.alpha, layer.dropout, layer.fused) == (3, 5, 0.25, False)
        assert layer.lora_A.shape == (3, 8)
        assert layer.training


def test_model_is_unchanged_at_first_and_every_adapter_can_learn(tiny_model, x_BTD, stir):
    model = tiny_model()
    before = model(x_BTD)
    inject_lora(model, LoraSettings())
    assert (model(x_BTD) - before).abs().max() < 1e-15
    stir(model)
    model.train()(x_BTD).square().sum().backward()
    for name, parameter in lora_parameters(model):
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
    for path, layer in lora_layers(model):
        assert not any(p.requires_grad for p in layer.base_layer.parameters()), path
    assert model.audio_tower.layers[0].self_attn.out_proj.weight.requires_grad  # not ours to freeze


def test_a_pattern_is_scoped_to_its_tower(tiny_model):
    """Suffix matching, PEFT's habit, takes q_proj of both towers."""
    model = tiny_model()
    paths = inject_lora(model, LoraSettings(lora_targets=("audio_tower.*.q_proj",)))
    assert paths == ["audio_tower.layers.0.self_attn.q_proj", "audio_tower.layers.1.self_attn.q_proj"]


@pytest.mark.parametrize("dead", ["q_proj", "audio_tower.layer.*.self_attn.q_proj", "*.query_proj"])
def test_pattern_that_matches_nothing_names_near_paths(tiny_model, dead):
    model = tiny_model()
    with pytest.raises(ValueError, match=r"matches no module; the nearest linear layers: .*\.self_attn\.q_proj") as e:
        inject_lora(model, LoraSettings(lora_targets=("language_model.*.v_proj", dead)))
    assert dead in str(e.value)
    assert not list(lora_layers(model))  # nothing half done


def test_pattern_that_matches_no_linear_layer_says_what_it_found(tiny_model):
    with pytest.raises(ValueError, match=r"not linear layers: conv1 \(Conv1d\)"):
        inject_lora(tiny_model(), LoraSettings(lora_targets=("conv*",)))


def test_injecting_twice_is_refused(tiny_model):
    model = tiny_model()
    inject_lora(model, LoraSettings())
    with pytest.raises(ValueError, match="already has 12 adapters"):
        inject_lora(model, LoraSettings())


def test_same_generator_same_start(tiny_model):
    starts = []
    for _ in range(2):
        model = tiny_model()
        torch.rand(3)
        inject_lora(model, LoraSettings(), torch.Generator().manual_seed(5))
        starts.append(lora_parameters(model))
    assert [name for name, _ in starts[0]] == sorted(name for name, _ in starts[0])
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(*starts, strict=True))


def test_masters_are_fp32_over_a_bf16_base(tiny_model):
    model = tiny_model(torch.bfloat16)
    inject_lora(model, LoraSettings())
    assert {parameter.dtype for _, parameter in lora_parameters(model)} == {torch.float32}


@pytest.mark.parametrize(
    ("field", "value"),
    [("lora_r", 0), ("lora_alpha", 0.0), ("lora_dropout", 1.0), ("lora_targets", ()), ("lora_targets", "q_proj")],
)
def test_settings_out_of_range_name_the_field(field, value):
    with pytest.raises(ValueError, match=f"{field} is "):
        LoraSettings(**{field: value})
