"""The packed audio tower against transformers' Qwen2AudioEncoder on clips padded to 30 s, the padding masked, in fp64.

Whisper checkpoints run in the same encoder without its pooling: transformers' own WhisperEncoder attends to the
padding, which is another function.
"""

import copy

import pytest
import torch
from torch import nn
from transformers import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from model.audio_tower import AudioConfig
from model.build import build_model
from model.packing import AudioPack
from model.settings import ModelSettings

# Odd and even frame and token counts, one token, the full 30 s, and the two lengths whose tail is cut at frame 2999.
LENGTHS_S = [0.03, 0.05, 1.0, 30.0, 1.234, 29.98, 29.99, 0.31]


def padded_oracle(encoder, mel_BMT, num_frames):
    """[tokens, D] a clip, as Qwen2AudioModel calls its tower; whole pooled tokens only, as it counts them."""
    num_tokens = [(frames - 1) // 2 + 1 for frames in num_frames]
    mask_B11L = (torch.arange(1500) < torch.tensor(num_tokens)[:, None])[:, None, None]
    x_BLD = encoder(mel_BMT, attention_mask=mask_B11L).last_hidden_state
    pool = 1 if isinstance(encoder.avg_pooler, nn.Identity) else 2
    return [x_LD[: tokens // pool] for x_LD, tokens in zip(x_BLD, num_tokens, strict=True)]


def whisper_as_qwen2_audio(whisper):
    config = Qwen2AudioEncoderConfig(**{**whisper.config.to_dict(), "model_type": "qwen2_audio_encoder"})
    encoder = Qwen2AudioEncoder._from_config(config, attn_implementation="sdpa")
    encoder.load_state_dict(whisper.encoder.state_dict())
    encoder.avg_pooler = nn.Identity()
    return encoder


def check_parity(tower, log_mel, encoder, pack, mel_BMT, relative_error):
    """Values, then gradients of a random linear functional with respect to every parameter. Returns the worst error."""
    tower.requires_grad_(True)
    encoder.double().requires_grad_(True)
    layout = tower.layout(pack.num_samples, "cpu")
    ours_QD = tower(log_mel(pack.pcm_S, layout, torch.float64), layout)
    assert ours_QD.dtype == torch.float64
    theirs_QD = torch.cat(padded_oracle(encoder, mel_BMT, layout.num_frames))
    errors = {"values": relative_error(ours_QD, theirs_QD)}
    weights_QD = torch.randn_like(theirs_QD)
    (ours_QD * weights_QD).sum().backward()
    (theirs_QD * weights_QD).sum().backward()
    theirs = dict(encoder.named_parameters())
    ours = dict(tower.named_parameters())
    assert ours.keys() == theirs.keys()
    errors |= {name: relative_error(ours[name].grad, theirs[name].grad) for name in ours}
    worst = max(errors, key=errors.__getitem__)
    assert errors[worst] <= 1e-10, (worst, errors[worst])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("scheme", ["v4", "v5"])
def test_qwen2_audio_parity(scheme, checkpointing, qwen2_audio, write_qwen2_audio, make_pack, mel_30_s, relative_error):
    settings = ModelSettings(model_name=str(write_qwen2_audio(scheme)), checkpointing=checkpointing)
    model = build_model(settings, "cpu", torch.float64).model
    pack = make_pack(LENGTHS_S if scheme == "v4" else LENGTHS_S[:3])
    encoder = copy.deepcopy(qwen2_audio.model.audio_tower)
    check_parity(model.audio_tower, model.log_mel, encoder, pack, mel_30_s(pack, 80), relative_error)


def test_whisper_parity(whisper, whisper_folder, qwen2_folder, make_pack, mel_30_s, relative_error):
    settings = ModelSettings(audio_model=str(whisper_folder), text_model=str(qwen2_folder))
    model = build_model(settings, "cpu", torch.float64).model
    pack = make_pack([0.01, *LENGTHS_S])
    encoder = whisper_as_qwen2_audio(whisper)
    check_parity(model.audio_tower, model.log_mel, encoder, pack, mel_30_s(pack, 80), relative_error)


def test_a_clip_of_one_token_keeps_it(qwen2_audio, write_qwen2_audio, make_pack, mel_30_s, relative_error):
    """The published pooling would return nothing for 10 or 20 ms; here the token passes the last norm unpooled."""
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float64).model
    pack = make_pack([0.01, 0.5, 0.02])
    layout = model.audio_tower.layout(pack.num_samples, "cpu")
    x_QD = model.audio_tower(model.log_mel(pack.pcm_S, layout, torch.float64), layout)
    assert layout.pooled.lengths == [1, 12, 1]
    encoder = copy.deepcopy(qwen2_audio.model.audio_tower).double()
    encoder.avg_pooler = nn.Identity()
    unpooled = padded_oracle(encoder, mel_30_s(pack, 80), layout.num_frames)
    assert relative_error(x_QD[[0, -1]], torch.cat([unpooled[0], unpooled[2]])) <= 1e-10


def test_a_clip_does_not_depend_on_its_neighbours(write_qwen2_audio, make_pack):
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float64).model
    pack = make_pack([0.31, 0.4, 0.77])
    together = model.encode_audio(pack)
    clips = pack.pcm_S.split(pack.num_samples)
    alone = torch.cat([model.encode_audio(AudioPack(clip, [len(clip)])) for clip in clips])
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_bf16_stays_bf16_in_the_stream_and_close_to_fp32(write_qwen2_audio, make_pack):
    """Under autocast F.layer_norm gives fp32, which would widen the residual stream."""
    model = build_model(ModelSettings(model_name=str(write_qwen2_audio("v4"))), "cpu", torch.float32).model
    seen = []
    for layer in model.audio_tower.layers:
        layer.register_forward_hook(lambda _, __, out: seen.extend(part.dtype for part in out))
    pack = make_pack([0.31, 0.4])
    exact = model.encode_audio(pack)
    model.compute_dtype = torch.bfloat16
    autocast = model.encode_audio(pack)
    assert seen == [torch.float32] * 4 + [torch.bfloat16] * 4
    assert autocast.dtype == torch.float32
    torch.testing.assert_close(autocast, exact, rtol=0, atol=0.03)


def test_published_config_relies_on_defaults():
    """Qwen2-Audio's config.json leaves out what transformers' defaults give."""
    config = AudioConfig.from_hf({"model_type": "qwen2_audio", "audio_config": {"model_type": "qwen2_audio_encoder"}})
    defaults = Qwen2AudioEncoderConfig()
    assert (config.d_model, config.num_layers, config.num_heads) == (1280, 32, 20)
    assert config.ffn_dim == defaults.encoder_ffn_dim
    assert (config.num_mels, config.max_positions) == (defaults.num_mel_bins, defaults.max_source_positions)
    assert (config.pool, config.max_frames) == (2, 3000)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "wav2vec2"}, "model_type: got 'wav2vec2'"),
        ({"activation_function": "relu"}, "activation_function: got 'relu'"),
        ({"encoder_attention_heads": 3}, "d_model: got 1280, must be a multiple of encoder_attention_heads"),
    ],
)
def test_config_errors(change, message):
    with pytest.raises(ValueError, match=message):
        AudioConfig.from_hf({"model_type": "qwen2_audio_encoder", **change})


def test_an_architecture_must_say_it_all():
    with pytest.raises(ValueError, match="encoder_layers"):
        AudioConfig.from_hf({"model_type": "qwen2_audio_encoder", "d_model": 64}, use_defaults=False)
