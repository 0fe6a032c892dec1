"""Trained models as folders: what is reloaded embeds as before to the last bit, and what does not fit is refused.

The base is a small Qwen2-Audio checkpoint as transformers writes it, with a tokenizer.
"""

import json
import logging
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
import transformers
from peft import PeftModel
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from lora.adapter import load_adapter
from lora.inject import inject_lora, lora_layers
from lora.settings import LoraSettings
from model.build import Built, build_model
from model.packing import AudioPack, TextPack
from model.settings import ModelSettings
from retrieval.model_files import load_trained, open_model, read_config, save_model, single_file_tensors

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

AUDIO = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 80}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 512,
}
LORA = LoraSettings(lora_r=3, lora_alpha=6, lora_dropout=0.1)
TOKENIZER_CONFIG = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|end|>", "pad_token": "<|end|>"}
INFO = {"step": 7, "metrics": {"eval/recall@10": 0.5}}
LOG_INV_TEMPERATURE = torch.tensor(2.5)
Saved = Callable[[str], tuple[Path, ModelSettings]]


def write_tokenizer(folder: Path) -> None:
    """Bytes, and "he" as one token: not what the byte tokenizer gives."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)} | {"he": 256}, [("h", "e")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|end|>"])
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(TOKENIZER_CONFIG))


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder `base`, its copy `other`, and random architectures audio.json, text.json and text_words.json."""
    folder = tmp_path_factory.mktemp("made")
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 1500, **AUDIO},
        text_config={"model_type": "qwen2", **TEXT},
        audio_token_index=299,
    )
    theirs = Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa")
    with torch.no_grad():
        for name, param in theirs.named_parameters():
            noise = torch.randn(param.shape, generator=torch.Generator().manual_seed(len(name))) * 0.15
            param.copy_(noise + 1.0 if "norm" in name and name.endswith("weight") else noise)
    theirs.save_pretrained(folder / "base")
    write_tokenizer(folder / "base")
    shutil.copytree(folder / "base", folder / "other")
    write_tokenizer(folder / "words")
    (folder / "audio.json").write_text(json.dumps({"model_type": "whisper", "max_source_positions": 1500, **AUDIO}))
    text = {"model_type": "qwen2", "rope_theta": 10000.0, "rms_norm_eps": 1e-6, **TEXT}
    (folder / "text.json").write_text(json.dumps({**text, "tokenizer": "bytes"}))
    (folder / "text_words.json").write_text(json.dumps({**text, "tokenizer": "words"}))
    return folder


BASES = {
    "one checkpoint": {"model_name": "{made}/base"},
    "two checkpoints": {"audio_model": "{made}/base", "text_model": "{made}/other"},
    "random towers": {"audio_model": "{made}/audio.json", "text_model": "{made}/text.json"},
    "random towers, a tokenizer": {"audio_model": "{made}/audio.json", "text_model": "{made}/text_words.json"},
}


def settings_of(made: Path, base: str, trainable: str, readout: str = "tower") -> ModelSettings:
    sources = {name: text.format(made=made) for name, text in BASES[base].items()}
    return ModelSettings(**sources, trainable=trainable, audio_readout=readout, proj_dim=16)


def train(settings: ModelSettings, lora: LoraSettings = LORA, seed: int = 1) -> Built:
    """A model whose trained parameters have gone somewhere."""
    torch.manual_seed(seed)
    built = build_model(settings)
    if settings.trainable == "lora":
        inject_lora(built.model, lora)
    with torch.no_grad():
        for param in built.model.parameters():
            if param.requires_grad:
                param.add_(torch.randn_like(param) * 0.1)
    built.model.eval()
    return built


def save(folder: Path, built: Built, settings: ModelSettings, **more: object) -> Path:
    folder.mkdir()
    save_model(folder, built, settings, LOG_INV_TEMPERATURE, INFO, **more)
    return folder


@torch.no_grad()
def embed(built: Built) -> Tensor:
    """Embeddings of three clips and of four strings, one below the other."""
    samples = [8_000, 16_000, 5_123]
    pcm_S = (torch.randn(sum(samples), generator=torch.Generator().manual_seed(2)) * 3000).to(torch.int16)
    ids = built.tokenizer(["the heron", "voicemail", "hash key", "é"])
    flat_P = torch.tensor([token for one in ids for token in one])
    text_NE = built.model.encode_text(TextPack(flat_P, [len(one) for one in ids]))
    return torch.cat([built.model.encode_audio(AudioPack(pcm_S, samples)), text_NE])


