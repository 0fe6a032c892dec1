"""The sweep by kernels: on CUDA where there is a GPU, else interpreted at small sizes."""

import pytest
import torch

from tests.losses import tiles
from tests.losses.test_sweep import compare

tiles.need_triton()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("num_clips", "num_entries", "dim", "k", "inv_t"),
    [(2, 1, 8, 3, 14.0), (5, 300, 70, 7, 14.0), (3, 129, 64, 200, 99.0)],  # ragged tiles; more asked for than there is
)
def test_equals_the_matrix(dtype, num_clips, num_entries, dim, k, inv_t):
    case = tiles.bank_problem(1, num_clips, num_entries, dim, dtype, inv_t, tiles.DEVICE)
    case.limit_B[1:] = 1.0 if num_entries == 1 else case.limit_B[1:]
    if num_entries == 1:
        case.left_out.pairs_Q.row_P.zero_()
    lse, d_audio, d_inv_t, top = compare(case, k, triton=True)
    assert lse < 1e-4
    assert d_audio < (3e-3 if dtype == torch.float32 else 6e-3)
    assert d_inv_t < 2e-3
    assert top < 1e-6


def test_several_chunks(monkeypatch):
    from losses import sweep_triton

    monkeypatch.setattr(sweep_triton, "CHUNK", 128)
    lse, d_audio, d_inv_t, top = compare(tiles.bank_problem(2, 4, 300, 64, torch.float32, 14.0, tiles.DEVICE), 9, True)
    assert lse < 1e-4
    assert d_audio < 3e-3
    assert d_inv_t < 2e-3
    assert top < 1e-6


def test_nothing_on_a_side():
    from losses.sweep_triton import sweep

    case = tiles.bank_problem(3, 2, 5, 8, torch.float32, 14.0, tiles.DEVICE)
    swept = sweep(case.audio_BE, case.bank_KE[:0], case.left_out, case.limit_B, 3, case.inv_t)
    assert swept.top_BH.shape == (2, 0)
    assert (swept.lse_B == -torch.inf).all()
    assert swept.mean_BE.shape == case.audio_BE.shape
