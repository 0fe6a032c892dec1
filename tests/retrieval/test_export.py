"""Exports against transformers and against the model they were made from."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2AudioForConditionalGeneration, Qwen2Model, WhisperModel
from transformers.models.whisper.modeling_whisper import WhisperEncoder

from lora.inject import inject_lora, lora_parameters
from lora.settings import LoraSettings
from model.build import build_model
from model.packing import AudioPack, TextPack
from model.settings import ModelSettings
from retrieval.export import export_audio, export_merged, export_peft
from retrieval.model_files import CONFIG_FILE, OpenedModel, open_model, read_config, save_model
from tests.model.conftest import (  # noqa: F401 - fixtures
    make_pack,
    mel_30_s,
    qwen2,
    qwen2_audio,
    qwen2_folder,
    v4_key,
    whisper,
    whisper_folder,
    write_qwen2_audio,
)
from tests.model.test_audio_tower import padded_oracle

STRINGS = ["hello there", "the voicemail", "x"]
GB = 10**9


def adapted(folder: Path, settings: ModelSettings) -> Path:
    """A model folder of random adapters and heads over a base checkpoint."""
    torch.manual_seed(4)
    built = build_model(settings)
    inject_lora(built.model, LoraSettings(lora_r=4))
    with torch.no_grad():
        for _, parameter in lora_parameters(built.model):
            parameter.normal_(0, 0.2)
    folder.mkdir()
    save_model(folder, built, settings, torch.tensor(2.5), {"step": 3})
    return folder


def text_pack(opened: OpenedModel) -> TextPack:
    ids = opened.built.tokenizer(STRINGS)
    return TextPack(torch.tensor([token for one in ids for token in one]), [len(one) for one in ids])


@torch.no_grad()
def embeddings(folder: Path, pack: AudioPack, **options) -> tuple[torch.Tensor, torch.Tensor | None]:
    opened = open_model(folder, **options)
    text_NE = None if options.get("audio_only") else opened.built.model.encode_text(text_pack(opened))
    return opened.built.model.encode_audio(pack), text_NE


def fp32(pack: AudioPack) -> AudioPack:
    return AudioPack(pack.pcm_S.float(), pack.num_samples)


@pytest.mark.parametrize("scheme", ["v4", "v5"])
@torch.no_grad()
def test_plain_transformers_loads_the_merged_checkpoint(
    scheme, write_qwen2_audio, qwen2_audio, make_pack, mel_30_s, tmp_path  # noqa: F811
):
    """Base in one key scheme, export in both; embeddings by transformers' own towers equal ours to 1e-5 in fp32."""
    base = write_qwen2_audio(scheme)
    model = adapted(tmp_path / "model", ModelSettings(model_name=str(base), proj_dim=16))
    pack = make_pack([0.5, 1.3])
    audio_BE, text_NE = embeddings(model, fp32(pack))
    opened = open_model(model)
    for keys, max_bytes in (("base", GB), ("v4", 20_000), ("v5", GB)):
        folder = tmp_path / f"merged-{keys}"
        folder.mkdir()
        export_merged(model, folder, keys, "auto", max_bytes, None)
        theirs, loading = Qwen2AudioForConditionalGeneration.from_pretrained(folder, output_loading_info=True)
        assert not loading["missing_keys"], (keys, loading)
        assert not loading["unexpected_keys"], (keys, loading)
        assert torch.equal(theirs.lm_head.weight, qwen2_audio.lm_head.weight)
        untouched = "model.multi_modal_projector.linear.weight"
        assert torch.equal(theirs.state_dict()[untouched], qwen2_audio.state_dict()[untouched])

        heads = opened.built.model
        text_frames = [
            theirs.model.language_model(input_ids=ids[None]).last_hidden_state[0].mean(0)
            for ids in text_pack(opened).ids_P.split(text_pack(opened).lengths)
        ]
        theirs_NE = torch.nn.functional.normalize(heads.text_head(torch.stack(text_frames)), dim=-1)
        assert (theirs_NE - text_NE).abs().max() < 1e-5
        num_frames = [-(-samples // 160) for samples in pack.num_samples]
        frames = padded_oracle(theirs.model.audio_tower, mel_30_s(pack, 80).float(), num_frames)
        means_BD = torch.stack([x_LD.mean(0) for x_LD in frames])
        theirs_BE = torch.nn.functional.normalize(heads.audio_head(means_BD), dim=-1)
        assert (theirs_BE - audio_BE).abs().max() < 1e-5

        again_BE, again_NE = embeddings(folder, fp32(pack))
        assert (again_BE - audio_BE).abs().max() < 1e-5
        assert (again_NE - text_NE).abs().max() < 1e-6
        assert open_model(folder).fingerprint == opened.fingerprint
        shards = sorted(path.name for path in folder.glob("model*.safetensors"))
        assert len(shards) == 1 or (keys == "v4" and len(shards) > 5), shards
        names = {key for path in shards for key in load_file(folder / path)}
        expected = set(qwen2_audio.state_dict())
        is_v4 = (scheme if keys == "base" else keys) == "v4"
        assert names == ({v4_key(key) for key in expected} if is_v4 else expected)
    # Without its adapters the model would be another: the comparison above is not of two untouched copies.
    untouched_NE = torch.cat([qwen2_audio.model.language_model(ids[None]).last_hidden_state.mean(1)
                              for ids in text_pack(opened).ids_P.split(text_pack(opened).lengths)])  # fmt: skip
    untouched_NE = torch.nn.functional.normalize(opened.built.model.text_head(untouched_NE), dim=-1)
    assert (untouched_NE - text_NE).abs().max() > 1e-2


@torch.no_grad()
def test_two_base_models_become_two_checkpoints(
    whisper_folder, qwen2_folder, whisper, make_pack, tmp_path  # noqa: F811
):
    settings = ModelSettings(audio_model=str(whisper_folder), text_model=str(qwen2_folder), proj_dim=16)
    model, folder = adapted(tmp_path / "model", settings), tmp_path / "merged"
    folder.mkdir()
    export_merged(model, folder, "base", "auto", GB, None)
    pack = fp32(make_pack([0.7]))
    for ours, merged in zip(embeddings(model, pack), embeddings(folder, pack), strict=True):
        assert (ours - merged).abs().max() < 1e-5
    audio, loading = WhisperModel.from_pretrained(folder / "audio_tower", output_loading_info=True)
    assert not loading["missing_keys"]
    assert torch.equal(audio.decoder.layers[0].fc1.weight, whisper.decoder.layers[0].fc1.weight)
    folded, base = (model.encoder.layers[0].self_attn.q_proj.weight for model in (audio, whisper))
    assert not torch.equal(folded, base)
    _, loading = Qwen2Model.from_pretrained(folder / "text_tower", output_loading_info=True)
    assert not loading["missing_keys"]
    with pytest.raises(ValueError, match="only a whole Qwen2-Audio has two key schemes"):
        export_merged(model, folder, "v4", "auto", GB, None)
    with pytest.raises(ValueError, match="an export already"):
        export_merged(folder, tmp_path, "base", "auto", GB, None)


@torch.no_grad()
def test_towers_trained_from_nothing_become_checkpoints_of_their_kind(model_folder, make_pack, tmp_path):  # noqa: F811
    folder = tmp_path / "merged"
    folder.mkdir()
    export_merged(model_folder, folder, "base", "auto", GB, None)
    pack = fp32(make_pack([0.7, 0.2]))
    for ours, merged in zip(embeddings(model_folder, pack), embeddings(folder, pack), strict=True):
        assert torch.equal(ours, merged)
    opened = open_model(model_folder)
    text, loading = Qwen2Model.from_pretrained(folder / "text_tower", output_loading_info=True)
    assert not loading["missing_keys"]
    assert not loading["unexpected_keys"]
    ids_P = text_pack(opened).ids_P[: text_pack(opened).lengths[0]]
    theirs_E = opened.built.model.text_head(text(ids_P[None]).last_hidden_state.mean(1))[0]
    ours_NE = embeddings(model_folder, pack)[1]
    assert (torch.nn.functional.normalize(theirs_E, dim=0) - ours_NE[0]).abs().max() < 1e-5
    audio, loading = WhisperEncoder.from_pretrained(folder / "audio_tower", output_loading_info=True)
    assert not loading["missing_keys"]
    assert torch.equal(audio.conv1.weight, opened.built.model.audio_tower.conv1.weight)

    bf16 = tmp_path / "bf16"
    bf16.mkdir()
    export_merged(model_folder, bf16, "base", "bf16", GB, None)
    assert load_file(bf16 / "text_tower" / "model.safetensors")["norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["model_folder", "adapter_folder"])
def test_the_audio_bundle_hears_as_the_model_does_and_holds_no_text(name, request, make_pack, tmp_path):  # noqa: F811
    model, folder = request.getfixturevalue(name), tmp_path / "audio"
    folder.mkdir()
    export_audio(model, folder, "auto", GB, None)
    pack = fp32(make_pack([0.4, 0.9]))
    bundle_BE = embeddings(folder, pack, audio_only=True)[0]
    assert (bundle_BE - embeddings(model, pack)[0]).abs().max() < 1e-6
    assert open_model(folder, audio_only=True).fingerprint == open_model(model).fingerprint
    names = [key for path in folder.rglob("*.safetensors") for key in load_file(path)]
    assert "audio_head.weight" in names
    assert not [key for key in names if "text" in key or "language" in key or "embed_tokens" in key]
    with pytest.raises(ValueError, match="open it audio-only"):
        open_model(folder)


def test_audio_through_the_language_model_has_no_bundle(adapter_folder, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(adapter_folder, folder)
    config = read_config(folder) | {"audio_readout": "lm"}
    (folder / CONFIG_FILE).write_text(json.dumps(config))
    with pytest.raises(ValueError, match="audio_readout: 'lm'"):
        export_audio(folder, tmp_path, "auto", GB, None)


def test_adapters_of_either_scheme_read_back(adapter_folder, base_folder, model_folder, make_pack, tmp_path):  # noqa: F811
    pack = fp32(make_pack([0.6]))
    for scheme, prefix in (("v4", "base_model.model.audio_tower."), ("v5", "base_model.model.model.audio_tower.")):
        folder = tmp_path / scheme
        folder.mkdir()
        export_peft(adapter_folder, folder, scheme)
        assert any(key.startswith(prefix) for key in load_file(folder / "adapter_model.safetensors"))
        for ours, theirs in zip(embeddings(adapter_folder, pack), embeddings(folder, pack), strict=True):
            assert torch.equal(ours, theirs)
        config = json.loads((folder / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base_folder)
        assert len(config["target_modules"]) == 6
    with pytest.raises(ValueError, match="hence no adapter"):
        export_peft(model_folder, tmp_path, "v5")


def test_a_base_model_that_lacks_what_was_trained_is_an_error(adapter_folder, base_folder, tmp_path):
    """Merging what is there would leave the rest out without a word."""
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(base_folder, base)
    out.mkdir()
    index = json.loads((base / "model.safetensors.index.json").read_text())
    index["weight_map"] = {key: file for key, file in index["weight_map"].items() if "audio_tower" not in key}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match="3 trained tensors find none in the base model"):
        export_merged(adapter_folder, out, "base", "auto", GB, str(base))
