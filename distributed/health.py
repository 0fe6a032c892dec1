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

    def check(self, step: int, **numbers: float) -> bool:
        """Whether all numbers of a step are finite; if not, it has been skipped, which is counted and told.

        Pass numbers that are the same on all ranks, and every step once. Raises RuntimeError, naming the numbers, at
        the `max_in_a_row`-th bad step in a row.
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


class ArrivingGradients:
    """Notes which trainable parameters a backward pass reaches, from when it is made until `missing` is asked.

    `.grad` cannot tell: it may be a buffer that is always there. A gradient of zeros is a gradient: LoRA's A gets zeros
    as long as its B is zero.
    """

    def __init__(self, named_params: NamedParameters) -> None:
        trainable = [(name, param) for name, param in named_params if param.requires_grad]
        self._names = [name for name, _ in trainable]
        self._arrived: set[Parameter] = set()
        self._params = [param for _, param in trainable]
        self._hooks = [param.register_post_accumulate_grad_hook(self._arrived.add) for param in self._params]

    def missing(self) -> list[str]:
        """Names of those without a gradient on any rank (one without clips may well have none). A collective, once."""
        for hook in self._hooks:
            hook.remove()
        has_gradient = torch.tensor([param in self._arrived for param in self._params], dtype=torch.int32)
        if num_ranks() > 1 and self._params:
            all_reduce(has_gradient, op=dist.ReduceOp.MAX)
        return [name for name, found in zip(self._names, has_gradient.tolist(), strict=True) if not found]


def nonfinite_gradients(named_params: NamedParameters) -> list[str]:
    """Names of parameters whose gradient on this rank holds a NaN or an infinity: for a message, as it synchronises."""
    return [
        name for name, param in named_params if param.grad is not None and not bool(torch.isfinite(param.grad).all())
    ]
