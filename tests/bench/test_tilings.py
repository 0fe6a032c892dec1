"""The search for tilings: what it tries, and that a tiling which cannot run is told."""

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from bench import tilings
from bench.attention import Pack
from model.attention import Heads
from model.tile_attention import Tiling


def test_tries_are_different_and_of_moderate_size():
    assert len(set(tilings.TRIES)) == len(tilings.TRIES)
    assert all(tiling.tile * tiling.step <= 8192 for _, _, tiling in tilings.TRIES)


def test_a_tiling_that_cannot_run_is_told():
    pack = Pack("", Heads(1, 1, 16), [3], True)
    index, reason = tilings.compile_one((7, (pack, "forward", Tiling(24, 16, 4, 1))))
    assert index == 7
    assert reason  # not a power of two
