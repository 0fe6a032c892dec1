"""The Qwen2 language model without its head, on packed strings, with the checkpoint's own key names.

Reference: Qwen2 (Yang et al. 2024, https://arxiv.org/abs/2407.10671): pre-norm with RMSNorm, rotary positions (Su et
al. 2021), grouped queries, SwiGLU.

Shapes: P packed tokens, D hidden, H query heads, K key/value heads.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from model.activations import join_weights, joined_weight, swiglu
from model.attention import Heads, packed_attention, project
from model.fp8 import shared_product
from model.fp8_mlp import feed_forward
from model.kernels import uses_triton
from model.norms import RMSNorm, stream_dtype
from model.packing import SequenceLayout, TextPack
from model.parking import run_layers
from model.rotary import Rotary
from model.saved import remade

# Left out by the published config.json of Qwen2-Audio, which relies on transformers' defaults.
_DEFAULTS = {
    "vocab_size": 151936,
    "hidden_size": 4096,
    "intermediate_size": 22016,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "max_position_embeddings": 32768,
}
_ROPE_THETA = 10_000.0
_RMS_NORM_EPS = 1e-6


@dataclass(frozen=True)
class TextConfig:
    """Shape of a text tower."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rope_theta: float
    rms_norm_eps: float

    @classmethod
    def from_hf(cls, config: Mapping[str, Any], use_defaults: bool = True) -> "TextConfig":
        """Read a qwen2 or qwen2_audio config. Raises ValueError for what this tower cannot run.

        `use_defaults` fills what a checkpoint leaves to transformers; an architecture file must say it all.
        """
        if config.get("model_type") == "qwen2_audio":
            config = {"model_type": "qwen2", **(config.get("text_config") or {})}
        if config.get("model_type") != "qwen2":
            raise ValueError(f"model_type: got {config.get('model_type')!r}, a text tower must be qwen2_audio or qwen2")
        if config.get("hidden_act", "silu") != "silu":
            raise ValueError(f"hidden_act: got {config['hidden_act']!r}, only 'silu' is supported")
        if config.get("use_sliding_window") or "sliding_attention" in (config.get("layer_types") or ()):
            raise ValueError("use_sliding_window: this checkpoint uses sliding windows, which are not supported")
        missing = [key for key in _DEFAULTS if key not in config and key != "max_position_embeddings"]
        if missing and not use_defaults:
            raise ValueError(f"text architecture: {', '.join(missing)} missing")
        values = {key: int(config.get(key, default)) for key, default in _DEFAULTS.items()}
        hidden_size, num_heads = values["hidden_size"], values["num_attention_heads"]
        num_kv_heads = int(config.get("num_key_value_heads") or num_heads)
        if num_heads % num_kv_heads:
            raise ValueError(f"num_attention_heads: got {num_heads}, must be a multiple of {num_kv_heads} (key/value)")
        if not config.get("head_dim") and hidden_size % num_heads:
            raise ValueError(f"hidden_size: got {hidden_size}, must be a multiple of num_attention_heads ({num_heads})")
        return cls(
            vocab_size=values["vocab_size"],
            hidden_size=hidden_size,
            intermediate_size=values["intermediate_size"],
            num_layers=values["num_hidden_layers"],
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_dim=int(config.get("head_dim") or hidden_size // num_heads),
            max_positions=values["max_position_embeddings"],
            rope_theta=_read_rope_theta(config),
            rms_norm_eps=float(config.get("rms_norm_eps", _RMS_NORM_EPS)),
        )

    def to_hf(self) -> dict[str, Any]:
        """The same as an architecture file: what `from_hf` reads back."""
        return {
            "model_type": "qwen2",
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.max_positions,
            "rope_theta": self.rope_theta,
            "rms_norm_eps": self.rms_norm_eps,
        }


def _read_rope_theta(config: Mapping[str, Any]) -> float:
    """transformers 5 writes `rope_parameters`, earlier versions `rope_theta` and `rope_scaling`."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    rope_type = rope.get("rope_type", rope.get("type", "default"))
    if rope_type != "default":
        raise ValueError(f"rope_type: got {rope_type!r}, only 'default' (no scaling) is supported")
    return float(rope.get("rope_theta") or config.get("rope_theta") or _ROPE_THETA)


class TextAttention(nn.Module):
    """Causal grouped-query attention within each string, with rotary positions."""

    def __init__(self, config: TextConfig, attention: str) -> None:
        super().__init__()
        self.heads = Heads(config.num_heads, config.num_kv_heads, config.head_dim)
        self.attention = attention
        self.joint_projection: Callable[[Tensor], Tensor] | None = None
        width, kv_width = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width)
        self.k_proj = nn.Linear(config.hidden_size, kv_width)
        self.v_proj = nn.Linear(config.hidden_size, kv_width)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)

    def forward(
        self, x_PD: Tensor, rotary: Rotary, layout: SequenceLayout, remake: Callable[[], Tensor] | None = None
    ) -> Tensor:
        """`remake` gives x_PD anew, so that the projections need not keep it."""
        with remade(x_PD, remake):
            qkv_PJ = project(self, x_PD)
        return self.o_proj(packed_attention(qkv_PJ, self.heads, layout, True, rotary, self.attention))


class GatedMlp(nn.Module):
    """SwiGLU (Shazeer 2020). Frozen, gate and up are one product once `join` has laid their weights together."""

    def __init__(self, config: TextConfig, kernels: str) -> None:
        super().__init__()
        self.kernels = kernels
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def join(self) -> None:
        join_weights(self.gate_proj, self.up_proj)

    def forward(self, x_PD: Tensor) -> Tensor:
        product, down = shared_product(self.gate_proj, self.up_proj), shared_product(self.down_proj)
        if product is not None and down is not None:
            return feed_forward(x_PD, product, down, True, self.kernels)
        weight = None if self.kernels == "torch" else joined_weight(self.gate_proj, self.up_proj)
        if weight is None:
            return self.down_proj(F.silu(self.gate_proj(x_PD)) * self.up_proj(x_PD))
        return self.down_proj(swiglu(F.linear(x_PD, weight), self.kernels))


class TextLayer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, config: TextConfig, attention: str, dropout: float, kernels: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.self_attn = TextAttention(config, attention)
        self.mlp = GatedMlp(config, kernels)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(
        self, x_PD: Tensor, delta_PD: Tensor | None, rotary: Rotary, layout: SequenceLayout, remakes: bool = False
    ) -> tuple[Tensor, Tensor]:
        """The residual stream and what is still to be added to it, before and after: the sum meets the next norm.

        `remakes`: the first norm's result is made again from the stream in the backward pass instead of kept.
        """
        x_PD, y_PD = self.input_layernorm.add(x_PD, delta_PD)
        remake = self.input_layernorm.remaking(x_PD) if remakes else None
        attended_PD = F.dropout(self.self_attn(y_PD, rotary, layout, remake), self.dropout, self.training)
        x_PD, y_PD = self.post_attention_layernorm.add(x_PD, attended_PD)
        return x_PD, F.dropout(self.mlp(y_PD), self.dropout, self.training)


class TextTower(nn.Module):
    """Token ids (or embeddings) in, one vector a token out."""

    def __init__(
        self,
        config: TextConfig,
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
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(TextLayer(config, attention, dropout, kernels) for _ in range(config.num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, kernels)

    def forward(self, pack: TextPack, layout: SequenceLayout | None = None) -> Tensor:
        """Return x_PD in the compute dtype; positions restart with each string. Raises as `forward_embeds`."""
        x_PD = self.embed_tokens(pack.ids_P).to(stream_dtype(self.embed_tokens.weight))
        return self.forward_embeds(x_PD, pack.lengths, layout)

    def forward_embeds(self, x_PD: Tensor, lengths: list[int], layout: SequenceLayout | None = None) -> Tensor:
        """The same from embeddings. `layout` may be given where the caller has it. ValueError for a string too long."""
        layout = layout or SequenceLayout.build(lengths, x_PD.device)
        if layout.max_len > self.config.max_positions:
            limit = self.config.max_positions
            raise ValueError(f"lengths: the longest is {layout.max_len} tokens, the text tower takes {limit}")
        rotary = Rotary.build(
            self.config.rope_theta, self.config.head_dim, layout.max_len, x_PD.dtype, layout.place_P.device
        )
        remakes = uses_triton(self.kernels, x_PD)
        x_PD, delta_PD = run_layers(
            self.layers, x_PD, (rotary, layout), self.num_checkpointed, self.parks_checkpoints, remakes
        )
        return self.norm.add(x_PD, delta_PD)[1]
