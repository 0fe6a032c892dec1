"""Recomputed layers, whose inputs may wait in pinned host memory, so that the device holds one layer at a time.

Values and gradients are those of torch.utils.checkpoint: the layer runs once without a graph and once more in the
backward pass, from the same input, random state and autocast. Copies run on a stream of their own, out behind the
forward pass and in ahead of the backward pass; at most two wait at a time, so that they hold little of the device.

Shapes: P packed tokens, D width.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

Layer = Callable[..., tuple[Tensor, Tensor]]
MOST_WAITING = 2


def run_layers(
    layers: Iterable[Layer], x_PD: Tensor, rest: tuple[Any, ...], num_recomputed: int, parks: bool, remakes: bool
) -> tuple[Tensor, Tensor | None]:
    """The residual stream behind a tower's layers, and what is still to be added to it (None without layers).

    Each is called with stream, addend, `rest` and `remakes`. In training, the first `num_recomputed` are computed again
    in the backward pass instead of kept, without `remakes`; `parks`: what goes into them waits in host memory.
    """
    delta_PD: Tensor | None = None
    parking = Parking(x_PD.device) if parks else None
    for i, layer in enumerate(layers):
        if i < num_recomputed and torch.is_grad_enabled():
            # Summed here, one tensor is kept instead of two. Reentrant checkpointing would give no gradient at all
            # behind a frozen input.
            x_PD = x_PD if delta_PD is None else x_PD + delta_PD
            if parking is not None:
                x_PD, delta_PD = parking.run(layer, x_PD, *rest)
            else:
                x_PD, delta_PD = checkpoint(layer, x_PD, None, *rest, use_reentrant=False)
        else:
            x_PD, delta_PD = layer(x_PD, delta_PD, *rest, remakes)
    return x_PD, delta_PD


@dataclass(eq=False)
class _Place:
    """Of one layer's input: on the host, and, from shortly before it is used, on the device."""

    host: Tensor
    copied: "torch.cuda.Event | None" = None
    device: Tensor | None = None
    loaded: "torch.cuda.Event | None" = None


@dataclass(eq=False)
class Parking:
    """The inputs of one forward pass; on a CPU they stay where they are."""

    device: torch.device
    places: list[_Place] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        self._anchor = torch.zeros((), device=self.device, requires_grad=True)  # a frozen input has no gradient

    def run(self, layer: Layer, x_PD: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        """layer(x_PD, None, *rest), to be computed again in the backward pass. `rest` stays on the device."""
        return _Recomputed.apply(self._anchor, x_PD, self, layer, rest)

    def put(self, x_PD: Tensor) -> int:
        if self._stream is None:
            self.places.append(_Place(x_PD))
            return len(self.places) - 1
        now = torch.cuda.current_stream(self.device)
        if len(self.places) >= MOST_WAITING:
            oldest = self.places[-MOST_WAITING].copied
            assert oldest is not None
            now.wait_event(oldest)
        host = torch.empty(x_PD.shape, dtype=x_PD.dtype, pin_memory=True)
        self._stream.wait_stream(now)
        with torch.cuda.stream(self._stream):
            host.copy_(x_PD, non_blocking=True)
            copied = self._stream.record_event()
        x_PD.record_stream(self._stream)
        self.places.append(_Place(host, copied))
        return len(self.places) - 1

    def take(self, index: int) -> Tensor:
        """The input of a layer, once; that of the layer before it starts on its way."""
        if self._stream is None:
            return self.places[index].host
        self._load(index)
        place = self.places[index]
        assert place.device is not None
        assert place.loaded is not None
        now = torch.cuda.current_stream(self.device)
        now.wait_event(place.loaded)
        x_PD, place.device = place.device, None
        x_PD.record_stream(now)
        if index > 0:
            self._load(index - 1)
        return x_PD

    def _load(self, index: int) -> None:
        place = self.places[index]
        if place.device is None:
            assert self._stream is not None
            # Not before the device gets here: else all inputs would come at once, as fast as the host can ask.
            self._stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self._stream):
                place.device = place.host.to(self.device, non_blocking=True)
                place.loaded = self._stream.record_event()


class _Recomputed(torch.autograd.Function):
    """Parameters get their gradient in a backward pass of their own, inside this one's."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, x_PD: Tensor, parking: Parking, layer: Layer, rest: tuple[Any, ...]
    ) -> tuple[Tensor, Tensor]:
        kind = x_PD.device.type
        ctx.random = (torch.get_rng_state(), torch.cuda.get_rng_state(x_PD.device) if kind == "cuda" else None)
        ctx.autocast = {
            "device_type": kind,
            "enabled": torch.is_autocast_enabled(kind),
            "dtype": torch.get_autocast_dtype(kind),
        }
        ctx.parking, ctx.layer, ctx.rest = parking, layer, rest
        out = layer(x_PD, None, *rest)
        ctx.place = parking.put(x_PD)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_PD = ctx.parking.take(ctx.place).detach().requires_grad_(ctx.needs_input_grad[1])
        devices = [x_PD.device.index] if x_PD.is_cuda else []
        with torch.random.fork_rng(devices=devices):
            host_state, device_state = ctx.random
            torch.set_rng_state(host_state)
            if device_state is not None:
                torch.cuda.set_rng_state(device_state, x_PD.device)
            with torch.enable_grad(), torch.autocast(**ctx.autocast):
                out = ctx.layer(x_PD, None, *ctx.rest)
        # A frozen input may come out again as it went in.
        pairs = [(own, grad) for own, grad in zip(out, grads, strict=True) if own.requires_grad]
        torch.autograd.backward([own for own, _ in pairs], [grad for _, grad in pairs])
        return None, x_PD.grad, None, None, None
