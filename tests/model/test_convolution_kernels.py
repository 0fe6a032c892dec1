"""What the kernels between the convolutions' products write, slot by slot; the whole is tested in test_convolutions."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton")

from model.convolution_kernels import add_positions, gather_patches

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def test_patches_are_masked_and_end_with_the_pack():
    h_TD = torch.randn(6, 20, device=DEVICE)
    is_kept_T = torch.tensor([True, True, True, False, True, True], device=DEVICE)
    patches = gather_patches(h_TD, is_kept_T, torch.tensor([0, 2, 1, 3], device=DEVICE))
    y_TD = F.gelu(h_TD) * is_kept_T[:, None]
    nothing_D = torch.zeros(20, device=DEVICE)
    expected = [(nothing_D, y_TD[0], y_TD[1]), (y_TD[3], y_TD[4], y_TD[5]), (y_TD[1], y_TD[2], y_TD[3])]
    torch.testing.assert_close(patches[:3], torch.stack([torch.cat(row) for row in expected]))
    torch.testing.assert_close(patches[3], torch.cat((y_TD[5], nothing_D, nothing_D)))


def test_positions_are_added_after_gelu():
    h_PD, positions_LD = torch.randn(3, 20, device=DEVICE), torch.randn(5, 20, device=DEVICE)
    place_P = torch.tensor([4, 0, 2], device=DEVICE)
    torch.testing.assert_close(add_positions(h_PD, positions_LD, place_P), F.gelu(h_PD) + positions_LD[place_P])
