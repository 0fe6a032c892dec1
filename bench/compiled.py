"""What Triton makes of each kernel for a GPU that need not be there: registers, shared memory, width of accesses.

    python bench/compiled.py [--capabilities 80 90] [--json FILE]

The code that launches kernels in training runs on small CPU tensors of the published widths, and each launch ends when
its kernel is compiled. A kernel that loads bf16 rows two bytes at a time runs at a fraction of the memory's rate, and
nothing but this table shows it: alignment that the compiler cannot see has to be said (tl.multiple_of). Needs no GPU.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import os

os.environ["TRITON_INTERPRET"] = "0"  # read where kernels are defined

import argparse
import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from bench.findings import Findings
from distributed.atomic import json_bytes, write_file_atomically
from lora import kernels as lora_kernels
from losses import sweep_triton, tiled_triton
from losses.pairs import Pairs
from losses.sweep import LeftOut
from losses.tiled import Match, Slopes
from model import activation_kernels, convolution_kernels, fp8_kernels, mean_kernels, norm_kernels
from model.packing import SequenceLayout
from model.rotary import Rotary
from model.tile_attention import NARROW, WIDE, WIDE_AMPERE, tile_attention

BF16 = torch.bfloat16
AUDIO_WIDTH, AUDIO_HEADS, AUDIO_FFN = 1280, 20, 5120
TEXT_WIDTH, TEXT_HEADS, TEXT_FFN = 4096, 32, 11008
MOST_SHARED_KIB = 99  # a block's on the GPUs from compute capability 8.0 on that have least
MOST_SPILLED = 64
BYTE_WIDE = ("bank_tile", "rescore", "_gather_patches")
"""Kernels that also read a flag of one byte a row."""
_ACCESS = re.compile(r"(?:(?:ld|st)\.global|cp\.async\.c[ag]\.shared\.global)[\w.:]*")


class _Absent:
    """Stands in for Triton's driver: the device to compile for."""

    def __init__(self, capability: int) -> None:
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_device(self) -> int:
        return self.target.arch

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


@dataclass(frozen=True)
class Compiled:
    """One kernel for one shape."""

    name: str
    registers: int
    spilled: int
    shared_kib: float
    warps: int
    accesses: Counter[int]
    """Instructions that read or write global memory, by the bytes each moves a thread."""

    @classmethod
    def of(cls, name: str, kernel: Any, capability: int) -> "Compiled":
        assembly = kernel.asm["ptx"]
        said = _assembled(assembly, capability)
        registers, spilled = re.search(r"Used (\d+) registers", said), re.search(r"(\d+) bytes spill stores", said)
        assert registers is not None, said
        assert spilled is not None, said
        accesses = Counter(_width(match) for match in _ACCESS.findall(assembly))
        metadata = kernel.metadata
        return cls(name, int(registers[1]), int(spilled[1]), metadata.shared / 1024, int(metadata.num_warps), accesses)

    @property
    def is_narrow(self) -> bool:
        """Whether bf16 is moved element by element."""
        return any(width <= 2 for width in self.accesses) and self.name not in BYTE_WIDE


def _assembled(assembly: str, capability: int) -> str:
    """What ptxas, which comes with Triton, says of a kernel."""
    ptxas = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas"
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(assembly)
        file.flush()
        name = f"sm_{capability}a" if capability >= 90 else f"sm_{capability}"
        command = [str(ptxas), "-v", "--gpu-name", name, file.name, "-o", os.devnull]
        return subprocess.run(command, capture_output=True, text=True, check=True).stderr


def _width(instruction: str) -> int:
    """Bytes that an access of PTX moves a thread; asynchronous copies are counted as 16, the usual."""
    if instruction.startswith("cp.async"):
        return 16
    vector, bits = re.search(r"\.v(\d)", instruction), re.search(r"\.[bfsu](\d+)$", instruction)
    assert bits is not None, instruction
    return (int(vector[1]) if vector else 1) * int(bits[1]) // 8


