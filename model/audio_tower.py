"""The audio tower of Qwen2-Audio and of Whisper, on packed clips, with the checkpoint's own key names.

References: Whisper (Radford et al. 2022, https://arxiv.org/abs/2212.04356), Qwen2-Audio (Chu et al. 2024,
https://arxiv.org/abs/2407.10759). The published code pads each clip to 30 s and masks the padding out of attention;
positions are absolute, so leaving the padding away changes nothing but the convolutions' edge, which `AudioLayout`
keeps exact.

Shapes: T mel frame slots, P packed tokens, Q packed tokens after pooling, D hidden, H heads, M mels.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.attention import Heads, packed_attention, project
from model.convolutions import embed_frames
from model.fp8 import shared_product
from model.fp8_mlp import feed_forward
from model.kernels import uses_triton
from model.norms import LayerNorm, stream_dtype
from model.packing import AudioLayout, SequenceLayout
from model.parking import run_layers
from model.saved import remade

# Left out by the published config.json of Qwen2-Audio, which relies on transformers' defaults.
_DEFAULTS = {
    "num_mel_bins": 128,
    "encoder_layers": 32,
    "encoder_attention_heads": 20,
    "encoder_ffn_dim": 5120,
    "d_model": 1280,
    "max_source_positions": 1500,
}


@dataclass(frozen=True)
class AudioConfig:
    """Shape of an audio tower. `pool` is 2 where the tower averages token pairs before its last norm, else 1."""

    d_model: int
    num_layers: int
    num_heads: int
    ffn_dim: int
    num_mels: int
    max_positions: int
    pool: int

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], use_defaults: bool = True) -> "AudioConfig":
        """Read a qwen2_audio, qwen2_audio_encoder or whisper config. Raises ValueError for anything else.

        `use_defaults` fills what a Qwen2-Audio checkpoint leaves to transformers; an architecture file must say it all.
        """
        if config.get("model_type") == "qwen2_audio":
            config = {"model_type": "qwen2_audio_encoder", **(config.get("audio_config") or {})}
        model_type = config.get("model_type")
        if model_type not in ("qwen2_audio_encoder", "whisper"):
            raise ValueError(
                f"model_type: got {model_type!r}, an audio tower must be qwen2_audio, qwen2_audio_encoder or whisper"
            )
        if config.get("activation_function", "gelu") != "gelu":
            raise ValueError(f"activation_function: got {config['activation_function']!r}, only 'gelu' is supported")
        missing = [key for key in _DEFAULTS if key not in config]
        if missing and (model_type == "whisper" or not use_defaults):
            raise ValueError(f"audio config: {', '.join(missing)} missing")
        values = {key: int(config.get(key, default)) for key, default in _DEFAULTS.items()}
        if values["d_model"] % values["encoder_attention_heads"]:
            raise ValueError(
                f"d_model: got {values['d_model']}, must be a multiple of encoder_attention_heads "
                f"({values['encoder_attention_heads']})"
            )
        return cls(
            d_model=values["d_model"],
            num_layers=values["encoder_layers"],
            num_heads=values["encoder_attention_heads"],
            ffn_dim=values["encoder_ffn_dim"],
            num_mels=values["num_mel_bins"],
            max_positions=values["max_source_positions"],
            pool=2 if model_type == "qwen2_audio_encoder" else 1,
        )

    def to_hf(self) -> dict[str, Any]:
        """The same as an architecture file: what `from_hf` reads back."""
        return {
            "model_type": "qwen2_audio_encoder" if self.pool == 2 else "whisper",
            "d_model": self.d_model,
            "encoder_layers": self.num_layers,
            "encoder_attention_heads": self.num_heads,
            "encoder_ffn_dim": self.ffn_dim,
            "num_mel_bins": self.num_mels,
            "max_source_positions": self.max_positions,
        }

    @property
    def max_frames(self) -> int:
        """Mel frames of the longest clip: two a position."""
        return 2 * self.max_positions


class AudioAttention(nn.Module):
    """Bidirectional multi-head attention within each clip."""

    def __init__(self, config: AudioConfig, attention: str) -> None:
        super().__init__()
        self.heads = Heads(config.num_heads, config.num_heads, config.d_model // config.num_heads)
        self.attention = attention
        self.joint_projection: Callable[[Tensor], Tensor] | None = None
        self.q_proj = nn.Linear(config.d_model, config.d_model)
        self.k_proj = nn.Linear(config.d_model, config.d_model, bias=False)
        self.v_proj = nn.Linear(config.d_model, config.d_model)
        self.out_proj = nn.Linear(config.d_model, config.d_model)

    def forward(self, x_PD: Tensor, layout: SequenceLayout, remake: Callable[[], Tensor] | None = None) -> Tensor:
        """`remake` gives x_PD anew, so that the projections need not keep it."""
        with remade(x_PD, remake):
            qkv_PJ = project(self, x_PD)
        return self.out_proj(packed_attention(qkv_PJ, self.heads, layout, causal=False, backend=self.attention))


class AudioLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: AudioConfig, attention: str, dropout: float, kernels: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.kernels = kernels
        self.self_attn = AudioAttention(config, attention)
        self.self_attn_layer_norm = LayerNorm(config.d_model, kernels)
        self.fc1 = nn.Linear(config.d_model, config.ffn_dim)
        self.fc2 = nn.Linear(config.ffn_dim, config.d_model)
        self.final_layer_norm = LayerNorm(config.d_model, kernels)

    def forward(
        self, x_PD: Tensor, delta_PD: Tensor | None, layout: SequenceLayout, remakes: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, before and after: the sum meets the next norm.

        `remakes`: the first norm's result is made again from the stream in the backward pass instead of kept.
        """
        x_PD, y_PD = self.self_attn_layer_norm.add(x_PD, delta_PD)
        remake = self.self_attn_layer_norm.remaking(x_PD) if remakes else None
        attended_PD = F.dropout(self.self_attn(y_PD, layout, remake), self.dropout, self.training)
        x_PD, y_PD = self.final_layer_norm.add(x_PD, attended_PD)
        up, down = shared_product(self.fc1), shared_product(self.fc2)
        if up is not None and down is not None:
            expanded_PD = feed_forward(y_PD, up, down, False, self.kernels)
        else:
            expanded_PD = self.fc2(F.gelu(self.fc1(y_PD)))
        return x_PD, F.dropout(expanded_PD, self.dropout, self.training)


