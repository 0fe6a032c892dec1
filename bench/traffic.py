"""What the collectives of some steps carry, and how long they keep a rank: counted where torch's own are called.

    with recorded() as traffic:
        training.step(fed)
    traffic.floats.num_bytes["all_gather"]     bytes that this rank put in
    traffic.floats.sent(8)                     bytes that it sends with ring algorithms over 8 ranks
    traffic.ids.sent(8)                        the same of integers, which are counted apart

The time in a collective is the transfer and the wait for the rank that comes last. On CUDA it is taken between events
on the stream of the step, which waits for NCCL's, so that nothing is made to wait for the measurement. What torch's
DistributedDataParallel does in C++ is not seen here; it logs the sizes of its buckets itself.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from distributed import collectives


@dataclass
class Payload:
    """Bytes by collective: what a rank hands in (to a gather), keeps (of a reduce-scatter), or both."""

    num_bytes: Counter[str] = field(default_factory=Counter)

    def sent(self, num_ranks: int) -> float:
        """Bytes that one rank sends in rings: a payload to every other one, an all-reduce's 2 (N - 1) / N times."""
        others, found = num_ranks - 1, self.num_bytes
        once = found["all_gather"] + found["reduce_scatter"]
        return others * once + 2 * others / num_ranks * found["all_reduce"] + found["broadcast"]


@dataclass
class Traffic:
    """Calls, payloads and seconds of the collectives of one rank."""

    floats: Payload = field(default_factory=Payload)
    ids: Payload = field(default_factory=Payload)
    num_calls: int = 0
    host_s: float = 0.0
    """In collectives of CPU tensors: of ids where there is a GPU, of everything elsewhere."""
    _marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = field(default_factory=list)

    @property
    def device_s(self) -> float:
        """Seconds that the step's stream stood still in collectives of CUDA tensors. Waits for the device."""
        if self._marks:
            torch.cuda.synchronize()
        return sum(start.elapsed_time(stop) for start, stop in self._marks) / 1e3

    def call(self, name: str, payload: Tensor, collective: Callable[[], Any]) -> Any:
        """Make the call, and note it."""
        self.num_calls += 1
        (self.floats if payload.is_floating_point() else self.ids).num_bytes[name] += payload.nbytes
        if payload.is_cuda:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            result = collective()
            stop.record()
            self._marks.append((start, stop))
            return result
        started = time.perf_counter()
        result = collective()
        self.host_s += time.perf_counter() - started
        return result


@contextmanager
def recorded() -> Iterator[Traffic]:
    """Notes all collectives of distributed/collectives.py made within, of all threads."""
    traffic = Traffic()
    before = dist.all_reduce, dist.broadcast, collectives._torch_all_gather, collectives._torch_reduce_scatter
    all_reduce, broadcast, all_gather, reduce_scatter = before

    def put(functions: tuple[Any, ...]) -> None:
        dist.all_reduce, dist.broadcast = functions[:2]
        collectives._torch_all_gather, collectives._torch_reduce_scatter = functions[2:]

    put((
        lambda x, **more: traffic.call("all_reduce", x, lambda: all_reduce(x, **more)),
        lambda x, **more: traffic.call("broadcast", x, lambda: broadcast(x, **more)),
        lambda all_W, own: traffic.call("all_gather", own, lambda: all_gather(all_W, own)),
        lambda own, all_W: traffic.call("reduce_scatter", own, lambda: reduce_scatter(own, all_W)),
    ))  # fmt: skip
    try:
        yield traffic
    finally:
        put(before)
