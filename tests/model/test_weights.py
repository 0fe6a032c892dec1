"""Strict loading: every key is used or skipped by name, and each problem is told with file, key and remedy."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from model.build import build_model
from model.settings import ModelSettings
from model.weights import resolve_source


def edit(folder, change):
    """Rewrite model.safetensors after `change(tensors)`."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")


def shard(folder, num_shards=3):
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {key: f"model-{i % num_shards:05d}.safetensors" for i, key in enumerate(sorted(tensors))}
    for name in set(weight_map.values()):
        save_file({key: tensors[key] for key in weight_map if weight_map[key] == name}, folder / name)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize("scheme", ["v4", "v5"])
def test_both_key_schemes_fill_every_parameter(scheme, qwen2_audio, write_qwen2_audio):
    """transformers 5 moved Qwen2-Audio's modules; published files keep the names of version 4."""
    built = build_model(ModelSettings(model_name=str(write_qwen2_audio(scheme)), audio_readout="lm"))
    oracle = dict(qwen2_audio.model.named_parameters())
    ours = {name: p for name, p in built.model.named_parameters() if "head" not in name}
    assert ours.keys() == oracle.keys()
    for name, parameter in ours.items():
        assert torch.equal(parameter, oracle[name]), name
    assert set(built.sources) == {"audio_tower", "language_model", "multi_modal_projector", "heads", "tokenizer"}


def test_sharded_checkpoint_equals_the_single_file(write_qwen2_audio):
    folder = write_qwen2_audio("v4")
    whole = build_model(ModelSettings(model_name=str(folder))).model.state_dict()
    shard(folder)
    parts = build_model(ModelSettings(model_name=str(folder))).model.state_dict()
    assert all(torch.equal(whole[key], parts[key]) for key in whole if "head" not in key)


def test_a_missing_shard_is_named(write_qwen2_audio):
    folder = write_qwen2_audio("v4")
    shard(folder)
    (folder / "model-00001.safetensors").unlink()
    with pytest.raises(ValueError, match=r"1 missing shards: model-00001.safetensors; fetch the checkpoint again"):
        build_model(ModelSettings(model_name=str(folder)))


def test_missing_unexpected_and_misshaped_keys_come_in_one_error(write_qwen2_audio):
    folder = write_qwen2_audio("v4")

    def damage(tensors):
        del tensors["audio_tower.conv1.bias"]
        tensors["audio_tower.layers.7.fc1.bias"] = torch.zeros(48)
        tensors["vision_tower.conv.weight"] = torch.zeros(3)
        tensors["language_model.model.norm.weight"] = torch.zeros(47)

    edit(folder, damage)
    with pytest.raises(ValueError, match=re.escape(str(folder))) as caught:
        build_model(ModelSettings(model_name=str(folder)))
    message = str(caught.value)
    assert "1 missing: audio_tower.conv1.bias" in message
    assert "2 unexpected: audio_tower.layers.7.fc1.bias, vision_tower.conv.weight" in message
    assert "1 mis-shaped: language_model.model.norm.weight [47], expected [48]" in message


def test_a_long_list_of_keys_is_cut_and_counted(write_qwen2_audio):
    folder = write_qwen2_audio("v4")
    edit(folder, lambda tensors: [tensors.pop(key) for key in list(tensors) if ".layers.1." in key])
    with pytest.raises(ValueError, match=r"27 missing: (\S+, ){7}\S+ and 19 more"):
        build_model(ModelSettings(model_name=str(folder)))


