"""The search for tilings: what it tries, and that a tiling which cannot run is told."""

import pytest

pytest.importorskip("triton", reason="the kernels need triton")

from bench import tilings
from bench.attention import Pack
from model.attention import Heads
from model.tile_attention import Tiling


def test_candidates_are_different_and_of_moderate_size():
    for is_text in (True, False):
        tried = list(tilings.candidates(is_text))
        assert len(set(tried)) == len(tried)
        assert all(tiling.tile * tiling.step <= 8192 for tiling in tried)


def test_a_tiling_that_cannot_run_is_told():
    pack = Pack("", Heads(1, 1, 16), [3], True)
    assert tilings.compile_one(pack, "forward", Tiling(24, 16, 4, 1), True)  # not a power of two
