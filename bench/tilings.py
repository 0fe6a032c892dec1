"""Which tiling is fastest on the device at hand, for each kernel of model/tile_attention.py.

    python bench/tilings.py

Tries every tiling of one kernel, the other two kernels as they are, on the packs of 256 clips of bench/attention.py,
and prints microseconds, best first. The first pass compiles in processes side by side, into Triton's cache. Use it to
set the tilings anew after a change of chip or of Triton.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import itertools
import os
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context

import torch
from torch import Tensor

from bench.attention import AUDIO, TEXT, Pack, drawn, timed
from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device
from model.tile_attention import Tiling, tile_attention, tilings_for

KERNELS = ("forward", "query_gradient", "key_gradient")


def candidates(is_text: bool) -> Iterator[Tiling]:
    """Tilings worth a try: strings want small tiles, clips larger ones."""
    tiles, steps, stages = ((32, 64), (16, 32, 64), (1, 2)) if is_text else ((64, 128), (32, 64), (2, 3))
    for tile, step, num_stages in itertools.product(tiles, steps, stages):
        for num_warps in (4, 8) if tile == tiles[1] else (4,):
            yield Tiling(tile, step, num_warps, num_stages)


def attend_with(pack: Pack, kernel: str, tiling: Tiling, saves_out: bool) -> tuple[Tensor, float, float]:
    """The result, and microseconds forward and backward, with one kernel's tiling changed."""
    device = bench_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv_PJ, layout, rotary = pack.inputs(device, dtype)
    tilings = replace(tilings_for(pack.heads.head_dim, device), **{kernel: tiling})

    def attend(x_PJ: Tensor) -> Tensor:
        heads = pack.heads
        return tile_attention(
            x_PJ, heads.num_heads, heads.num_kv_heads, layout, pack.is_text, rotary, tilings, saves_out
        )

    forward_us, backward_us = timed(attend, qkv_PJ, device)
    return attend(qkv_PJ), forward_us, backward_us


def compile_one(pack: Pack, kernel: str, tiling: Tiling, saves_out: bool) -> str | None:
    """In a process of its own: fills Triton's cache; returns why this tiling cannot run."""
    try:
        attend_with(replace(pack, lengths=pack.lengths[:8]), kernel, tiling, saves_out)
    except Exception as error:  # whatever the compiler dislikes about a tiling is a row of the table
        return str(error).splitlines()[0]
    return None


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Microseconds of every tiling of each attention kernel."""
    found = Findings("Tilings of model/tile_attention.py")
    clips, strings = drawn(256)
    packs = [Pack("text 256", TEXT, strings, True), Pack("audio 256", AUDIO, clips, False)]
    tries = [
        (pack, kernel, tiling, saves_out)
        for pack in packs
        for kernel in KERNELS
        for tiling in candidates(pack.is_text)
        for saves_out in ((True, False) if kernel == "query_gradient" else (True,))
    ]
    if tiny:
        pack = Pack("text tiny", replace(TEXT, num_heads=1, num_kv_heads=1, head_dim=16), [3, 2, 5], True)
        tries = [(pack, "forward", Tiling(16, 16, 4, 1), True)]
    reasons: list[str | None] = [None] * len(tries)
    if not tiny:
        with ProcessPoolExecutor(min(16, os.cpu_count() or 1), mp_context=get_context("spawn")) as pool:
            reasons = list(pool.map(compile_one, *zip(*tries, strict=True), chunksize=4))
    for (pack, kernel, tiling, saves_out), reason in zip(tries, reasons, strict=True):
        row: dict[str, str | float | int | None] = {"pack": pack.name, "kernel": kernel, "saves out": str(saves_out)}
        row |= {"tile": tiling.tile, "step": tiling.step, "warps": tiling.num_warps, "stages": tiling.num_stages}
        if reason is None:
            _, forward_us, backward_us = attend_with(pack, kernel, tiling, saves_out)
            row["us"] = forward_us if kernel == "forward" else backward_us
            found.rows.append(row)
        else:
            found.notes.append(f"{pack.name}, {kernel}, {tiling}: {reason}")
    found.rows.sort(key=lambda row: (str(row["pack"]), str(row["kernel"]), float(row["us"] or 0)))
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
