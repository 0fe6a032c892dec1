"""Adapter files, both ways between us and PEFT, under both key schemes, and what the strict reader refuses."""

import json
import warnings

import pytest
import safetensors.torch
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from lora.adapter import load_adapter, read_settings, save_adapter
from lora.inject import inject_lora, lora_parameters
from lora.settings import LoraSettings

SETTINGS = LoraSettings(lora_r=3, lora_alpha=5, lora_dropout=0.25)
EVERYWHERE = (
    "audio_tower.layers.*.self_attn.[qkv]_proj",
    "multi_modal_projector.linear",
    "language_model.layers.*.self_attn.[qkv]_proj",
)
SCHEMES = pytest.mark.parametrize("scheme", ["v4", "v5"])


@pytest.fixture
def adapted(tiny_model, stir):
    def make(settings=SETTINGS):
        model = tiny_model()
        inject_lora(model, settings)
        stir(model)
        return model

    return make


def load_in_peft(model: nn.Module, folder):
    """PEFT's model, its missing and its unexpected keys. Asserts that it found nothing to warn of."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        loaded = PeftModel.from_pretrained(model, folder)
        result = loaded.load_adapter(folder, adapter_name="default")
    assert not [str(w.message) for w in caught if "adapter" in str(w.message).lower()]
    return loaded.eval(), [k for k in result.missing_keys if "lora_" in k], list(result.unexpected_keys)


@SCHEMES
def test_peft_loads_ours_whole(adapted, tiny_model, renamed, x_BTD, scheme, tmp_path):
    model = adapted(LoraSettings(lora_r=3, lora_alpha=5, lora_targets=EVERYWHERE))
    save_adapter(model, tmp_path, "tiny", scheme)
    theirs, missing, unexpected = load_in_peft(renamed(tiny_model(), scheme), tmp_path)
    assert (missing, unexpected) == ([], [])
    assert sum("lora_" in name for name, _ in theirs.named_parameters()) == len(lora_parameters(model)) == 26
    assert (theirs(x_BTD) - model(x_BTD)).abs().max() < 1e-14


@SCHEMES
def test_ours_loads_what_peft_writes(tiny_model, renamed, stir, x_BTD, scheme, tmp_path):
    config = LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "v_proj", "linear"])  # suffixes, as users write
    theirs = get_peft_model(renamed(tiny_model(), scheme), config).eval()
    stir(theirs)
    theirs.save_pretrained(tmp_path)
    settings = read_settings(tmp_path)
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout) == (3, 5, 0.0)
    assert "multi_modal_projector.linear" in settings.lora_targets
    assert len(settings.lora_targets) == 9
    model = tiny_model()
    inject_lora(model, settings)
    load_adapter(model, tmp_path)
    assert (theirs(x_BTD) - model(x_BTD)).abs().max() < 1e-14


@SCHEMES
def test_round_trip_is_exact_and_self_describing(adapted, tiny_model, x_BTD, scheme, tmp_path):
    model = adapted()
    save_adapter(model, tmp_path, "some/model", scheme)
    settings = read_settings(tmp_path)
    assert (settings.lora_r, settings.lora_alpha, settings.lora_dropout) == (3, 5, 0.25)
    again = tiny_model()
    inject_lora(again, settings)
    load_adapter(again, tmp_path)
    for (name, saved), (other, loaded) in zip(lora_parameters(model), lora_parameters(again), strict=True):
        assert name == other
        assert torch.equal(saved, loaded)
    assert torch.equal(model(x_BTD), again(x_BTD))


def test_config_holds_what_the_model_trains_with(adapted, tmp_path):
    """lora_dropout forced to 0, or settings that differ from the layers, went unnoticed before."""
    save_adapter(adapted(), tmp_path, "some/model", "v4")
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["lora_dropout"] == 0.25
    assert (config["r"], config["lora_alpha"], config["base_model_name_or_path"]) == (3, 5, "some/model")
    assert len(config["target_modules"]) == 12
    assert "language_model.model.layers.0.self_attn.k_proj" in config["target_modules"]


def test_qwen2_audio_in_transformers_and_peft(stir, tmp_path):
    """The published classes as oracle: our layers inside their towers, saved, loaded by PEFT into a fresh model."""
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    config = Qwen2AudioConfig(
        audio_config={
            "model_type": "qwen2_audio_encoder",
            "d_model": 16,
            "encoder_layers": 2,
            "encoder_attention_heads": 2,
            "encoder_ffn_dim": 32,
            "num_mel_bins": 8,
            "max_source_positions": 20,
        },
        text_config={
            "model_type": "qwen2",
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "vocab_size": 50,
        },
    )

    def fresh():
        torch.manual_seed(0)
        return Qwen2AudioForConditionalGeneration(config).double().eval()

    mel_BMT = torch.randn(2, 8, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    ids_BL = torch.arange(10).view(2, 5)

    def outputs(inner):
        return inner.audio_tower(mel_BMT).last_hidden_state, inner.language_model(input_ids=ids_BL).last_hidden_state

    if not hasattr(fresh(), "model"):
        pytest.skip("transformers 4 names the modules otherwise")
    ours = fresh().model
    without = outputs(ours)
    inject_lora(ours, SETTINGS)
    stir(ours)
    mine = outputs(ours)
    save_adapter(ours, tmp_path, "tiny", "v5")
    theirs, missing, unexpected = load_in_peft(fresh(), tmp_path)
    assert (missing, unexpected) == ([], [])
    for before, after, expected in zip(without, mine, outputs(theirs.base_model.model.model), strict=True):
        assert (before - after).abs().max() > 1e-3
        assert (after - expected).abs().max() < 1e-12

    theirs.save_pretrained(tmp_path / "again", save_embedding_layers=False)
    reloaded = fresh().model
    inject_lora(reloaded, read_settings(tmp_path / "again"))
    load_adapter(reloaded, tmp_path / "again")
    assert all(torch.equal(one, other) for one, other in zip(mine, outputs(reloaded), strict=True))

    # The trap behind the strict reader: PEFT takes a v4-named file in part (with suffix targets, of the language model
    # alone), and only warns.
    save_adapter(ours, tmp_path, "tiny", "v4")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "target_modules": ["q_proj", "k_proj", "v_proj"]}))
    with pytest.warns(UserWarning, match="missing adapter keys"):
        partly = PeftModel.from_pretrained(fresh(), tmp_path)
    loaded = [name for name, p in partly.named_parameters() if "lora_B" in name and p.abs().max() > 0]
    assert len(loaded) == 6
    assert all("language_model" in name for name in loaded)
    load_adapter(reloaded, tmp_path)  # ours takes either
    assert all(torch.equal(one, other) for one, other in zip(mine, outputs(reloaded), strict=True))


def test_loading_changes_nothing_when_it_fails(adapted, tmp_path):
    model = adapted()
    tensors = save_adapter(model, tmp_path, "tiny")
    key = sorted(tensors)[-1]
    broken = {name: value + 1 for name, value in tensors.items()}
    broken[key] = broken[key][:1]
    safetensors.torch.save_file(broken, tmp_path / "adapter_model.safetensors")
    before = [value.clone() for _, value in lora_parameters(model)]
    with pytest.raises(ValueError, match=r"1 mis-shaped \(.*\(1, 3\) for \(8, 3\)"):
        load_adapter(model, tmp_path)
    assert all(torch.equal(one, other) for one, (_, other) in zip(before, lora_parameters(model), strict=True))


def rewrite_tensors(folder, change):
    path = folder / "adapter_model.safetensors"
    safetensors.torch.save_file(change(safetensors.torch.load_file(path)), path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dict(sorted(t.items())[:-3]), r"3 missing \(.*0 unexpected"),
        (lambda t: {**t, "base_model.model.model.audio_tower.conv1.lora_A.weight": torch.ones(1)}, "1 unexpected"),
        (lambda t: {**t, "base_model.model.lm_head.lora_A.weight": torch.ones(1)}, r"1 unexpected .*lm_head"),
        (lambda t: {**t, "audio_head.weight": torch.ones(1)}, r"1 unexpected .*audio_head"),
        (
            lambda t: {(k.replace(".model.audio_tower", ".audio_tower")): v for k, v in t.items()},
            r"mixes key schemes: .*\(v[45]\) and .*\(v[45]\)",
        ),
        (lambda t: {}, "holds no tensors"),
    ],
    ids=["missing", "extra layer", "lm_head", "foreign", "mixture", "empty"],
)
def test_files_that_do_not_fit_are_refused(adapted, tmp_path, change, message):
    model = adapted()
    save_adapter(model, tmp_path, "tiny", "v5")
    rewrite_tensors(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("r", 4, "lora_r is 3 but .* was saved with 4"),
        ("lora_alpha", 16, "lora_alpha is 5 but .* was saved with 16"),
        ("r", "3", "r is '3'; allowed: a number"),
        ("peft_type", "IA3", "peft_type is 'IA3'"),
        ("use_dora", True, "use_dora is True"),
        ("use_rslora", True, "use_rslora is True"),
        ("rank_pattern", {"q_proj": 8}, "rank_pattern is"),
        ("init_lora_weights", "pissa", "init_lora_weights is 'pissa'"),
        ("modules_to_save", ["lm_head"], "modules_to_save is"),
    ],
)
def test_configs_that_do_not_fit_are_refused(adapted, tmp_path, field, value, message):
    model = adapted()
    save_adapter(model, tmp_path, "tiny")
    path = tmp_path / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)


def test_another_dropout_is_said(adapted, tmp_path, caplog):
    save_adapter(adapted(), tmp_path, "tiny")
    load_adapter(adapted(LoraSettings(lora_r=3, lora_alpha=5, lora_dropout=0.1)), tmp_path)
    assert "lora_dropout is 0.1; the adapter in" in caplog.text


def test_absent_or_damaged_files_say_what_a_folder_holds(adapted, tmp_path):
    model = adapted()
    with pytest.raises(ValueError, match=r"adapter_config.json: .*; an adapter folder holds"):
        load_adapter(model, tmp_path)
    save_adapter(model, tmp_path, "tiny")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"\x00" * 20)
    with pytest.raises(ValueError, match=r"adapter_model.safetensors: .*; an adapter folder holds"):
        load_adapter(model, tmp_path)


def test_models_that_cannot_be_saved(tmp_path):
    with pytest.raises(ValueError, match="no adapters; inject_lora comes first"):
        save_adapter(nn.Linear(2, 2), tmp_path, "tiny")
    elsewhere = nn.Module()
    elsewhere.audio_head = nn.Linear(2, 2)
    inject_lora(elsewhere, LoraSettings(lora_r=1, lora_targets=("audio_head",)))
    with pytest.raises(ValueError, match="audio_head has no name in the v5 key scheme"):
        save_adapter(elsewhere, tmp_path, "tiny")
