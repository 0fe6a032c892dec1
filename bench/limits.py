"""What the device at hand can do at best, measured there, and the clock that all benchmarks use.

Two figures bound everything: operations a second of a large matrix product, and bytes a second of a large copy. A
benchmark counts what its work needs, divides by these, and prints the distance.
"""

import gc
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import Any

import torch

from distributed.processes import use_growing_segments

MATRIX_SIZE = 8192
COPY_BYTES = 1 << 30
CPU_MATRIX_SIZE, CPU_COPY_BYTES = 1024, 1 << 26
TINY_MATRIX_SIZE, TINY_COPY_BYTES = 256, 1 << 20  # to see that a program runs


@dataclass(frozen=True)
class Limits:
    """Device, and its measured rates. `matrix_flops`: bf16 on a GPU, fp32 on the CPU; a multiply-add is two."""

    device: str
    torch: str
    matrix_flops: float
    copy_bytes: float  # a second, read and written together

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    def least_seconds(self, operations: float = 0.0, bytes_moved: float = 0.0) -> float:
        """The longer of the two: no implementation of the work can be faster."""
        return max(operations / self.matrix_flops, bytes_moved / self.copy_bytes)

    def line(self) -> str:
        return (
            f"{self.device}, torch {self.torch}: matrix product {self.matrix_flops / 1e12:,.4g} TFLOP/s, "
            f"copy {self.copy_bytes / 1e9:,.4g} GB/s"
        )


def bench_device() -> torch.device:
    """The GPU if there is one, its memory held as in a training run, for the peers as well."""
    use_growing_segments()
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def free_memory(device: torch.device) -> None:
    """Give what nobody holds any more back to the device, for whoever comes next."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def seconds_of(call: Callable[[], Any], device: torch.device, count: int = 20, warmup: int = 3) -> float:
    """Median seconds of a call as the device sees it (CUDA events; the host's own time where it is the slower)."""
    for _ in range(warmup):
        call()
    synchronize(device)
    if device.type != "cuda":
        times = []
        for _ in range(count):
            started = time.perf_counter()
            call()
            times.append(time.perf_counter() - started)
        return sorted(times)[count // 2]
    marks = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(count)]
    for start, stop in marks:
        start.record()
        call()
        stop.record()
    synchronize(device)
    return sorted(start.elapsed_time(stop) for start, stop in marks)[count // 2] / 1e3


@lru_cache(maxsize=2)
def measure_limits(tiny: bool = False) -> Limits:
    """About a second on a GPU; measured once a process."""
    device = bench_device()
    size, num_bytes = (MATRIX_SIZE, COPY_BYTES) if device.type == "cuda" else (CPU_MATRIX_SIZE, CPU_COPY_BYTES)
    if tiny:
        size, num_bytes = TINY_MATRIX_SIZE, TINY_COPY_BYTES
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    product_s, copy_s = _product_seconds(size, dtype, device), _copy_seconds(num_bytes, device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # what follows may need it all
    return Limits(name, torch.__version__, 2 * size**3 / product_s, num_bytes / copy_s)


def _product_seconds(size: int, dtype: torch.dtype, device: torch.device) -> float:
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(a)
    return seconds_of(lambda: torch.mm(a, b, out=out), device)


def _copy_seconds(num_bytes: int, device: torch.device) -> float:
    source = torch.zeros(num_bytes // 2, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return seconds_of(lambda: target.copy_(source), device)
