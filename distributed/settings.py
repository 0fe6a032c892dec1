"""Settings of the processes: device, time limits, what is checked between ranks, how many checkpoints are kept."""

from dataclasses import dataclass
from typing import Literal

import torch


@dataclass
class DistributedSettings:
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes CUDA when there is a GPU, one GPU a process."""
    start_timeout_s: float = 600.0
    """Longest wait, in seconds, for all processes to find one another at start."""
    collective_timeout_s: float = 600.0
    """Longest wait, in seconds, for other processes within a collective; then the run fails instead of hanging."""
    gather_dtype: Literal["auto", "full", "bf16"] = "auto"
    """Precision of embeddings sent between processes: auto is bf16 on CUDA, full on CPU. Gradients return in full."""
    parameter_hash_every: int = 500
    """Steps between two comparisons of the trained parameters across processes; 0 turns the comparison off."""
    max_nonfinite_steps: int = 10
    """Steps in a row that may be skipped for a NaN or infinite loss or gradient before the run fails."""
    keep_checkpoints: int = 3
    """Newest checkpoints kept; older ones are removed after each save."""

    def __post_init__(self) -> None:
        for field in ("start_timeout_s", "collective_timeout_s"):
            if not 0.0 < getattr(self, field) < float("inf"):
                raise ValueError(f"{field} is {getattr(self, field)}; allowed: a finite number of seconds above 0")
        if self.parameter_hash_every < 0:
            raise ValueError(f"parameter_hash_every is {self.parameter_hash_every}; allowed: 0 (off) or above")
        for field in ("max_nonfinite_steps", "keep_checkpoints"):
            if getattr(self, field) < 1:
                raise ValueError(f"{field} is {getattr(self, field)}; allowed: 1 or above")

    def wire_dtype(self, device: torch.device) -> torch.dtype | None:
        """The dtype in which embeddings travel from `device`; None sends them as they are."""
        if self.gather_dtype == "bf16" or (self.gather_dtype == "auto" and device.type == "cuda"):
            return torch.bfloat16
        return None