def compile_all(capability: int) -> list[tuple[str, Compiled]]:
    """(shape, kernel) of every launch in `launches`. This process launches no kernel from here on."""
    found: dict[tuple[str, str], Any] = {}
    current = ""
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = run(self, *args, grid=grid, warmup=True, **options)
        found.setdefault((current, self.__name__), kernel.result() if hasattr(kernel, "result") else kernel)
        return kernel

    driver.set_active(_Absent(capability))
    JITFunction.run = compile_only
    try:
        for current, launch in launches(capability):  # noqa: B007 - compile_only reads it
            launch()
    finally:
        JITFunction.run = run
    return [(shape, Compiled.of(name, kernel, capability)) for (shape, name), kernel in found.items()]


def launches(capability: int) -> list[tuple[str, Any]]:
    """(shape, what launches kernels of it). What comes out of them is not looked at."""
    found: list[tuple[str, Any]] = []
    for tower, width, rank in (("audio", AUDIO_WIDTH, 16), ("text", TEXT_WIDTH, 16), ("text", TEXT_WIDTH, 64)):
        for num_rows in (512, 4096, 16_384):
            found.append((f"{tower}, r {rank}, {num_rows:,} rows", lambda w=width, r=rank, n=num_rows: _lora(w, r, n)))
    found += [("audio", lambda: _tower(AUDIO_WIDTH, True)), ("text", lambda: _tower(TEXT_WIDTH, False))]
    found.append(("audio", lambda: _attention(AUDIO_WIDTH, AUDIO_HEADS, capability)))
    found.append(("text", lambda: _attention(TEXT_WIDTH, TEXT_HEADS, capability)))
    if capability >= 89:
        found.append(("fp8", _fp8))
    for dtype in (BF16, torch.float32):
        found.append((str(dtype).removeprefix("torch."), lambda d=dtype: _losses(d)))
    return found


def _rows(num_rows: int, width: int) -> Tensor:
    return torch.zeros(num_rows, width, dtype=BF16, requires_grad=True)


