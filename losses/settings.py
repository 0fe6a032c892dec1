"""Settings of the training objective."""

from dataclasses import dataclass

MIN_TEMPERATURE = 0.01  # 1 / 100: CLIP's upper bound on the inverse temperature
KERNEL_CHOICES = ("auto", "fused", "dense")


@dataclass
class LossSettings:
    temperature: float = 0.07
    """Softmax temperature: scores are cosine / temperature. The starting value when it is learned."""
    learn_temperature: bool = False
    """Train the temperature along with the model (kept at 0.01 or above)."""
    audio_text_loss_ratio: float = 0.3
    """Weight of the loss between a chunk's audio and its text."""
    audio_term_loss_ratio: float = 0.7
    """Weight of the loss between a chunk's audio and its glossary terms."""
    enable_hard_neg: bool = True
    """Add the loss against each clip's hardest negative terms."""
    hard_neg_k: int = 10
    """Hard negatives a clip."""
    hard_neg_weight: float = 0.2
    """Weight of the hard-negative loss."""
    hard_neg_margin: float = 0.05
    """Candidates whose cosine exceeds pos - |pos| * margin are taken for false negatives and left out."""
    no_term_loss_ratio: float = 0.0
    """Weight of the loss that keeps clips without any term away from all terms; 0 turns it off."""
    no_term_margin: float = 0.3
    """Cosine below which a term no longer bothers a clip without terms."""
    loss_kernels: str = "auto"
    """fused: scores are made tile by tile, never held; dense: plain matrices; auto: fused where batches are large."""

    def __post_init__(self) -> None:
        if not self.temperature >= MIN_TEMPERATURE:
            raise ValueError(f"temperature is {self.temperature}; allowed: {MIN_TEMPERATURE} or above")
        for field in ("audio_text_loss_ratio", "audio_term_loss_ratio", "hard_neg_weight", "no_term_loss_ratio"):
            if not 0.0 <= getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}; allowed: 0 or above")
        if self.hard_neg_k < 1:
            raise ValueError(
                f"hard_neg_k is {self.hard_neg_k}; allowed: 1 or above (--no-enable_hard_neg turns it off)"
            )
        if not 0.0 <= self.hard_neg_margin < 1.0:
            raise ValueError(f"hard_neg_margin is {self.hard_neg_margin}; allowed: from 0 up to, not including, 1")
        if not -1.0 <= self.no_term_margin <= 1.0:
            raise ValueError(f"no_term_margin is {self.no_term_margin}; allowed: a cosine, -1 to 1")
        if self.loss_kernels not in KERNEL_CHOICES:
            raise ValueError(f"loss_kernels is {self.loss_kernels!r}; allowed: {', '.join(KERNEL_CHOICES)}")
        weights = (self.audio_text_loss_ratio, self.audio_term_loss_ratio, self.no_term_loss_ratio)
        if not any(weights) and not (self.enable_hard_neg and self.hard_neg_weight):
            raise ValueError("every loss weight is 0, so nothing would be trained; raise audio_term_loss_ratio")
