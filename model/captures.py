"""One side's passes of a size class as two CUDA graphs, the memory that they share, and what breaks them.

What a forward graph leaves in the side's pool is good until the next one of that side runs: a `_Ticket`, held by the
history of the embeddings, says whether a backward pass is still to come. (Reference: PyTorch's notes on CUDA graphs.)

Graphs of two sides may run at the same time. So nothing that a graph writes is shared: each side has a memory pool, a
stream to capture on (a stream's matrix products share a workspace), and a random state (a replay writes its seed and
offset to a place on the device, which the running graph reads).

Shapes: N sequences, E embedding.
"""

import ctypes
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
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
    blank: Callable[[SizeClass], Tensor]
    """Mel or ids of a class, zeros: what a capture is recorded over."""
    stream: "torch.cuda.Stream | None" = None  # that its graphs are captured on
    generator: torch.Generator | None = None  # whose state they draw from
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

    def ready(self, size: SizeClass) -> "Capture | None":
        """What can be replayed now."""
        return None if self.is_busy() else self.captures.get(size)


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


def outlive_broken_capture() -> None:
    """Live with what torch before 2.12 leaves behind where the driver calls a capture off.

    The allocator believes that the capture goes on, and ends the process when any pool is destroyed: so no pool of this
    process ever is, other models' included, not even at the interpreter's end. (The side's random state is lost too: it
    refuses to draw "outside graph capture". The process's own one never was in the capture.)
    """
    global _pools_stay
    if not _pools_stay:
        _pools_stay = True
        for pool in _pools:
            _keep_for_good(pool)


def default_generator(device: torch.device) -> torch.Generator:
    """The one that a device's kernels draw from, unless told otherwise."""
    return torch.cuda.default_generators[torch.cuda.current_device() if device.index is None else device.index]


@contextmanager
def _drawing_from(generator: torch.Generator, device: torch.device) -> Iterator[None]:
    """Let the device's default generator be another state inside, and what it was before afterwards."""
    default = default_generator(device)
    kept = default.graphsafe_get_state()
    default.graphsafe_set_state(generator)
    try:
        yield
    finally:
        default.graphsafe_set_state(kept)


class Capture:
    """The two graphs of a size class, and the places where they read and write."""

    def __init__(self, side: Side, size: SizeClass, tables: Tables, params: list[nn.Parameter]) -> None:
        """tables: of any pack of the class, on the device."""
        self.side = side
        self.flat, self.payload = tables.flat.clone(), side.blank(size)
        own = Tables(self.flat, tables.sizes)
        kept_grads = [p.grad for p in params if p.grad is not None]
        assert len(kept_grads) == len(params), "gradients must lie somewhere before a graph can add to them"
        device = self._device = self.payload.device
        assert side.stream is not None
        assert side.generator is not None
        with _drawing_from(side.generator, device):
            # Ready: kernels compiled and loaded, workspaces of this stream made. In the pool, whose memory the capture
            # then takes over.
            side.stream.wait_stream(torch.cuda.current_stream(device))
            try:
                with torch.cuda.stream(side.stream), torch.cuda.use_mem_pool(side.pool):
                    out_NE = side.run(size, own, self.payload, [])
                    torch.autograd.grad(out_NE, params, torch.zeros_like(out_NE), allow_unused=True)
                    del out_NE
            finally:
                torch.cuda.current_stream(device).wait_stream(side.stream)

            # Other threads (NCCL's, the loader's) may go on with CUDA calls of their own meanwhile.
            place = {"pool": side.pool.id, "stream": side.stream, "capture_error_mode": "thread_local"}
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
        self._replay(self.forward)
        return self.out_NE[:num_rows].clone()

    def replay_backward(self, grad_NE: Tensor) -> None:
        self.grad_NE.zero_()
        self.grad_NE[: len(grad_NE)].copy_(grad_NE)
        self._replay(self.backward)

    def _replay(self, graph: torch.cuda.CUDAGraph) -> None:
        """With the numbers that an eager pass would draw now."""
        default, own = default_generator(self._device), self.side.generator
        assert own is not None
        own.manual_seed(default.initial_seed())
        own.set_offset(default.get_offset())
        graph.replay()
        default.set_offset(own.get_offset())


class Replay(torch.autograd.Function):
    """The gradient of `anchor` is none: the backward graph itself adds to the parameters' gradients.

    waiting: the stream that a replay on another one runs beside. It is made to wait for the backward graph when the
    whole backward pass has been launched; for the forward graph the caller lets it wait.
    """

    @staticmethod
    def forward(
        ctx: Any,
        anchor: Tensor,
        capture: Capture,
        flat: Tensor,
        payload: Tensor,
        num_rows: int,
        waiting: "torch.cuda.Stream | None",
    ) -> Tensor:
        ctx.capture, ctx.waiting, ctx.ticket = capture, waiting, _Ticket()
        capture.side.in_use = weakref.ref(ctx.ticket)
        return capture.replay_forward(flat, payload, num_rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NE: Tensor) -> tuple[None, ...]:
        capture, waiting = ctx.capture, ctx.waiting
        assert ctx.ticket is not None, "what a forward graph kept is good for one backward pass"
        capture.replay_backward(grad_NE)
        if waiting is not None:
            done = torch.cuda.current_stream(grad_NE.device).record_event()
            torch.autograd.Variable._execution_engine.queue_callback(partial(waiting.wait_event, done))
        # Of a history that lives on, nothing keeps the capture: another may soon need its memory.
        capture.side.in_use = ctx.ticket = ctx.capture = None
        return None, None, None, None, None, None
