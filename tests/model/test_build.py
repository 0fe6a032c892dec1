"""From settings to a model: sources, dtypes, what trains, and settings that do not fit."""

import json
import logging

import pytest
import torch

from model.build import build_model
from model.packing import TextPack
from model.settings import ModelSettings
from model.tokenizer import ByteTokenizer


@pytest.fixture
def small(architecture_files):
    """Keyword arguments of settings for two random towers."""
    return {"audio_model": architecture_files[0], "text_model": architecture_files[1]}


def test_random_towers_train_in_full_from_one_seed(small, make_pack):
    settings = ModelSettings(**small, trainable="full", proj_dim=16, audio_readout="lm")
    built = build_model(settings)
    assert isinstance(built.tokenizer, ByteTokenizer)
    assert set(built.sources.values()) == {"random", "bytes"}
    frozen = [name for name, p in built.model.named_parameters() if not p.requires_grad]
    assert frozen == ["audio_tower.embed_positions.weight"], "Whisper's sinusoids are never trained"
    assert {p.dtype for p in built.model.parameters()} == {torch.float32}
    assert not [name for name, p in built.model.named_parameters() if p.is_meta]
    torch.manual_seed(0)
    again = build_model(settings).model.state_dict()
    assert all(torch.equal(value, again[key]) for key, value in built.model.state_dict().items())
    assert build_model(settings).model.audio_head.weight.ne(again["audio_head.weight"]).any(), "the seed decides"
    audio_BE = built.model.encode_audio(make_pack([0.01, 0.5]))
    assert audio_BE.shape == (2, 16)
    torch.testing.assert_close(audio_BE.norm(dim=-1), torch.ones(2))


def test_lora_freezes_the_towers_and_trains_the_heads(write_qwen2_audio):
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4")), audio_readout="lm")).model
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained == ["audio_head.weight", "audio_head.bias", "text_head.weight", "text_head.bias"]


def test_a_projector_that_no_checkpoint_gives_is_random_and_trains(whisper_folder, qwen2_folder, make_pack):
    settings = ModelSettings(
        audio_model=str(whisper_folder), text_model=str(qwen2_folder), audio_readout="lm", base_dtype="bf16"
    )
    built = build_model(settings, "cpu", torch.bfloat16)
    projector = built.model.multi_modal_projector.linear
    assert built.sources["multi_modal_projector"] == "random"
    assert projector.weight.requires_grad
    assert projector.weight.dtype == torch.float32
    built.model.encode_audio(make_pack([0.2, 0.3]))[:, 0].sum().backward()
    assert projector.weight.grad.abs().sum() > 0


def test_the_projector_is_taken_when_one_checkpoint_is_named_twice(write_qwen2_audio):
    folder = str(write_qwen2_audio("v4"))
    settings = ModelSettings(audio_model=folder, text_model=folder, audio_readout="lm")
    assert build_model(settings).sources["multi_modal_projector"] == folder


@pytest.mark.parametrize(
    ("fields", "compute_dtype", "tower", "head"),
    [
        ({}, None, torch.float32, torch.float32),
        ({}, torch.bfloat16, torch.float32, torch.float32),
        ({"base_dtype": "bf16"}, torch.bfloat16, torch.bfloat16, torch.float32),
        ({"trainable": "full"}, torch.bfloat16, torch.float32, torch.float32),
        ({}, torch.float64, torch.float64, torch.float64),
        ({"trainable": "full"}, torch.float64, torch.float64, torch.float64),
    ],
)
def test_dtypes(fields, compute_dtype, tower, head, write_qwen2_audio, make_pack):
    settings = ModelSettings(model_name=str(write_qwen2_audio("v4")), **fields)
    built = build_model(settings, "cpu", compute_dtype)
    dtypes = {name: p.dtype for name, p in built.model.named_parameters()}
    assert {d for name, d in dtypes.items() if "head" not in name} == {tower}
    assert {d for name, d in dtypes.items() if "head" in name} == {head}
    ids = built.tokenizer(["hello", "he"])
    text_NE = built.model.encode_text(
        TextPack(torch.tensor([i for row in ids for i in row]), [len(row) for row in ids])
    )
    assert text_NE.dtype == built.model.encode_audio(make_pack([0.1])).dtype == head
    assert text_NE.isfinite().all()


