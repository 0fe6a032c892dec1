"""Which tiling is fastest on the device at hand, for the kernels of model/tile_attention.py.

    python bench/tilings.py

Tries TRIES, each with the other kernels as they are, on the packs of 256 clips of bench/attention.py, and prints
microseconds as they come, then all of them, best first. First each is compiled in a process of its own, side by side,
into Triton's cache, for at most COMPILE_S seconds; after BUDGET_S seconds the rest is left. Use it to set the tilings
anew after a change of chip or of Triton: change TRIES to what is in question.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import time
from collections.abc import Callable
from dataclasses import replace
from multiprocessing import TimeoutError, get_context

import torch
from torch import Tensor

from bench.attention import AUDIO, TEXT, Pack, drawn, show, timed
from bench.findings import Cell, Findings, run_alone
from bench.limits import Limits, bench_device, synchronize
from model.attention import Heads
from model.tile_attention import Tiling, tile_attention, tilings_for

COMPILE_S, BUDGET_S = 28.0, 40.0
TRIES = (
    ("audio", "key_gradient", Tiling(64, 32, 4, 2)),
    ("audio", "query_gradient", Tiling(64, 32, 4, 2)),
    ("audio", "forward", Tiling(64, 32, 4, 2)),
    ("audio", "forward", Tiling(128, 64, 8, 2)),
    ("text", "key_gradient", Tiling(32, 16, 4, 1)),
    ("text", "key_gradient", Tiling(64, 16, 4, 1)),
    ("text", "query_gradient", Tiling(64, 16, 4, 1)),
    ("text", "forward", Tiling(64, 16, 4, 1)),
    ("text", "forward", Tiling(64, 32, 8, 1)),
)
"""Pack, kernel and tiling; before each pack's own tilings are measured as they stand."""

Try = tuple[Pack, str, Tiling | None]


def prepared(pack: Pack, kernel: str, tiling: Tiling | None) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Attention with one kernel's tiling changed (None: as they stand), and the projection to give it."""
    device = bench_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    qkv_PJ, layout, rotary = pack.inputs(device, dtype)
    tilings = tilings_for(pack.heads.head_dim, device)
    if tiling is not None:
        tilings = replace(tilings, **{kernel: tiling})

    def attend(x_PJ: Tensor) -> Tensor:
        heads = pack.heads
        return tile_attention(x_PJ, heads.num_heads, heads.num_kv_heads, layout, pack.is_text, rotary, tilings)

    return attend, qkv_PJ


def compile_one(job: tuple[int, Try]) -> tuple[int, str | None]:
    """In a process of its own: fills Triton's cache; returns the job's number, and why this tiling cannot run."""
    index, (pack, kernel, tiling) = job
    try:
        attend, qkv_PJ = prepared(replace(pack, lengths=pack.lengths[:8]), kernel, tiling)
        out_PV = attend(qkv_PJ)
        torch.autograd.grad(out_PV, qkv_PJ, torch.ones_like(out_PV))
        synchronize(bench_device())
    except Exception as error:  # whatever the compiler dislikes about a tiling is a row of the table
        return index, (str(error) or repr(error)).splitlines()[0]
    return index, None


def compile_all(tries: list[Try], until: float) -> dict[int, str | None]:
    """By number in `tries`: None, or why it cannot run. What is not compiled by `until` (monotonic) is not in it."""
    known: dict[int, str | None] = {}
    with get_context("spawn").Pool(len(tries)) as pool:  # what still compiles when this block is left ends with it
        found = pool.imap_unordered(compile_one, list(enumerate(tries)))
        while len(known) < len(tries):
            try:
                index, reason = found.next(timeout=max(0.1, until - time.monotonic()))
            except TimeoutError:
                break
            known[index] = reason
            print(f"compiled {len(known)} of {len(tries)}{f': {reason}' if reason else ''}", flush=True)
    return known


def measure_one(one: Try, found: Findings) -> None:
    """Adds the row, and prints it."""
    pack, kernel, tiling = one
    forward_us, backward_us = timed(*prepared(pack, kernel, tiling), bench_device())
    row: dict[str, Cell] = {"pack": pack.name, "kernel": kernel if tiling else "as they stand"}
    if tiling is not None:
        row |= {"tile": tiling.tile, "step": tiling.step, "warps": tiling.num_warps, "stages": tiling.num_stages}
    row |= {"forward us": forward_us, "backward us": backward_us}
    found.rows.append(row)
    show(row)


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Microseconds of the attention kernels with one tiling changed."""
    found = Findings("Tilings of model/tile_attention.py")
    if tiny:
        measure_one((Pack("text tiny", Heads(1, 1, 16), [3, 2, 5], True), "forward", Tiling(16, 16, 4, 1)), found)
        return found
    clips, strings = drawn(256)
    packs = {"text": Pack("text 256", TEXT, strings, True), "audio": Pack("audio 256", AUDIO, clips, False)}
    tries: list[Try] = [(pack, "", None) for pack in packs.values()]
    tries += [(packs[name], kernel, tiling) for name, kernel, tiling in TRIES]
    started = time.monotonic()
    known = compile_all(tries, started + COMPILE_S)
    for index, one in enumerate(tries):
        reason = known.get(index, "not compiled in time")
        if reason is None and time.monotonic() > started + BUDGET_S:
            reason = "no time left"
        if reason is None:
            measure_one(one, found)
        else:
            found.notes.append(f"{one[0].name}, {one[1]}, {one[2]}: {reason}")
    found.rows.sort(key=lambda row: (str(row["pack"]), float(row["forward us"] or 0) + float(row["backward us"] or 0)))
    return found


if __name__ == "__main__":
    sys.exit(run_alone(measure))
