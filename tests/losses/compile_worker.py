"""Compiles the kernels of the losses for chips that need not be there; prints name, chip, registers, stack as JSON.

A process of its own: within the tests, kernels are defined for the interpreter.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from losses.kernels import FAST, LAUNCH, tile_gradient, tile_sums
from losses.sweep_kernels import bank_tile

BF16 = {"a_ptr", "b_ptr", "g_ptr", "p_ptr"}
INT32 = {"starts_ptr", "pair_row_ptr", "pair_col_ptr", "pos_starts_ptr", "pos_row_ptr", "pos_col_ptr"}
OPTIONS = {
    tile_sums: {"SYMMETRIC": True, "PAIRS": True, "FAST": FAST},
    tile_gradient: {"SYMMETRIC": True, "PAIRS": True, "POSITIVES": True, "KEYS": False, "FAST": FAST},
    bank_tile: {"SUMS": True, "TOPS": True},
}


def usage(kernel: Any, constants: dict[str, Any], chip: int) -> tuple[int, int]:
    """(registers, bytes of stack) a thread; what is spilled stands on the stack."""
    signature = {}
    for name in kernel.arg_names:
        kind = "*bf16" if name in BF16 else "*i32" if name in INT32 else "*i8" if name == "is_out_ptr" else "*fp32"
        signature[name] = "constexpr" if name in constants else kind if name.endswith("_ptr") else "i32"
    aligned = {(i,): [["tt.divisibility", 16]] for i, kind in enumerate(signature.values()) if kind != "constexpr"}
    options = {name: LAUNCH[name] for name in ("num_warps", "num_stages")}
    compiled = triton.compile(
        ASTSource(kernel, signature, constants, aligned), target=GPUTarget("cuda", chip, 32), options=options
    )
    dump = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        printed = subprocess.run([dump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", printed)
    assert found is not None, printed
    return int(found[1]), int(found[2])


if __name__ == "__main__":
    tiling = {name: LAUNCH[name] for name in ("BM", "BN", "BK", "GROUP")}
    shape = {"E": 512, "SPLIT_A": False, "SPLIT_B": False}
    json.dump(
        [
            (kernel.__name__, chip, *usage(kernel, shape | tiling | more, chip))
            for chip in (80, 90)
            for kernel, more in OPTIONS.items()
        ],
        sys.stdout,
    )
