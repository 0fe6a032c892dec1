"""The tiled loss by kernels: on CUDA where there is a GPU, else interpreted at small sizes."""

import pytest
import torch

from tests.losses import tiles

tiles.need_triton()

F32, BF16 = torch.float32, torch.bfloat16
ON_GPU = tiles.DEVICE == "cuda"


def check(case):
    loss, d_rows, d_cols, d_inv_t = tiles.errors(case.by_tiles(triton=True), case.by_masks())
    assert loss < 2e-5
    # On the GPU, d scores is rounded to bf16; the interpreter's copy of it is not.
    assert max(d_rows, d_cols) < (1e-2 if ON_GPU else 6e-3 if case.rows_RE.dtype == BF16 else 4e-3)
    assert d_inv_t < (5e-3 if ON_GPU else 2e-3)


@pytest.mark.parametrize("dtypes", [(BF16, BF16), (F32, F32), (F32, BF16)])
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("inv_t", [14.0, 80.0])  # one exponential for both directions, and one for each
def test_equals_the_dense_reference(dtypes, symmetric, keys, inv_t):
    check(tiles.problem(1, 20, 13, 40, dtypes, symmetric, keys, inv_t, 0.05, tiles.DEVICE))


@pytest.mark.parametrize(("num_rows", "num_cols"), [(1, 1), (1, 130), (129, 2), (0, 3), (3, 0)])
def test_sizes_that_fill_no_tile(num_rows, num_cols):
    check(tiles.problem(2, num_rows, num_cols, 64, (F32, F32), True, False, 14.0, 0.02, tiles.DEVICE))


def test_several_panels(monkeypatch):
    """Sums over panels in both directions, with a ragged last one."""
    from losses import tiled_triton

    monkeypatch.setattr(tiled_triton, "PANEL", 128)
    check(tiles.problem(3, 150, 140, 64, (F32, F32), True, False, 14.0, 0.001, tiles.DEVICE))


def test_fp64_is_refused_rather_than_rounded():
    case = tiles.problem(4, 3, 3, device=tiles.DEVICE)
    with pytest.raises(ValueError, match="float64"):
        case.by_tiles(triton=True)


@pytest.mark.parametrize("keys", [False, True])
def test_the_same_bits_each_time(keys):
    """A resumed run repeats what it would have done. On the GPU the sums are long enough for another order to show."""
    case = tiles.problem(6, *((700, 500) if ON_GPU else (20, 13)), 64, (F32, F32), True, keys, 14.0, 0.01, tiles.DEVICE)
    first, *others = (case.by_tiles(triton=True) for _ in range(4 if ON_GPU else 2))
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.skipif(not ON_GPU, reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("keys", [False, True])
def test_a_graph_captures_it(keys):
    """No host sync, no shape that depends on data."""
    case = tiles.problem(5, 300, 200, 64, (F32, F32), True, keys, 14.0, 0.01, "cuda")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            expected = case.by_tiles(triton=True)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = case.by_tiles(triton=True)
    graph.replay()
    torch.cuda.synchronize()
    assert max(tiles.errors(found, expected)) < 1e-5