class AudioTower(nn.Module):
    """Mel slots in, one vector a (pooled) token out."""

    def __init__(
        self,
        config: AudioConfig,
        attention: str = "auto",
        checkpointing: bool = False,
        dropout: float = 0.0,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.config = config
        self.kernels = kernels
        self.num_checkpointed = config.num_layers if checkpointing else 0
        """Layers, from the first, that are computed again in the backward pass instead of kept."""
        self.parks_checkpoints = False
        """Whether what goes into them waits in host memory."""
        self.conv1 = nn.Conv1d(config.num_mels, config.d_model, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(config.d_model, config.d_model, kernel_size=3, stride=2, padding=1)
        self.embed_positions = nn.Embedding(config.max_positions, config.d_model)
        self.layers = nn.ModuleList(AudioLayer(config, attention, dropout, kernels) for _ in range(config.num_layers))
        self.layer_norm = LayerNorm(config.d_model, kernels)

    def layout(self, num_samples: list[int], device: torch.device | str) -> AudioLayout:
        """Index tables for clips of these lengths; ValueError for one that is empty or beyond the tower's reach."""
        return AudioLayout.build(num_samples, self.config.pool, self.config.max_frames, device)

    def forward(self, mel_TM: Tensor, layout: AudioLayout) -> Tensor:
        """Return x_QD in the compute dtype, tokens as in `layout.pooled`; `mel_TM` is zero in the gaps."""
        mel_TM = mel_TM.to(stream_dtype(self.conv1.weight))
        x_PD = embed_frames(mel_TM, layout, self.conv1, self.conv2, self.embed_positions, self.kernels)
        remakes = uses_triton(self.kernels, x_PD)
        x_PD, delta_PD = run_layers(
            self.layers, x_PD, (layout.tokens,), self.num_checkpointed, self.parks_checkpoints, remakes
        )
        if self.config.pool == 2:
            assert delta_PD is not None, "a tower without layers"
            return self.layer_norm.add_pairs(x_PD, delta_PD, layout.pool_first_Q, layout.pool_second_Q)  # P -> Q
        return self.layer_norm.add(x_PD, delta_PD)[1]
