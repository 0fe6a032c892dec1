"""The optimizer step: gradients summed over ranks, clipped and applied, unless something is not finite.

`FlatUpdate` keeps the host out of it: one all-reduce carries gradients, losses and the wish to stop; whether the step
is skipped is decided on the device; and the host reads what came of it one step late, when that has long been copied.
`PlainUpdate` is the reference for the same arithmetic, parameter by parameter, with a host that waits for each number.
Both are collectives: every rank calls the same methods in the same order, and reads the same outcomes.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import Parameter

from distributed.collectives import sum_over_ranks
from distributed.flat import FlatParameters
from distributed.gradsync import clip_gradients, sync_gradients

NUM_TAIL = 16  # the wish to stop, the loss, its parts


@dataclass(frozen=True)
class Outcome:
    """What came of a step, the same on every rank."""

    step: int
    losses: dict[str, float]  # summed over ranks: `loss` and its parts
    gradient_norm: float  # before clipping
    wants_stop: bool  # some rank was asked to stop


class Update(Protocol):
    """An optimizer over the trainable parameters, and the steps it takes."""

    @property
    def optimizer(self) -> torch.optim.AdamW:
        """What the schedule sets the learning rate of, and a checkpoint holds the state of."""

    @property
    def flat(self) -> FlatParameters | None:
        """What holds the parameters, if they are held together."""

    def zero(self) -> None:
        """Forget all gradients."""

    def apply(self, step: int, shares: Mapping[str, Tensor], wants_stop: bool, max_norm: float) -> None:
        """Sum the gradients over ranks, scale them down to the L2 norm `max_norm`, and let the optimizer take its step,
        unless the summed loss or the norm is NaN or infinite: then nothing changes, on any rank.

        shares: this rank's share of the loss, and of its parts, scalars; their names are the same on every rank.
        """

    def outcomes(self, now: bool) -> list[Outcome]:
        """Those not read before, in order of steps. `now`: up to the last one, though the host may have to wait."""


def make_update(
    groups: list[dict[str, Any]], named: list[tuple[str, Parameter]], lr: float, beta2: float, flat: bool
) -> Update:
    """groups: of bin.optimizer.parameter_groups."""
    return FlatUpdate(groups, named, lr, beta2) if flat else PlainUpdate(groups, lr, beta2)


class PlainUpdate:
    def __init__(self, groups: list[dict[str, Any]], lr: float, beta2: float) -> None:
        self.flat = None
        self.optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2))
        self._params = [param for group in groups for param in group["params"]]
        self._unread: list[Outcome] = []

    def zero(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def apply(self, step: int, shares: Mapping[str, Tensor], wants_stop: bool, max_norm: float) -> None:
        sync_gradients(self._params)
        norm = float(clip_gradients(self._params, max_norm))
        sums = sum_over_ranks(wants_stop=wants_stop, **{name: float(share) for name, share in shares.items()})
        self._unread.append(Outcome(step, {name: sums[name] for name in shares}, norm, sums["wants_stop"] > 0))
        if math.isfinite(norm) and math.isfinite(sums["loss"]):
            self.optimizer.step()

    def outcomes(self, now: bool) -> list[Outcome]:
        found, self._unread = self._unread, []
        return found


@dataclass(frozen=True, eq=False)
class _Unread:
    """Numbers on their way to the host: gradient norm, wish to stop, losses."""

    step: int
    names: tuple[str, ...]
    numbers: Tensor  # on the CPU; pinned, and filled when `copied` has happened
    copied: "torch.cuda.Event | None"

    def read(self) -> Outcome:
        if self.copied is not None:
            self.copied.synchronize()
        norm, stop, *losses = self.numbers.tolist()
        return Outcome(self.step, dict(zip(self.names, losses, strict=True)), norm, stop > 0)


class FlatUpdate:
    """reads_late: whether the newest outcome is left for the next call; by default on CUDA, where it is under way."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        named: list[tuple[str, Parameter]],
        lr: float,
        beta2: float,
        reads_late: bool | None = None,
    ) -> None:
        name_of = {param: name for name, param in named}
        self.flat = FlatParameters([[(name_of[p], p) for p in group["params"]] for group in groups], NUM_TAIL)
        flat_groups = [group | {"params": [flat]} for group, flat in zip(groups, self.flat.groups, strict=True)]
        self.optimizer = torch.optim.AdamW(flat_groups, lr=lr, betas=(0.9, beta2), fused=True)
        self._is_cuda = self.flat.gradients_F.is_cuda
        self._reads_late = self._is_cuda if reads_late is None else reads_late
        self._unread: list[_Unread] = []

    def zero(self) -> None:
        self.flat.zero()

    def apply(self, step: int, shares: Mapping[str, Tensor], wants_stop: bool, max_norm: float) -> None:
        tail_X, names = self.flat.tail_X, tuple(shares)
        assert names[0] == "loss", names
        assert len(names) < NUM_TAIL, names
        if wants_stop:  # else it is zero, as all of the tail
            tail_X[0].fill_(1.0)
        tail_X[1 : 1 + len(names)].copy_(torch.stack([share.detach() for share in shares.values()]))
        self.flat.sum_over_ranks()

        # From here on all ranks hold the same bits, and so decide alike. AdamW's kernel divides the gradient by
        # `grad_scale` as it reads it, and does nothing at all where `found_inf` is 1.
        norm = self.flat.gradient_norm()
        is_finite = torch.stack([norm, tail_X[1]]).isfinite().all()
        self.optimizer.grad_scale = ((norm + 1e-6) / max_norm).clamp(min=1.0).float()  # type: ignore[attr-defined]
        self.optimizer.found_inf = is_finite.logical_not().float()  # type: ignore[attr-defined]
        self.optimizer.step()

        self._unread.append(self._send(step, names, torch.cat([norm[None], tail_X[: 1 + len(names)]])))

    def _send(self, step: int, names: tuple[str, ...], numbers: Tensor) -> _Unread:
        if not self._is_cuda:
            return _Unread(step, names, numbers, None)
        host = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
        host.copy_(numbers, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record()
        return _Unread(step, names, host, copied)

    def outcomes(self, now: bool) -> list[Outcome]:
        num_left = 1 if self._reads_late and not now else 0
        ready = self._unread[: len(self._unread) - num_left]
        self._unread = self._unread[len(ready) :]
        return [unread.read() for unread in ready]
