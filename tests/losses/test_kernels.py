"""Pieces of the kernels on their own; what they make together is in test_tiled_triton.py and test_sweep_triton.py."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from losses.pairs import Pairs
from tests.losses import tiles

tiles.need_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

from losses.kernels import tile_of  # noqa: E402


@triton.jit
def visits(out_ptr, down, across, GROUP: tl.constexpr):
    row, col = tile_of(tl.program_id(0), down, across, GROUP)
    tl.store(out_ptr + row * across + col, tl.load(out_ptr + row * across + col) + 1)


def test_every_tile_is_visited_once():
    for down, across in ((1, 1), (3, 5), (9, 2), (17, 1)):
        seen = torch.zeros(down * across, dtype=torch.int32, device=tiles.DEVICE)
        visits[(down * across,)](seen, down, across, GROUP=4)
        assert seen.tolist() == [1] * (down * across)


def test_split_embeddings_keep_sixteen_bits():
    from losses.tiled_triton import Operand

    x_RE = torch.randn(5, 70, generator=torch.Generator().manual_seed(0))
    operand = Operand.of(x_RE)
    assert operand.is_split
    assert operand.data.shape == (5, 256)
    whole_RE = operand.data[:, :70].float() + operand.data[:, 128:198].float()
    assert ((whole_RE - x_RE).abs() <= x_RE.abs() * 2**-16).all()
    assert (operand.data[:, 70:128] == 0).all()
    plain = Operand.of(x_RE.bfloat16())
    assert not plain.is_split
    assert plain.data.shape == (5, 128)


def test_pairs_are_found_by_their_tile():
    from losses.tiled_triton import TileIndex

    pairs = Pairs(torch.tensor([300, -1, 0, 129, 5]), torch.tensor([129, -1, 3, 128, 200]))
    index = TileIndex.of(pairs, 301, 201)  # 5 x 2 tiles
    starts = index.starts_S.tolist()
    found = [
        list(zip(index.row_P[a:b].tolist(), index.col_P[a:b].tolist(), strict=True)) for a, b in pairwise(starts[:11])
    ]
    assert found == [[(0, 3)], [(5, 200)], [], [], [], [(129, 128)], [], [], [], [(300, 129)]]
    assert starts[-1] == starts[-2] == 4


def test_nothing_is_spilled_on_ampere_and_hopper(tmp_path):
    """128 registers of each of 256 threads: two tiles share a processor. No GPU is needed to compile."""
    if not (Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump").exists():
        pytest.skip("this Triton comes without NVIDIA's tools: what was compiled cannot be looked at")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "tests.losses.compile_worker"]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    found = json.loads(run.stdout)
    assert len(found) == 6
    assert all(registers <= 128 and stack == 0 for _, _, registers, stack in found), found
