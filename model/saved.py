"""What autograd keeps for the backward pass, where computing it again is cheaper than keeping it."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class _Remade:
    """Stands for a tensor in the graph. Made at the first use in a backward pass, let go after the last."""

    def __init__(self, remake: Callable[[], Tensor]) -> None:
        self.remake = remake
        self.num_saved = self.num_used = 0
        self.value: Tensor | None = None

    def use(self) -> Tensor:
        if self.value is None:
            with torch.no_grad():
                self.value = self.remake()
        value = self.value
        self.num_used += 1
        if self.num_used % self.num_saved == 0:
            self.value = None
        return value


@contextmanager
def remade(y: Tensor, remake: Callable[[], Tensor] | None) -> Iterator[None]:
    """Wherever an operation inside saves `y` for its backward pass, the graph holds `remake` instead, which must give
    the same values from what is kept anyway; None changes nothing. All users of one y share one remaking.

    Not for code under checkpointing: what `remake` holds on to would outlive the checkpointed part.
    """
    if remake is None or not torch.is_grad_enabled():
        yield
        return
    # Hooks are given an alias of the saved tensor, so it is known by its memory; y itself must not be held.
    key = _memory(y)
    stand_in = _Remade(remake)

    def pack(saved: Tensor) -> Tensor | _Remade:
        if saved.device.type == "meta" or _memory(saved) != key:
            return saved
        stand_in.num_saved += 1
        return stand_in

    def unpack(packed: Tensor | _Remade) -> Tensor:
        return packed.use() if isinstance(packed, _Remade) else packed

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        yield


def _memory(x: Tensor) -> tuple[object, ...]:
    return x.data_ptr(), x.shape, x.stride(), x.dtype, x.device
