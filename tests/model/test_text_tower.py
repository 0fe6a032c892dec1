"""The packed language model against transformers' Qwen2Model, one string at a time, in fp64."""

import copy

import pytest
import torch
from transformers import Qwen2Config

from model.build import build_model
from model.packing import TextPack
from model.settings import ModelSettings
from model.text_tower import TextConfig

LENGTHS = [1, 7, 30, 2, 130]


@pytest.fixture
def text_pack():
    return TextPack(torch.randint(0, 258, (sum(LENGTHS),)), LENGTHS)


def check_parity(tower, oracle, pack, relative_error):
    tower.requires_grad_(True)
    oracle.double().requires_grad_(True)
    ours_PD = tower(pack)
    assert ours_PD.dtype == torch.float64
    theirs_PD = torch.cat([oracle(ids[None]).last_hidden_state[0] for ids in pack.ids_P.split(pack.lengths)])
    errors = {"values": relative_error(ours_PD, theirs_PD)}
    weights_PD = torch.randn_like(theirs_PD)
    (ours_PD * weights_PD).sum().backward()
    (theirs_PD * weights_PD).sum().backward()
    ours, theirs = dict(tower.named_parameters()), dict(oracle.named_parameters())
    assert ours.keys() == theirs.keys()
    errors |= {name: relative_error(ours[name].grad, theirs[name].grad) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-10, (worst, errors[worst])


@pytest.mark.usefixtures("fp64_oracle")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_qwen2_parity_with_grouped_queries_and_tied_embeddings(
    checkpointing, qwen2, qwen2_folder, architecture_files, text_pack, relative_error
):
    settings = ModelSettings(
        audio_model=architecture_files[0], text_model=str(qwen2_folder), checkpointing=checkpointing
    )
    tower = build_model(settings, "cpu", torch.float64).model.language_model
    check_parity(tower, copy.deepcopy(qwen2.model), text_pack, relative_error)


@pytest.mark.usefixtures("fp64_oracle")
@pytest.mark.parametrize("scheme", ["v4", "v5"])
def test_qwen2_audio_parity(scheme, qwen2_audio, write_qwen2_audio, text_pack, relative_error):
    """Its rope base is not the default: one that is read from the wrong key shows."""
    tower = build_model(ModelSettings(model_name=str(write_qwen2_audio(scheme))), "cpu", torch.float64).model
    assert tower.language_model.config.rope_theta == 5000.0
    check_parity(tower.language_model, copy.deepcopy(qwen2_audio.model.language_model), text_pack, relative_error)


@pytest.mark.usefixtures("fp64_oracle")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_lm_readout_parity(checkpointing, qwen2_audio, write_qwen2_audio, make_pack, mel_30_s, relative_error):
    """Audio frames through projector and language model, each clip from position 0."""
    settings = ModelSettings(model_name=str(write_qwen2_audio("v4")), audio_readout="lm", checkpointing=checkpointing)
    model = build_model(settings, "cpu", torch.float64).model
    model.requires_grad_(True)
    pack = make_pack([0.05, 1.0, 0.31])
    ours_BE = model.encode_audio(pack)

    oracle = copy.deepcopy(qwen2_audio.model).double()
    oracle.requires_grad_(True)
    num_tokens = [(-(-samples // 160) - 1) // 2 + 1 for samples in pack.num_samples]
    mask_B11L = (torch.arange(1500) < torch.tensor(num_tokens)[:, None])[:, None, None]
    frames = oracle.audio_tower(mel_30_s(pack, 80), attention_mask=mask_B11L).last_hidden_state
    means = []
    for x_LD, tokens in zip(oracle.multi_modal_projector(frames), num_tokens, strict=True):
        out_1LD = oracle.language_model(inputs_embeds=x_LD[None, : tokens // 2]).last_hidden_state
        means.append(out_1LD[0].mean(0))
    theirs_BE = torch.nn.functional.normalize(model.audio_head(torch.stack(means)), dim=-1)
    assert relative_error(ours_BE, theirs_BE) <= 1e-10

    weights_BE = torch.randn_like(theirs_BE)
    ours = {name: p for name, p in model.named_parameters() if "head" not in name and "embed_tokens" not in name}
    theirs = dict(oracle.named_parameters())
    our_grads = torch.autograd.grad((ours_BE * weights_BE).sum(), list(ours.values()))
    their_grads = torch.autograd.grad((theirs_BE * weights_BE).sum(), [theirs[name] for name in ours])
    for name, a, b in zip(ours, our_grads, their_grads, strict=True):
        assert relative_error(a, b) <= 1e-10, name


def test_bf16_stays_bf16_in_the_stream_and_close_to_fp32(write_qwen2_audio, text_pack):
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float32).model
    seen = []
    for layer in model.language_model.layers:
        layer.register_forward_hook(lambda _, __, out: seen.extend(part.dtype for part in out))
    exact = model.encode_text(text_pack)
    model.compute_dtype = torch.bfloat16
    autocast = model.encode_text(text_pack)
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 4
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, exact, rtol=0, atol=0.03)


def test_a_string_beyond_the_positions_is_refused(write_qwen2_audio):
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4")))).model
    with pytest.raises(ValueError, match="lengths: the longest is 2049 tokens, the text tower takes 2048"):
        model.encode_text(TextPack(torch.zeros(2049, dtype=torch.int64), [2049]))


def test_published_config_relies_on_defaults():
    published = {"model_type": "qwen2_audio", "text_config": {"intermediate_size": 11008, "rms_norm_eps": 1e-5}}
    config = TextConfig.from_hf(published)
    defaults = Qwen2Config()
    assert (config.hidden_size, config.num_layers) == (defaults.hidden_size, defaults.num_hidden_layers)
    assert (config.num_heads, config.num_kv_heads) == (defaults.num_attention_heads, defaults.num_key_value_heads)
    assert (config.head_dim, config.rope_theta, config.rms_norm_eps) == (128, 10_000.0, 1e-5)
    assert config.vocab_size == defaults.vocab_size


@pytest.mark.parametrize(
    "rope", [{"rope_theta": 1e6}, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}, "rope_theta": 1.0}]
)
def test_rope_base_of_both_versions(rope):
    assert TextConfig.from_hf({"model_type": "qwen2", **rope}).rope_theta == 1e6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "llama"}, "model_type: got 'llama'"),
        ({"use_sliding_window": True}, "use_sliding_window"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "use_sliding_window"),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope_type: got 'yarn'"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 4.0}}, "rope_type: got 'linear'"),
        ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
        ({"num_key_value_heads": 5}, "num_attention_heads: got 32, must be a multiple of 5"),
    ],
)
def test_what_the_tower_cannot_run_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TextConfig.from_hf({"model_type": "qwen2", **change})


def test_an_architecture_must_say_it_all():
    with pytest.raises(ValueError, match="num_hidden_layers"):
        TextConfig.from_hf({"model_type": "qwen2", "hidden_size": 64}, use_defaults=False)
