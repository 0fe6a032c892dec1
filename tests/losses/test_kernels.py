"""Pieces of the kernels on their own; what they make together is in test_tiled_triton.py and test_sweep_triton.py."""

from itertools import pairwise

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
