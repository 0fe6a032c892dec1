"""The mean over sequences against the plain one, with sequences longer than a tile and of one token."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernel is written in Triton")

from model.mean_kernels import sequence_mean
from model.packing import SequenceLayout
from tests.model.kernel_errors import DEVICE, UNIT


@pytest.mark.parametrize("width", [5, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, width):
    lengths = [1, 8, 19, 3]
    layout = SequenceLayout.build(lengths, DEVICE)
    x_PD = torch.randn(sum(lengths), width).to(DEVICE, dtype).requires_grad_()
    mean_BD = sequence_mean(x_PD, layout.cu_seqlens)
    expected_BD = torch.stack([part.double().mean(0) for part in x_PD.split(lengths)])
    assert mean_BD.dtype == torch.float32
    torch.testing.assert_close(mean_BD.double(), expected_BD, rtol=0, atol=1e-6)
    weights_BD = torch.randn_like(mean_BD)
    (ours,) = torch.autograd.grad((mean_BD * weights_BD).sum(), x_PD)
    (theirs,) = torch.autograd.grad((expected_BD * weights_BD).sum(), x_PD)
    torch.testing.assert_close(ours, theirs, rtol=UNIT[dtype], atol=1e-6)


def test_an_empty_dummy_is_zero_and_harms_nobody():
    cu_seqlens = torch.tensor([0, 2, 2, 3, 3], dtype=torch.int32, device=DEVICE)
    x_PD = torch.ones(3, 4, device=DEVICE, requires_grad=True)
    mean_BD = sequence_mean(x_PD, cu_seqlens)
    assert mean_BD.tolist() == [[1.0] * 4, [0.0] * 4, [1.0] * 4, [0.0] * 4]
    assert torch.autograd.grad(mean_BD.sum(), x_PD)[0].tolist() == [[0.5] * 4, [0.5] * 4, [1.0] * 4]
