"""Merging against PEFT's merge_adapter, and back again."""

import copy
import json

import pytest
import torch
from peft import PeftModel

from lora.adapter import load_adapter, save_adapter
from lora.inject import inject_lora, lora_layers
from lora.merge import fold, merge, merged_state_dict, unmerge
from lora.settings import LoraSettings

SETTINGS = LoraSettings(lora_r=3, lora_alpha=5)


@pytest.fixture
def adapted(tiny_model, stir):
    def make(dtype=torch.float64):
        model = tiny_model(dtype)
        inject_lora(model, SETTINGS)
        stir(model)
        return model

    return make


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-5)])
def test_merged_model_computes_the_same(adapted, x_BTD, dtype, tolerance):
    model = adapted(dtype)
    before = model(x_BTD.to(dtype))
    merge(model)
    assert (model(x_BTD.to(dtype)) - before).abs().max() < tolerance


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_unmerge_restores_every_bit(adapted, dtype):
    """W + delta - delta does not: not even in fp32."""
    model = adapted(dtype)
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        merge(model)
        merge(model)  # merged layers stay as they are
        assert not torch.equal(
            model.state_dict()["audio_tower.layers.0.self_attn.q_proj.base_layer.weight"],
            before["audio_tower.layers.0.self_attn.q_proj.base_layer.weight"],
        )
        unmerge(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_agrees_with_peft(adapted, tiny_model, renamed, x_BTD, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, "tiny", "v5")
    theirs = PeftModel.from_pretrained(renamed(tiny_model(), "v5"), tmp_path)
    expected = theirs(x_BTD)
    assert (model(x_BTD) - expected).abs().max() < 1e-14
    theirs.merge_adapter()
    merge(model)
    for path, layer in lora_layers(model):
        weight = theirs.get_submodule(f"base_model.model.model.{path}.base_layer").weight
        assert (layer.base_layer.weight - weight).abs().max() < 1e-15, path
    theirs.unmerge_adapter()
    unmerge(model)
    for path, layer in lora_layers(model):
        weight = theirs.get_submodule(f"base_model.model.model.{path}.base_layer").weight
        assert (layer.base_layer.weight - weight).abs().max() < 1e-15, path
    assert (model(x_BTD) - expected).abs().max() < 1e-14


@pytest.mark.parametrize("merge_first", [False, True])
def test_merged_state_dict_fits_a_model_without_adapters(adapted, tiny_model, x_BTD, merge_first):
    model = adapted()
    expected, names = model(x_BTD), set(model.state_dict())
    if merge_first:
        merge(model)
    plain = tiny_model()
    plain.load_state_dict(merged_state_dict(model))  # strict
    assert (plain(x_BTD) - expected).abs().max() < 1e-14
    assert set(model.state_dict()) == names


def test_merged_adapters_refuse_to_train_or_load(adapted, x_BTD, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, "tiny")
    merge(model)
    with pytest.raises(RuntimeError, match="unmerge first"):
        model.train()(x_BTD)
    with pytest.raises(ValueError, match="unmerge before"):
        load_adapter(model, tmp_path)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["r"] == 3


def test_folded_is_merged_without_a_trace(adapted, x_BTD):
    model = adapted()
    merged = merged_state_dict(model)
    before = model(x_BTD.to(torch.float64))
    fold(model)
    assert not list(lora_layers(model))
    assert model.state_dict().keys() == merged.keys()
    assert all(torch.equal(value, merged[name]) for name, value in model.state_dict().items())
    assert (model(x_BTD.to(torch.float64)) - before).abs().max() < 1e-14
