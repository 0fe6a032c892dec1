"""Signs that a run is broken: numbers that stay NaN, parameters that learn nothing."""

import logging
import math
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch.nn import Parameter

from distributed.collectives import all_reduce, num_ranks

logger = logging.getLogger(__name__)

NamedParameters = Iterable[tuple[str, Parameter]]


class NonFiniteGuard:
    """Lets a few steps in a row be skipped for NaN or infinite numbers, then ends the run."""

    def __init__(self, max_in_a_row: int) -> None:
        if max_in_a_row < 1:
            raise ValueError(f"max_in_a_row is {max_in_a_row}; allowed: 1 or above")
        self.max_in_a_row = max_in_a_row
        self.num_in_a_row = 0
        self.num_skipped = 0

    def accepts(self, step: int, **numbers: float) -> bool:
        """Whether all numbers are finite; False asks the caller to skip the step.

        Pass numbers that all ranks agree on (`collectives.agree`), so that all skip alike. Raises RuntimeError, naming
        the numbers, at the `max_in_a_row`-th bad step in a row.
        """
        bad = {name: value for name, value in numbers.items() if not math.isfinite(value)}
        if not bad:
            self.num_in_a_row = 0
            return True
        self.num_in_a_row += 1
        self.num_skipped += 1
        named = ", ".join(f"{name} is {value}" for name, value in bad.items())
        if self.num_in_a_row >= self.max_in_a_row:
            raise RuntimeError(
                f"{named} at step {step}: {self.num_in_a_row} such steps in a row (max_nonfinite_steps). "
                "The run diverges; resume from an earlier checkpoint with a lower --lr"
            )
        logger.warning("step %d is skipped: %s (%d in a row)", step, named, self.num_in_a_row)
        return False


def missing_gradients(named_params: NamedParameters) -> list[str]:
    """Names of trainable parameters that got no gradient on any rank. Collective.

    Call after the first backward pass and before `sync_gradients`, which fills gaps with zeros. A gradient of zeros is
    a gradient: LoRA's A gets zeros as long as its B is zero, and a rank without clips may well have none.
    """
    trainable = [(name, param) for name, param in named_params if param.requires_grad]
    has_gradient = torch.tensor([param.grad is not None for _, param in trainable], dtype=torch.int32)
    if num_ranks() > 1 and trainable:
        all_reduce(has_gradient, op=dist.ReduceOp.MAX)
    return [name for (name, _), found in zip(trainable, has_gradient.tolist(), strict=True) if not found]


def nonfinite_gradients(named_params: NamedParameters) -> list[str]:
    """Names of parameters whose gradient on this rank holds a NaN or an infinity: for a message, as it synchronises."""
    return [
        name for name, param in named_params if param.grad is not None and not bool(torch.isfinite(param.grad).all())
    ]