@pytest.mark.parametrize("readout", ["tower", "lm"])
@pytest.mark.parametrize(
    ("base", "trainable"),
    [
        ("one checkpoint", "lora"),
        ("two checkpoints", "lora"),
        ("one checkpoint", "full"),
        ("two checkpoints", "full"),
        ("random towers", "full"),
        ("random towers, a tokenizer", "full"),
    ],
)
def test_what_is_reloaded_embeds_to_the_last_bit(
    made: Path, tmp_path: Path, base: str, trainable: str, readout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(made, base, trainable, readout)
    built = train(settings)
    expected = embed(built)
    assert not torch.equal(expected, embed(train(settings, seed=3))), "the trained parameters matter"
    folder = save(tmp_path / "model", built, settings)
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(99)  # nothing may hang on the random numbers of the moment
    opened = open_model(folder)
    assert torch.equal(embed(opened.built), expected)
    assert not opened.built.model.training
    assert opened.temperature == pytest.approx(0.0820849986)  # exp(-2.5)
    assert opened.config["info"] == INFO

    again = save(tmp_path / "again", opened.built, settings)  # saved once more from what was opened
    assert torch.equal(embed(open_model(again).built), expected)

    other = train(settings, seed=5)  # and into a model in training
    assert torch.equal(load_trained(folder, other, settings), LOG_INV_TEMPERATURE)
    assert torch.equal(embed(other), expected)


def test_a_full_model_needs_nothing_but_its_folder(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "gone")
    settings = settings_of(tmp_path / "gone", "one checkpoint", "full", "lm")
    built = train(settings)
    expected = embed(built)
    save(tmp_path / "model", built, settings)
    shutil.rmtree(tmp_path / "gone")
    (tmp_path / "model").rename(tmp_path / "moved")
    opened = open_model(tmp_path / "moved")
    assert torch.equal(embed(opened.built), expected)
    assert {path.name for path in (tmp_path / "moved" / "tokenizer").iterdir()} == {
        "tokenizer.json",
        "tokenizer_config.json",
    }


def test_an_adapter_finds_its_base_where_it_lies_now(made: Path, tmp_path: Path) -> None:
    shutil.copytree(made, tmp_path / "before")
    settings = settings_of(tmp_path / "before", "one checkpoint", "lora")
    built = train(settings)
    expected = embed(built)
    folder = save(tmp_path / "model", built, settings)
    (tmp_path / "before").rename(tmp_path / "after")
    with pytest.raises(ValueError, match="model_name"):
        open_model(folder)
    assert torch.equal(embed(open_model(folder, model_name=str(tmp_path / "after" / "base")).built), expected)


def test_the_files_of_a_folder(made: Path, tmp_path: Path) -> None:
    config = {"retriever_config.json", "heads.safetensors"}
    adapter = {"adapter_model.safetensors", "adapter_config.json"}
    towers = {"model.safetensors", "audio_tower.json", "text_tower.json"}
    lora = settings_of(made, "one checkpoint", "lora")
    folder = save(tmp_path / "lora", train(lora), lora, key_schemes=("v5", "v4"))
    assert {path.name for path in folder.iterdir()} == config | adapter | {"adapter_v4"}
    assert {path.name for path in (folder / "adapter_v4").iterdir()} == adapter
    sizes = {path.name: path.stat().st_size for path in folder.rglob("*.safetensors")}
    assert sum(sizes.values()) < (made / "base" / "model.safetensors").stat().st_size / 4, "no tower is in there"
    full = settings_of(made, "random towers", "full")
    assert {path.name for path in save(tmp_path / "full", train(full), full).iterdir()} == config | towers
    words = settings_of(made, "one checkpoint", "full")
    folder = save(tmp_path / "words", train(words), words)
    assert {path.name for path in folder.iterdir()} == config | towers | {"tokenizer"}


@pytest.mark.parametrize(
    ("base", "trainable", "is_in_heads"),
    [
        ("one checkpoint", "lora", False),  # frozen: it is the base model's
        ("two checkpoints", "lora", True),
        ("random towers", "full", True),
        ("one checkpoint", "full", False),  # trained with the towers
    ],
)
def test_a_projector_that_training_made_lies_with_the_heads(
    made: Path, tmp_path: Path, base: str, trainable: str, is_in_heads: bool
) -> None:
    settings = settings_of(made, base, trainable, "lm")
    built = train(settings)
    folder = save(tmp_path / "model", built, settings)
    heads = safetensors.torch.load_file(folder / "heads.safetensors")
    assert ("multi_modal_projector.linear.weight" in heads) is is_in_heads
    assert {"audio_head.weight", "audio_head.bias", "text_head.weight", "text_head.bias"} <= heads.keys()
    assert torch.equal(heads["log_inv_temperature"], LOG_INV_TEMPERATURE)
    if trainable == "full":
        towers = safetensors.torch.load_file(folder / "model.safetensors")
        assert ("multi_modal_projector.linear.weight" in towers) is not is_in_heads
        assert towers.keys().isdisjoint(heads.keys())
        assert {*towers, *heads} - {"log_inv_temperature"} == {n for n, _ in built.model.named_parameters()}


def test_a_random_projector_with_an_adapter_on_it_is_kept(made: Path, tmp_path: Path) -> None:
    """The layer below the adapter is in no checkpoint either."""
    settings = settings_of(made, "two checkpoints", "lora", "lm")
    lora = LoraSettings(lora_r=2, lora_targets=("multi_modal_projector.linear", "*.q_proj"))
    built = train(settings, lora)
    folder = save(tmp_path / "model", built, settings)
    torch.manual_seed(99)
    assert torch.equal(embed(open_model(folder).built), embed(built))


# --- adapters and PEFT -----------------------------------------------------------------------------------------------


def test_peft_loads_the_adapter_of_this_transformers_whole(made: Path, tmp_path: Path) -> None:
    settings = settings_of(made, "one checkpoint", "lora")
    built = train(settings)
    save(tmp_path / "model", built, settings, key_schemes=("v5", "v4"))
    base = Qwen2AudioForConditionalGeneration.from_pretrained(made / "base")
    folder = tmp_path / "model" if hasattr(base, "model") else tmp_path / "model" / "adapter_v4"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        theirs = PeftModel.from_pretrained(base, folder).eval()
        loaded = theirs.load_adapter(folder, adapter_name="default")
    assert not [str(w.message) for w in caught if "adapter" in str(w.message).lower()]
    assert [key for key in loaded.missing_keys if "lora_" in key] == []
    assert loaded.unexpected_keys == []

    ours = dict(lora_layers(built.model))
    assert len(ours) == 6  # q, k, v of one layer in each tower
    found = {name: module for name, module in theirs.named_modules() if hasattr(module, "lora_A")}
    assert len(found) == len(ours)
    for path, layer in ours.items():
        (their_layer,) = [
            m for n, m in found.items() if n.replace("language_model.model.", "language_model.").endswith(path)
        ]
        assert their_layer.scaling["default"] == layer.alpha / layer.r == 2.0
        assert torch.equal(their_layer.lora_A["default"].weight, layer.lora_A)
        assert torch.equal(their_layer.lora_B["default"].weight, layer.lora_B)

    (ids,) = built.tokenizer(["voicemail"])
    language_model = theirs.base_model.model.get_submodule(
        "model.language_model" if hasattr(base, "model") else "language_model.model"
    )
    with torch.no_grad():
        hidden_1LD = language_model(input_ids=torch.tensor([ids])).last_hidden_state
        expected_1E = nn.functional.normalize(built.model.text_head(hidden_1LD.mean(1)), dim=-1)
        found_1E = built.model.encode_text(TextPack(torch.tensor(ids), [len(ids)]))
    torch.testing.assert_close(found_1E, expected_1E, rtol=1e-5, atol=1e-6)


def test_both_key_schemes_hold_the_same_adapter(made: Path, tmp_path: Path) -> None:
    settings = settings_of(made, "one checkpoint", "lora")
    built = train(settings)
    expected = embed(built)
    v5 = save(tmp_path / "v5", built, settings, key_schemes=("v5", "v4"))
    v4 = save(tmp_path / "v4", built, settings, key_schemes=("v4",))
    assert not (v4 / "adapter_v5").exists()
    names = [safetensors.torch.load_file(f / "adapter_model.safetensors").keys() for f in (v5, v5 / "adapter_v4", v4)]
    assert all(name.startswith("base_model.model.model.") for name in names[0])
    assert names[1] == names[2]
    assert names[1].isdisjoint(names[0])
    assert torch.equal(embed(open_model(v4).built), expected)
    other = train(settings, seed=5)
    load_trained(v5, other, settings)
    with torch.no_grad():
        for _, layer in lora_layers(other.model):
            layer.lora_B.zero_()
    assert not torch.equal(embed(other), expected)
    load_adapter(other.model, v5 / "adapter_v4")
    assert torch.equal(embed(other), expected)
    config = json.loads((v5 / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(made / "base")


# --- what does not fit -----------------------------------------------------------------------------------------------


@pytest.fixture
def saved(made: Path, tmp_path: Path) -> Saved:
    """saved("lora"): a saved model's folder and settings."""

    def make(trainable: str) -> tuple[Path, ModelSettings]:
        settings = settings_of(made, "one checkpoint", trainable)
        return save(tmp_path / "model", train(settings), settings), settings

    return make


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("trainable", "full", "trainable: got 'full', but .*model holds a model with 'lora'"),
        ("audio_readout", "lm", "audio_readout: got 'lm', but .*model holds a model with 'tower'"),
        ("proj_dim", 8, "proj_dim: got 8, but .*model holds a model with 16"),
    ],
)
def test_other_settings_are_refused_by_name(saved: Saved, field: str, value: object, message: str) -> None:
    folder, settings = saved("lora")
    setattr(settings, field, value)
    with pytest.raises(ValueError, match=message):
        load_trained(folder, train(settings), settings)


def test_another_rank_is_refused_by_name(saved: Saved) -> None:
    folder, settings = saved("lora")
    other = train(settings, LoraSettings(lora_r=4, lora_alpha=6, lora_dropout=0.1))
    with pytest.raises(ValueError, match=r"lora_r is 4 but .* was saved with 3"):
        load_trained(folder, other, settings)


@pytest.mark.parametrize(
    ("tower", "key", "value", "message"),
    [
        ("audio", "encoder_ffn_dim", 64, "its audio tower is another than the one built: .*64 .saved 48."),
        ("text", "num_hidden_layers", 2, "its text tower is another than the one built: .*2 .saved 1."),
    ],
)
def test_another_tower_is_refused_by_what_differs(
    made: Path, tmp_path: Path, tower: str, key: str, value: int, message: str
) -> None:
    settings = settings_of(made, "random towers", "full")
    folder = save(tmp_path / "model", train(settings), settings)
    changed = json.loads((made / f"{tower}.json").read_text()) | {key: value}
    (tmp_path / "changed.json").write_text(json.dumps(changed))
    setattr(settings, f"{tower}_model", str(tmp_path / "changed.json"))
    with pytest.raises(ValueError, match=message):
        load_trained(folder, train(settings), settings)


def rewrite(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    path.write_bytes(safetensors.torch.save(change(safetensors.torch.load(path.read_bytes()))))


@pytest.mark.parametrize("file", ["heads.safetensors", "model.safetensors"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: dict(sorted(t.items())[1:]), r"1 missing \(audio_\w+\.[\w.]+\); it belongs to"),
        (lambda t: {**t, "lm_head.weight": torch.ones(2)}, r"1 unexpected \(lm_head.weight\)"),
        (lambda t: {n: v[:1] if v.ndim == 2 else v for n, v in t.items()}, r"mis-shaped \([\w.]+"),
    ],
    ids=["missing", "unexpected", "mis-shaped"],
)
def test_tensors_that_do_not_fit_are_named(
    saved: Saved,
    file: str,
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    message: str,
) -> None:
    folder, _ = saved("full")
    rewrite(folder / file, change)
    with pytest.raises(ValueError, match=rf"{file}: tensors .*{message}"):
        open_model(folder)


def test_a_missing_temperature_is_said(saved: Saved) -> None:
    folder, _ = saved("lora")
    rewrite(folder / "heads.safetensors", lambda t: {n: v for n, v in t.items() if n != "log_inv_temperature"})
    with pytest.raises(ValueError, match=r"heads.safetensors: log_inv_temperature is missing"):
        open_model(folder)


@pytest.mark.parametrize(
    ("trainable", "file"),
    [
        ("full", "heads.safetensors"),
        ("full", "model.safetensors"),
        ("lora", "heads.safetensors"),
        ("lora", "adapter_model.safetensors"),
    ],
)
def test_damaged_and_absent_files_are_named(saved: Saved, trainable: str, file: str) -> None:
    folder, _ = saved(trainable)
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    with pytest.raises(ValueError, match=rf"{file}: "):
        open_model(folder)
    (folder / file).unlink()
    with pytest.raises(ValueError, match=rf"{file}: "):
        open_model(folder)


def test_a_damaged_file_says_what_to_do(saved: Saved) -> None:
    folder, _ = saved("full")
    (folder / "model.safetensors").write_bytes(b"\x00" * 40)
    with pytest.raises(ValueError, match=r"damaged \(.*\); use another checkpoint"):
        open_model(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="missing; the folder holds no complete model"):
        open_model(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no retriever_config.json; give a folder such as <run>/model_best"),
        ('{"format": "earm', "retriever_config.json: not JSON"),
        (b"\xff\xfe", "retriever_config.json: not JSON"),
        ('{"format": "other-1"}', "its format is not 'earmark-retriever-1'"),
        ("[]", "its format is not 'earmark-retriever-1'"),
    ],
)
def test_a_folder_that_holds_no_model_is_refused(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    if content is not None:
        written = content if isinstance(content, bytes) else content.encode()
        (tmp_path / "retriever_config.json").write_bytes(written)
    for read in (open_model, read_config):
        with pytest.raises(ValueError, match=message):
            read(tmp_path)


# --- the rest --------------------------------------------------------------------------------------------------------


def test_the_config_tells_what_the_model_is(saved: Saved, made: Path) -> None:
    folder, _ = saved("lora")
    config = read_config(folder)
    assert config["model"] == {"model_name": str(made / "base"), "audio_model": None, "text_model": None}
    assert (config["trainable"], config["audio_readout"], config["proj_dim"]) == ("lora", "tower", 16)
    assert config["sources"]["audio_tower"] == config["sources"]["tokenizer"] == str(made / "base")
    assert config["sources"]["heads"] == "random"
    assert config["text_config"]["num_layers"] == 1
    assert config["info"] == INFO


def test_a_one_file_copy_holds_every_tensor_and_setting(saved: Saved) -> None:
    folder, _ = saved("lora")
    (folder / "MANIFEST.json").write_text("{}")
    tensors, settings = single_file_tensors(folder)
    assert settings.keys() == {"retriever_config.json", "adapter_config.json"}
    assert settings["retriever_config.json"] == read_config(folder)
    for file in ("heads.safetensors", "adapter_model.safetensors"):
        for name, value in safetensors.torch.load_file(folder / file).items():
            assert torch.equal(tensors.pop(f"{file}/{name}"), value)
    assert not tensors


def test_a_model_opens_in_another_precision(saved: Saved) -> None:
    folder, _ = saved("lora")
    fine = embed(open_model(folder, compute_dtype=torch.float64).built)
    assert fine.dtype == torch.float64
    torch.testing.assert_close(fine.float(), embed(open_model(folder).built), rtol=0, atol=1e-5)


def test_a_tokenizer_of_the_hub_is_fetched_without_weights(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[tuple[str, list[str]]] = []

    def download(name: str, allow_patterns: list[str]) -> str:
        asked.append((name, allow_patterns))
        return str(made / "base")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    settings = settings_of(made, "one checkpoint", "full")
    built = train(settings)
    built.sources["tokenizer"] = "someone/some-model"
    folder = save(tmp_path / "model", built, settings)
    ((name, patterns),) = asked
    assert name == "someone/some-model"
    assert "tokenizer.json" in patterns
    assert not [pattern for pattern in patterns if "safetensors" in pattern or "*" in pattern]
    assert torch.equal(embed(open_model(folder).built), embed(built))


def test_opening_a_full_model_warns_of_nothing(saved: Saved, caplog: pytest.LogCaptureFixture) -> None:
    folder, _ = saved("full")
    with caplog.at_level(logging.WARNING):
        open_model(folder)
    assert not caplog.records
