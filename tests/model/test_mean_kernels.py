"""The mean over sequences against the plain one, with sequences longer than a tile and of one token."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Triton")

from model.mean_kernels import sequence_mean
from model.packing import SequenceLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("width", [5, 300])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, width):
    lengths = [1, 8, 19, 3]
    layout = SequenceLayout.build(lengths, DEVICE)
    x_PD = torch.randn(sum(lengths), width).to(DEVICE, dtype).requires_grad_()
    mean_BD = sequence_mean(x_PD, layout.cu_seqlens, layout.owner_P)
    expected_BD = torch.stack([part.double().mean(0) for part in x_PD.split(lengths)])
    assert mean_BD.dtype == torch.float32
    torch.testing.assert_close(mean_BD.double(), expected_BD, rtol=0, atol=1e-6)
    weights_BD = torch.randn_like(mean_BD)
    (ours,) = torch.autograd.grad((mean_BD * weights_BD).sum(), x_PD)
    (theirs,) = torch.autograd.grad((expected_BD * weights_BD).sum(), x_PD)
    torch.testing.assert_close(ours, theirs, rtol=2**-8 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)
