"""One side's passes of a size class as two CUDA graphs, the memory that they share, and what breaks them.

What a forward graph leaves in the side's pool is good until the next one of that side runs: a `_Ticket`, held by the
history of the embeddings, says whether a backward pass is still to come. (Reference: PyTorch's notes on CUDA graphs.)

Shapes: N sequences, E embedding.
"""

import ctypes
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.sizes import SizeClass
from model.tables import Tables

LARGE_SHARE = 0.05
"""Of the device's memory: a side that holds more makes room before it captures a class larger than all it has."""


@dataclass(eq=False)
class Side:
    """One encoder. `run` gives the embeddings of a class from its tables and its mel or ids, all on the device, and
    the lengths in tokens, which a capture leaves away: what it records must not depend on them."""

    name: str
    run: Callable[[SizeClass, Tables, Tensor, Sequence[int]], Tensor]
    captures: dict[SizeClass, "Capture"] = field(default_factory=dict)
    pool: Any = None  # torch.cuda.MemPool, made for the first capture
    num_bytes: int = 0  # that the captures have taken from the device
    in_use: "weakref.ref[_Ticket] | None" = None  # by a forward pass whose backward pass is to come

    def make_room(self, size: SizeClass, device: torch.device) -> None:
        """Drop all captures before one that is larger, if they hold much: it cannot use their memory, whose pieces are
        too small, while smaller ones can use its own. They are captured again when they come up."""
        largest = max((known.num_tokens for known in self.captures), default=size.num_tokens)
        total = torch.cuda.get_device_properties(device).total_memory
        if size.num_tokens > largest and self.num_bytes > LARGE_SHARE * total:
            torch.cuda.synchronize(device)
            self.captures.clear()
            self.pool, self.num_bytes = None, 0

    def is_busy(self) -> bool:
        return self.in_use is not None and self.in_use() is not None


class _Ticket:
    """Held by an embedding's history: while it lives, the side's memory is not to be written."""


_pools: "weakref.WeakSet[Any]" = weakref.WeakSet()  # those of this process
_pools_stay = False  # a capture has broken: no pool may be destroyed any more


def new_pool() -> Any:
    pool = torch.cuda.MemPool()
    _pools.add(pool)
    if _pools_stay:
        _keep_for_good(pool)
    return pool


def _keep_for_good(pool: Any) -> None:
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(pool))


def mend_broken_capture(device: torch.device) -> None:
    """Undo what torch before 2.12 leaves behind where the driver calls a capture off.

    The generator would refuse to draw ("outside graph capture"): it gets a state of the same seed and offset that knows
    of no capture. The allocator believes that the capture goes on, and ends the process when any pool is destroyed: so
    no pool of this process ever is, other models' included, not even at the interpreter's end.
    """
    global _pools_stay
    generator = torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]
    generator.graphsafe_set_state(generator.clone_state())
    if not _pools_stay:
        _pools_stay = True
        for pool in _pools:
            _keep_for_good(pool)


class Capture:
    """The two graphs of a size class, and the places where they read and write."""

    def __init__(
        self,
        side: Side,
        size: SizeClass,
        tables: Tables,
        payload: Tensor,
        params: list[nn.Parameter],
        stream: torch.cuda.Stream,
    ) -> None:
        self.side = side
        self.flat, self.payload = tables.flat.clone(), payload.clone()
        own = Tables(self.flat, tables.sizes)
        kept_grads = [p.grad for p in params if p.grad is not None]
        assert len(kept_grads) == len(params), "gradients must lie somewhere before a graph can add to them"
        device = payload.device

        # Ready: kernels compiled and loaded, workspaces of this stream made. In the pool, whose memory the capture then
        # takes over, and without moving the random state.
        drawn = torch.cuda.get_rng_state(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        try:
            with torch.cuda.stream(stream), torch.cuda.use_mem_pool(side.pool):
                out_NE = side.run(size, own, self.payload, [])
                torch.autograd.grad(out_NE, params, torch.zeros_like(out_NE), allow_unused=True)
                del out_NE
        finally:  # out of memory, too: the eager pass that follows is to draw what it would have drawn
            torch.cuda.current_stream(device).wait_stream(stream)
            torch.cuda.set_rng_state(drawn, device)

        # Other threads (NCCL's, the loader's) may go on with CUDA calls of their own meanwhile.
        place = {"pool": side.pool.id, "stream": stream, "capture_error_mode": "thread_local"}
        self.forward, self.backward = torch.cuda.CUDAGraph(), torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.forward, **place):
            out_NE = side.run(size, own, self.payload, [])
        self.out_NE = out_NE.detach()
        self.grad_NE = torch.zeros_like(self.out_NE)
        with torch.cuda.graph(self.backward, **place):
            found = torch.autograd.grad(out_NE, params, self.grad_NE, allow_unused=True)
            reached = [(kept, new) for kept, new in zip(kept_grads, found, strict=True) if new is not None]
            torch._foreach_add_([kept for kept, _ in reached], [new for _, new in reached])
            del found, reached
        # What the forward graph keeps for the backward graph is let go here, so that the next capture writes over it.
        del out_NE

    def replay_forward(self, flat: Tensor, payload: Tensor, num_rows: int) -> Tensor:
        self.flat.copy_(flat)
        self.payload.copy_(payload)
        self.forward.replay()
        return self.out_NE[:num_rows].clone()


class Replay(torch.autograd.Function):
    """The gradient of `anchor` is none: the backward graph itself adds to the parameters' gradients."""

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, capture: Capture, flat: Tensor, payload: Tensor, num_rows: int) -> Tensor:
        ctx.capture, ctx.num_rows, ctx.ticket = capture, num_rows, _Ticket()
        capture.side.in_use = weakref.ref(ctx.ticket)
        return capture.replay_forward(flat, payload, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[None, ...]:
        capture = ctx.capture
        assert ctx.ticket is not None, "what a forward graph kept is good for one backward pass"
        capture.grad_NE.zero_()
        capture.grad_NE[: ctx.num_rows].copy_(grad_NE)
        capture.backward.replay()
        # Of a history that lives on, nothing keeps the capture: another may soon need its memory.
        capture.side.in_use = ctx.ticket = ctx.capture = None
        return None, None, None, None, None