def test_heads_decoders_and_replaced_towers_are_skipped_by_name(whisper_folder, qwen2_folder, write_qwen2_audio):
    edit(qwen2_folder, lambda tensors: tensors.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)}))
    assert any(key.startswith("model.decoder.") for key in load_file(whisper_folder / "model.safetensors"))
    assert "lm_head.weight" in load_file(qwen2_folder / "model.safetensors")
    built = build_model(ModelSettings(audio_model=str(whisper_folder), text_model=str(qwen2_folder)))
    assert not [name for name, _ in built.model.named_parameters() if "lm_head" in name or "decoder" in name]
    base = str(write_qwen2_audio("v4"))
    replaced = build_model(ModelSettings(model_name=base, audio_model=str(whisper_folder)))
    assert replaced.sources["audio_tower"] == str(whisper_folder)
    assert replaced.sources["language_model"] == base


def test_whisper_encoder_alone_and_with_bare_keys(whisper_folder, qwen2_folder):
    settings = ModelSettings(audio_model=str(whisper_folder), text_model=str(qwen2_folder))
    whole = build_model(settings).model.audio_tower.state_dict()
    for prefix in ("model.encoder.", "encoder.", ""):
        tensors = {f"{prefix}{key}": value for key, value in whole.items()}
        save_file(tensors, whisper_folder / "model.safetensors")
        again = build_model(settings).model.audio_tower.state_dict()
        assert all(torch.equal(whole[key], again[key]) for key in whole)


def test_weights_do_not_stay_mapped_to_the_file(qwen2_folder, architecture_files):
    settings = ModelSettings(audio_model=architecture_files[0], text_model=str(qwen2_folder))
    model = build_model(settings).model
    before = model.language_model.norm.weight.clone()
    path = qwen2_folder / "model.safetensors"
    with path.open("r+b") as file:
        file.write(b"\0" * path.stat().st_size)
    assert torch.equal(model.language_model.norm.weight, before)


def test_a_truncated_file_is_named(qwen2_folder, architecture_files):
    path = qwen2_folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(ValueError, match=r"model.safetensors: not a readable safetensors file .* fetch it again"):
        build_model(ModelSettings(audio_model=architecture_files[0], text_model=str(qwen2_folder)))


def test_pickles_are_never_loaded(qwen2_folder, architecture_files):
    (qwen2_folder / "model.safetensors").rename(qwen2_folder / "pytorch_model.bin")
    with pytest.raises(ValueError, match="is a pickle, which is never loaded: convert it to safetensors"):
        build_model(ModelSettings(audio_model=architecture_files[0], text_model=str(qwen2_folder)))


def test_quantised_weights_are_refused(qwen2_folder, architecture_files):
    key = "model.layers.0.mlp.up_proj.weight"
    edit(qwen2_folder, lambda tensors: tensors.update({key: tensors[key].to(torch.int8)}))
    with pytest.raises(ValueError, match=f"{key} is torch.int8; quantised"):
        build_model(ModelSettings(audio_model=architecture_files[0], text_model=str(qwen2_folder)))


def test_a_name_that_is_nothing_is_told_apart(tmp_path):
    with pytest.raises(ValueError, match=r"model_name: got '/no/such/folder', which is no folder"):
        resolve_source("model_name", "/no/such/folder")
    with pytest.raises(ValueError, match=r"audio_model: no file .*gone.json"):
        resolve_source("audio_model", str(tmp_path / "gone.json"))
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(ValueError, match="model_type 'bert', allowed are qwen2_audio, "):
        resolve_source("model_name", str(tmp_path))
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="is not JSON"):
        resolve_source("model_name", str(tmp_path))


def test_an_unreachable_hub_is_told_with_the_remedy(monkeypatch):
    import huggingface_hub

    def refuse(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    with pytest.raises(
        ValueError, match=r"model_name: 'Owner/Name' .*no route to host.*give its folder, or set HF_TOKEN"
    ):
        resolve_source("model_name", "Owner/Name")


def test_a_hub_name_resolves_to_the_downloaded_folder(monkeypatch, qwen2_folder):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda name, **_: str(qwen2_folder))
    source = resolve_source("text_model", "Owner/Name")
    assert (source.name, source.folder, source.model_type) == ("Owner/Name", qwen2_folder, "qwen2")