def test_bf16_weights_are_rounded_not_rescaled(qwen2_audio, write_qwen2_audio):
    settings = ModelSettings(model_name=str(write_qwen2_audio("v4")), base_dtype="bf16")
    model = build_model(settings, "cpu", torch.bfloat16).model
    reference = qwen2_audio.model.language_model.norm.weight
    assert torch.equal(model.language_model.norm.weight, reference.bfloat16())


def test_frozen_random_towers_are_warned_about(small, caplog):
    with caplog.at_level(logging.WARNING):
        build_model(ModelSettings(**small))
    assert [record.message.split()[0] for record in caplog.records] == ["audio_tower", "language_model"]


def test_base_model_is_not_looked_for_when_both_towers_are_given(small):
    build_model(ModelSettings(model_name="/no/such/folder", **small))


def test_a_tower_that_the_checkpoint_lacks_is_named(whisper_folder, qwen2_folder, small):
    with pytest.raises(
        ValueError, match=r"model_name: .* is a whisper model, which has no text tower; give text_model"
    ):
        build_model(ModelSettings(model_name=str(whisper_folder)))
    with pytest.raises(ValueError, match=r"audio_model: .* is a qwen2 model, which has no audio tower"):
        build_model(ModelSettings(audio_model=str(qwen2_folder), text_model=small["text_model"]))


def test_a_tokenizer_larger_than_the_embedding_is_refused(small, tmp_path):
    config = json.loads((tmp_path / "text.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps({**config, "vocab_size": 256}))
    with pytest.raises(ValueError, match="vocab_size: the text tower has 256 embeddings, its tokenizer 257 ids"):
        build_model(ModelSettings(**small))


def test_an_architecture_may_name_a_tokenizer_folder(small, tmp_path, qwen2_folder):
    config = json.loads((tmp_path / "text.json").read_text())
    (tmp_path / "text.json").write_text(json.dumps({**config, "vocab_size": 300, "tokenizer": "qwen2"}))
    assert qwen2_folder == tmp_path / "qwen2"
    assert build_model(ModelSettings(**small)).tokenizer(["hehe"]) == [[256, 256]]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"audio_readout": "mean"}, "audio_readout: got 'mean', allowed are tower, lm"),
        ({"trainable": "none"}, "trainable: got 'none', allowed are lora, full"),
        ({"base_dtype": "fp16"}, "base_dtype: got 'fp16', allowed are auto, bf16, fp32, fp8"),
        ({"attention": "eager"}, "attention: got 'eager', allowed are auto, tile, flash, varlen, sdpa"),
        ({"proj_dim": 0}, "proj_dim: got 0, must be at least 1"),
        ({"tower_dropout": 1.0}, "tower_dropout: got 1.0"),
        ({"spec_time_masks": -1}, "spec_time_masks: got -1"),
        ({"trainable": "full", "base_dtype": "bf16"}, "base_dtype: got 'bf16' with trainable='full'"),
    ],
)
def test_settings_errors(fields, message, small):
    with pytest.raises(ValueError, match=message.replace("[", r"\[")):
        build_model(ModelSettings(**{**small, **fields}))


def test_compute_dtype_errors(small):
    with pytest.raises(ValueError, match=r"compute_dtype: got torch\.int8"):
        build_model(ModelSettings(**small), "cpu", torch.int8)
    with pytest.raises(ValueError, match=r"base_dtype: got 'bf16' with compute dtype torch\.float32"):
        build_model(ModelSettings(**small, base_dtype="bf16"), "cpu", torch.float32)


def test_a_model_that_only_hears_looks_for_nothing_else(small, make_pack):
    whole = build_model(ModelSettings(**small, trainable="full", proj_dim=16))
    heard = ModelSettings(audio_model=small["audio_model"], text_model="/nowhere", trainable="full", proj_dim=16)
    built = build_model(heard, absent_text=whole.text_config)
    assert {name.partition(".")[0] for name, _ in built.model.named_parameters()} == {"audio_tower", "audio_head"}
    assert built.model.encode_audio(make_pack([0.3])).shape == (1, 16)
    with pytest.raises(ValueError, match="opened audio-only"):
        built.tokenizer(["hello"])
    with pytest.raises(ValueError, match="opened audio-only"):
        built.model.encode_text(TextPack(torch.ones(2, dtype=torch.int64), [2]))
    with pytest.raises(ValueError, match="cannot be left out"):
        build_model(ModelSettings(**small, audio_readout="lm"), absent_text=whole.text_config)
