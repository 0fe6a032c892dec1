"""Settings of the low-rank adapters."""

from dataclasses import dataclass

DEFAULT_TARGETS = (
    "audio_tower.layers.*.self_attn.[qkv]_proj",
    "language_model.layers.*.self_attn.[qkv]_proj",
)


@dataclass
class LoraSettings:
    lora_r: int = 16
    """Rank of the adapters."""
    lora_alpha: float = 32
    """Adapters are scaled by lora_alpha / lora_r."""
    lora_dropout: float = 0.1
    """Chance of dropping an element of an adapter's input during training."""
    lora_targets: tuple[str, ...] = DEFAULT_TARGETS
    """Linear layers to adapt: shell-style patterns (* ? [abc]) over full module paths; * also crosses dots."""
    lora_fused: bool = True
    """Compute base and adapter in one autograd node that keeps only what its backward pass needs."""
    lora_joint: bool = True
    """With lora_fused: the q, k and v projections of an attention module, adapters included, as one product with one dropout mask."""  # noqa: E501

    def __post_init__(self) -> None:
        if self.lora_r < 1:
            raise ValueError(f"lora_r is {self.lora_r}; allowed: 1 or above")
        if not 0.0 < self.lora_alpha < float("inf"):
            raise ValueError(f"lora_alpha is {self.lora_alpha}; allowed: above 0")
        if not 0.0 <= self.lora_dropout < 1.0:
            raise ValueError(f"lora_dropout is {self.lora_dropout}; allowed: from 0 up to, not including, 1")
        if not self.lora_targets or isinstance(self.lora_targets, str):
            raise ValueError(
                f"lora_targets is {self.lora_targets!r}; allowed: one or more patterns over full module paths, "
                f"such as {DEFAULT_TARGETS[0]}"
            )
