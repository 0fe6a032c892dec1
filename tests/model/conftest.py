"""Small random checkpoints made by transformers, which is the oracle of this room.

transformers computes RMS norms and rotary angles in fp32 whatever the weights' dtype; `fp64_oracle` lifts that, so that
parity can be asked for at 1e-10.
"""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import (
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2Config,
    Qwen2ForCausalLM,
    WhisperConfig,
    WhisperModel,
)
from transformers.audio_utils import mel_filter_bank
from transformers.models.qwen2 import modeling_qwen2

from model.packing import AudioPack
from tests.model.byte_bpe import write_tokenizer

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()

SAMPLES_30_S = 480_000
AUDIO = {"d_model": 32, "encoder_layers": 2, "encoder_attention_heads": 2, "encoder_ffn_dim": 48, "num_mel_bins": 80}
TEXT = {
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 300,
    "max_position_embeddings": 2048,
}


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


def randomise(module: nn.Module) -> nn.Module:
    """Every parameter away from its start, norms and biases too: an identity would hide a missing tensor."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator) * 0.15
            parameter.copy_(noise + 1.0 if "norm" in name and name.endswith("weight") else noise)
    return module.eval()


@pytest.fixture(scope="session")
def qwen2_audio() -> Qwen2AudioForConditionalGeneration:
    config = Qwen2AudioConfig(
        audio_config={"model_type": "qwen2_audio_encoder", "max_source_positions": 1500, **AUDIO},
        text_config={"model_type": "qwen2", "rope_parameters": {"rope_type": "default", "rope_theta": 5000.0}, **TEXT},
        audio_token_index=299,
    )
    return randomise(Qwen2AudioForConditionalGeneration._from_config(config, attn_implementation="sdpa"))


@pytest.fixture(scope="session")
def whisper() -> WhisperModel:
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "vocab_size": 60}
    decoder = {"decoder_layers": 1, "decoder_attention_heads": 2, "decoder_ffn_dim": 48}
    config = WhisperConfig(**AUDIO, **decoder, **ids)
    return randomise(WhisperModel._from_config(config, attn_implementation="sdpa"))


@pytest.fixture(scope="session")
def qwen2() -> Qwen2ForCausalLM:
    config = Qwen2Config(tie_word_embeddings=True, **TEXT)
    return randomise(Qwen2ForCausalLM._from_config(config, attn_implementation="sdpa"))


@pytest.fixture
def fp64_oracle(monkeypatch: pytest.MonkeyPatch) -> None:
    def norm(self: nn.Module, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon))

    def rotary(self: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        head_dim = self.config.hidden_size // self.config.num_attention_heads
        rates = self.config.rope_parameters["rope_theta"] ** (-torch.arange(0, head_dim, 2, dtype=x.dtype) / head_dim)
        angles = position_ids[..., None].to(x.dtype) * rates
        return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()

    monkeypatch.setattr(modeling_qwen2.Qwen2RMSNorm, "forward", norm)
    monkeypatch.setattr(modeling_qwen2.Qwen2RotaryEmbedding, "forward", rotary)


def _write(folder: Path, config: dict, tensors: dict[str, Tensor]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file({key: value.clone() for key, value in tensors.items()}, folder / "model.safetensors")
    write_tokenizer(folder)
    return folder


def v4_key(key: str) -> str:
    """transformers 5 module path -> the key of the published checkpoints."""
    if key.startswith("lm_head."):
        return f"language_model.{key}"
    return key.removeprefix("model.").replace("language_model.", "language_model.model.", 1)


@pytest.fixture
def write_qwen2_audio(qwen2_audio, tmp_path) -> Callable[[str], Path]:
    def write(scheme: str) -> Path:
        tensors = qwen2_audio.state_dict()
        if scheme == "v4":
            tensors = {v4_key(key): value for key, value in tensors.items()}
        return _write(tmp_path / f"qwen2-audio-{scheme}", qwen2_audio.config.to_dict(), tensors)

    return write


@pytest.fixture
def whisper_folder(whisper, tmp_path) -> Path:
    tensors = {f"model.{key}": value for key, value in whisper.state_dict().items()}
    tensors["proj_out.weight"] = torch.zeros(60, 32)
    return _write(tmp_path / "whisper", whisper.config.to_dict(), tensors)


@pytest.fixture
def qwen2_folder(qwen2, tmp_path) -> Path:
    return _write(tmp_path / "qwen2", qwen2.config.to_dict(), qwen2.state_dict())


@pytest.fixture
def architecture_files(tmp_path) -> tuple[str, str]:
    """Paths of small audio and text architectures."""
    audio = {"model_type": "whisper", "max_source_positions": 1500, **AUDIO}
    text = {"model_type": "qwen2", "tokenizer": "bytes", **TEXT, "vocab_size": 257}
    (tmp_path / "audio.json").write_text(json.dumps(audio))
    (tmp_path / "text.json").write_text(json.dumps(text))
    return str(tmp_path / "audio.json"), str(tmp_path / "text.json")


@pytest.fixture(scope="session")
def make_pack() -> Callable[[list[float]], AudioPack]:
    """Clips of these lengths in seconds: noise of changing loudness over a tone, fp64, none near silence at its end."""

    def make(seconds: list[float]) -> AudioPack:
        rng = np.random.default_rng(3)
        clips = []
        for i, length in enumerate(seconds):
            time_S = np.arange(round(length * 16000)) / 16000
            tone_S = np.sin(2 * np.pi * (200 + 90 * i) * time_S) * (0.2 + 0.1 * np.sin(5 * time_S))
            clips.append(tone_S + rng.normal(0, 0.02 * (i + 1), len(time_S)))
        return AudioPack(torch.from_numpy(np.concatenate(clips)), [len(clip) for clip in clips])

    return make


@pytest.fixture(scope="session")
def mel_30_s() -> Callable[[AudioPack, int], Tensor]:
    """Whisper's published log-mel in fp64, each clip padded to 30 s: [B, num_mels, 3000]."""

    def compute(pack: AudioPack, num_mels: int) -> Tensor:
        filters = torch.from_numpy(mel_filter_bank(201, num_mels, 0.0, 8000.0, 16000, "slaney", "slaney"))
        window = torch.hann_window(400, dtype=torch.float64)
        features = []
        for clip_S in pack.pcm_S.double().split(pack.num_samples):
            padded_S = torch.nn.functional.pad(clip_S, (0, SAMPLES_30_S - len(clip_S)))
            power = torch.stft(padded_S, 400, 160, window=window, return_complex=True)[:, :-1].abs() ** 2
            log_mel = (filters.T @ power).clamp_min(1e-10).log10()
            features.append((torch.maximum(log_mel, log_mel.max() - 8.0) + 4.0) / 4.0)
        return torch.stack(features)

    return compute


@pytest.fixture(scope="session")
def relative_error() -> Callable[[Tensor, Tensor], float]:
    """Largest difference over the reference's largest value."""

    def compute(ours: Tensor, reference: Tensor) -> float:
        assert ours.shape == reference.shape, (ours.shape, reference.shape)
        return float((ours - reference).detach().abs().max() / reference.detach().abs().max())

    return compute
