"""The second look at the tiles with the highest maxima; the sweep as a whole is in test_sweep_triton.py."""

import torch

from tests.losses import tiles

tiles.need_triton()


def test_rescored_tiles_leave_out_what_must_be_left_out():
    from losses.sweep_kernels import rescore

    generator = torch.Generator().manual_seed(0)
    audio_BE, bank_KE = (tiles.unit_rows(n, 70, generator).float().to(tiles.DEVICE) for n in (2, 150))
    tile_BH = torch.tensor([[1, 0], [0, 1]], device=tiles.DEVICE)
    limit_B = torch.tensor([0.05, 2.0], device=tiles.DEVICE)
    is_out_K = torch.zeros(150, dtype=torch.int8, device=tiles.DEVICE)
    is_out_K[7] = 1
    starts, entries = (torch.tensor(x, dtype=torch.int32, device=tiles.DEVICE) for x in ([0, 1, 2], [130, 9]))
    out_BX = torch.empty(2, 256, device=tiles.DEVICE)
    rescore[(2, 2)](
        audio_BE, bank_KE, tile_BH, limit_B, is_out_K, starts, entries, out_BX, 150, 70, 70, 2, E=70, BN=128, BK=64
    )
    cosine_BK = audio_BE @ bank_KE.T
    cosine_BK[cosine_BK > limit_B[:, None]] = -torch.inf
    cosine_BK[:, 7] = cosine_BK[0, 130] = cosine_BK[1, 9] = -torch.inf
    padded_BX = torch.nn.functional.pad(cosine_BK, (0, 106), value=-torch.inf)
    expected_BX = torch.stack([padded_BX[0].roll(128), padded_BX[1]])
    assert torch.allclose(out_BX, expected_BX, rtol=0, atol=1e-6)