def _lora(width: int, rank: int, num_rows: int) -> None:
    num_low = -(-3 * rank // 64) * 64
    seed_1, down_RI = torch.zeros(1, dtype=torch.int64), torch.empty(num_low, width, dtype=BF16)
    masters = [(torch.empty(rank, width), torch.empty(width, rank)) for _ in range(3)]
    weight_OE = torch.empty(3 * width, width + num_low, dtype=BF16)
    places = [
        (down_RI[i * rank : (i + 1) * rank], weight_OE[i * width : (i + 1) * width, width + i * rank :][:, :rank])
        for i in range(3)
    ]
    lora_kernels.pack(masters, places, rank, width, 2.0)
    x_PI, grad_PE = (torch.empty(num_rows, columns, dtype=BF16) for columns in (width, width + num_low))
    _, low_PR = lora_kernels.extend(x_PI, down_RI, seed_1, 0.1)
    _, down_SRI = lora_kernels.finish(grad_PE, x_PI, down_RI, seed_1, 0.1, True, True)
    spans = tuple((i * width, (i + 1) * width, i * rank) for i in range(3))
    up_SOr = lora_kernels.grad_up(torch.empty(num_rows, 3 * width, dtype=BF16), low_PR, spans, rank)
    lora_kernels.add_parts(down_SRI, up_SOr, 2.0)


def _tower(width: int, is_audio: bool) -> None:
    x_PD, delta_PD, weight_D = _rows(64, width), _rows(64, width), torch.ones(width, dtype=BF16)
    bias_D = torch.zeros(width, dtype=BF16) if is_audio else None
    sum_PD, normed_PD = norm_kernels.add_norm(x_PD, delta_PD, weight_D, bias_D, 1e-5)
    (sum_PD + normed_PD).float().sum().backward()
    mean_kernels.sequence_mean(_rows(64, width), torch.tensor([0, 10, 64], dtype=torch.int32)).sum().backward()
    if bias_D is not None:
        pairs = torch.arange(0, 64, 2), torch.arange(1, 64, 2)
        norm_kernels.pool_norm(x_PD, delta_PD, *pairs, weight_D, bias_D, 1e-5).float().sum().backward()
        convolution_kernels.gather_patches(
            torch.zeros(64, width, dtype=BF16), torch.ones(64, dtype=torch.bool), torch.arange(16)
        )
        convolution_kernels.add_positions(
            torch.zeros(64, width, dtype=BF16), torch.zeros(1500, width, dtype=BF16), torch.arange(64)
        )
    else:
        activation_kernels.swiglu(_rows(64, 2 * TEXT_FFN)).float().sum().backward()


def _attention(width: int, num_heads: int, capability: int) -> None:
    head_dim = width // num_heads
    is_text = head_dim > 64
    tilings = NARROW if not is_text else WIDE if capability >= 90 else WIDE_AMPERE
    rotary = Rotary.build(1e4, head_dim, 64, BF16, torch.device("cpu")) if is_text else None
    layout = SequenceLayout.build([10] * 20, "cpu")
    tile_attention(
        _rows(200, 3 * width), num_heads, num_heads, layout, is_text, rotary, tilings
    ).float().sum().backward()


def _fp8() -> None:
    fp8_kernels.quantise_rows(torch.zeros(64, TEXT_WIDTH, dtype=BF16))
    for width, is_gated in ((TEXT_FFN, True), (AUDIO_FFN, False)):
        pre_PG = torch.zeros(64, width * (2 if is_gated else 1), dtype=BF16)
        fp8_kernels.activate(pre_PG, is_gated)
        fp8_kernels.activate_backward(torch.zeros(64, width, dtype=BF16), pre_PG, is_gated)


def _losses(dtype: torch.dtype, num_rows: int = 512, width: int = 512) -> None:
    rows_RE = F.normalize(torch.randn(num_rows, width), dim=1).to(dtype)
    pairs, ones_R, inv_t = Pairs(*[torch.arange(num_rows)] * 2), torch.ones(num_rows), torch.tensor(14.0)
    match = Match(0 * ones_R, 0 * ones_R, pairs, pairs, ones_R, ones_R)
    *_, tiles = tiled_triton.log_sum_exps(rows_RE, rows_RE, inv_t, match)
    tiled_triton.gradients(rows_RE, rows_RE, inv_t, match, Slopes(*[0 * ones_R] * 6), tiles)
    bank_KE = F.normalize(torch.randn(4096, width), dim=1).to(dtype)
    sweep_triton.sweep(rows_RE, bank_KE, LeftOut(pairs, torch.tensor([5])), ones_R, 32, inv_t)


def measure(capabilities: Sequence[int]) -> Findings:
    found = Findings("kernels as compiled")
    kernels = []
    for capability in capabilities:
        for shape, kernel in compile_all(capability):
            kernels.append(kernel)
            found.rows.append({
                "kernel": kernel.name, "shape": shape, "capability": f"{capability // 10}.{capability % 10}",
                "registers": kernel.registers, "bytes spilled": kernel.spilled, "shared KiB": kernel.shared_kib,
                "warps": kernel.warps, "accesses by bytes": ", ".join(
                    f"{width}: {count}" for width, count in sorted(kernel.accesses.items(), reverse=True)
                ),
            })  # fmt: skip
    found.check("kernels that move bf16 element by element", sum(k.is_narrow for k in kernels), 0, "at most")
    found.check("bytes spilled, most", max(k.spilled for k in kernels), MOST_SPILLED, "at most")
    found.check("shared KiB, most", max(k.shared_kib for k in kernels), MOST_SHARED_KIB, "at most")
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--capabilities", nargs="+", type=int, default=[80, 90], help="of the GPUs, times ten")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    found = measure(args.capabilities)
    print(found.text())
    if args.json is not None:
        write_file_atomically(args.json, json_bytes(found.to_json()))
    return int(not all(check.is_met for check in found.checks))


if __name__ == "__main__":
    sys.exit(main())
