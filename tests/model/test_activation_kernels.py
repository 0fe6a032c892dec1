"""SwiGLU's kernel against torch in fp64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton")

from model.activation_kernels import swiglu
from tests.model.kernel_errors import DEVICE, assert_no_worse


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=1)
    return F.silu(gate) * up


@pytest.mark.parametrize("num_columns", [2, 96, 2 * 2049, 2 * 11008])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, num_columns):
    torch.manual_seed(num_columns)
    x = (3.0 * torch.randn(3, num_columns)).to(DEVICE, dtype)
    grad = None

    def run(function, to):
        nonlocal grad
        leaf = x.to(to).clone().requires_grad_()
        y = function(leaf)
        grad = torch.randn_like(y) if grad is None else grad
        return y, torch.autograd.grad(y, leaf, grad.to(to))[0]

    ours, theirs, exact = run(swiglu, dtype), run(plain_swiglu, dtype), run(plain_swiglu, torch.float64)
    for mine, plain_one, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, plain_one, truth)


@pytest.mark.filterwarnings("ignore:overflow")
def test_far_out_values_stay_finite():
    x = torch.tensor([[-100.0, 100.0, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    y = swiglu(x)
    torch.testing.assert_close(y, torch.tensor([[0.0, 100.0]], device=DEVICE), rtol=1e-6, atol=1e-30)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
