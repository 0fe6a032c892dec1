"""The random checkpoint against transformers, which must load it as it loads a published one."""

import json
import math
from pathlib import Path

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoTokenizer, Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

from bench import random_checkpoint
from bench.random_checkpoint import checkpoint_tensors, main, make_config, split_into_shards, write_checkpoint
from model.build import build_model
from model.settings import ModelSettings

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()


@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_transformers_loads_it_whole(layout, tmp_path):
    write_checkpoint(tmp_path / "out", "tiny", layout, device="cpu", max_shard_bytes=100_000)
    assert len(list((tmp_path / "out").glob("model-*.safetensors"))) > 2
    model, report = Qwen2AudioForConditionalGeneration.from_pretrained(
        tmp_path / "out", dtype=torch.float32, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report

    # Nothing was left as transformers had initialised it: the values are those of our own loader, bit for bit.
    ours = build_model(ModelSettings(model_name=str(tmp_path / "out"), audio_readout="lm"), "cpu").model
    theirs = {
        key.removeprefix("model."): value for key, value in model.state_dict().items() if not key.startswith("lm_head")
    }
    mine = {path: value for path, value in ours.state_dict().items() if path.partition(".")[0][-5:] != "_head"}
    assert mine.keys() == theirs.keys()
    assert [path for path in mine if not torch.equal(mine[path], theirs[path])] == []


@pytest.mark.parametrize("layout", ["v4", "v5"])
def test_full_shapes_are_those_of_transformers(layout):
    """At true size, without a byte of weights: the published config gives the model that it gives in transformers."""
    config = make_config("full", layout, 151649)
    with torch.device("meta"):
        model = Qwen2AudioForConditionalGeneration(Qwen2AudioConfig(**config))
    theirs = {key: tuple(value.shape) for key, value in model.state_dict().items()}
    assert checkpoint_tensors(config, "v5") == theirs
    sizes = {key: 2 * math.prod(shape) for key, shape in checkpoint_tensors(config, layout).items()}
    assert sum(sizes.values()) == 16_794_189_824
    shards = split_into_shards(checkpoint_tensors(config, layout), 5_000_000_000)
    assert [key for keys in shards for key in keys] == list(sizes)
    assert all(sum(sizes[key] for key in keys) <= 5_000_000_000 for keys in shards)
    assert len(shards) <= 5


def test_v4_keys_are_the_published_ones():
    keys = checkpoint_tensors(make_config("tiny", "v4", 257), "v4")
    assert {
        "audio_tower.conv1.weight",
        "audio_tower.embed_positions.weight",
        "audio_tower.layers.0.self_attn.q_proj.bias",
        "multi_modal_projector.linear.bias",
        "language_model.model.embed_tokens.weight",
        "language_model.model.layers.1.self_attn.k_proj.bias",
        "language_model.lm_head.weight",
    } <= keys.keys()
    assert "audio_tower.layers.0.self_attn.k_proj.bias" not in keys


def test_values_are_bf16_of_the_stated_spread_and_seed(tmp_path):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_checkpoint(tmp_path / name, "tiny", seed=seed, device="cpu")
    a, b, c = (
        safe_open(tmp_path / name / "model-00001-of-00001.safetensors", "pt", device="cpu") for name in ("a", "b", "c")
    )
    key = "language_model.model.embed_tokens.weight"
    assert a.get_tensor(key).dtype == torch.bfloat16
    assert torch.equal(a.get_tensor(key), b.get_tensor(key))
    assert not torch.equal(a.get_tensor(key), c.get_tensor(key))
    assert float(a.get_tensor(key).float().std()) == pytest.approx(0.02, rel=0.05)
    assert not torch.equal(a.get_tensor(key), a.get_tensor("language_model.lm_head.weight"))
    assert a.get_tensor("language_model.model.norm.weight").eq(1).all()
    assert a.get_tensor("audio_tower.layers.0.fc1.bias").float().abs().max() > 0.01


def test_byte_tokenizer_gives_one_id_a_byte_back_and_forth(tmp_path):
    write_checkpoint(tmp_path / "out", "tiny", device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    text = "Köln 'n, 0-9\t~ end\N{SOFT HYPHEN}"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(ids) == len(text.encode())
    assert tokenizer.decode(ids) == text
    assert tokenizer.pad_token_id == 256


def test_a_given_tokenizer_is_copied_and_fits(tmp_path):
    write_checkpoint(tmp_path / "first", "tiny", device="cpu")
    saved = json.loads((tmp_path / "first" / "tokenizer.json").read_text())
    saved["model"]["vocab"]["zzz"] = 400
    (tmp_path / "first" / "tokenizer.json").write_text(json.dumps(saved))
    write_checkpoint(tmp_path / "second", "tiny", tokenizer=tmp_path / "first", device="cpu")
    assert (tmp_path / "second" / "tokenizer.json").read_text() == (tmp_path / "first" / "tokenizer.json").read_text()
    config = json.loads((tmp_path / "second" / "config.json").read_text())
    assert config["text_config"]["vocab_size"] == 448
    with pytest.raises(ValueError, match="156033 ids, the model 156032"):
        make_config("full", "v4", 156_033)


def test_errors_of_the_command_line(tmp_path: Path, capsys, monkeypatch):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    with pytest.raises(SystemExit):
        main([str(tmp_path / "taken"), "--shapes", "tiny"])
    assert "not an empty folder" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main([str(tmp_path / "new"), "--shapes", "tiny", "--tokenizer", str(tmp_path)])
    assert "no tokenizer.json" in capsys.readouterr().err
    monkeypatch.setattr(random_checkpoint.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 1000})())
    with pytest.raises(SystemExit):
        main([str(tmp_path / "small"), "--shapes", "tiny"])
    assert "GB free" in capsys.readouterr().err
