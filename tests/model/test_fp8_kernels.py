"""The quantiser against plain torch.

Triton's interpreter rounds to fp8 less well than a GPU (it drops a carry into the exponent) and knows no NaN there, so
that on a CPU only few numbers may differ, and by less than a factor of two."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernel is written in Triton")

from model import fp8
from model.activations import swiglu
from model.fp8_kernels import activate, activate_backward, quantise_rows

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_FP8 = fp8.why_no_fp8(DEVICE, torch.bfloat16) is None
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_FP8, reason="this GPU has no fp8")


@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (5, 48), (16, 1280), (3, 11008), (2, 22016)])
def test_rows_equal_those_of_torch(num_rows, width):
    torch.manual_seed(width)
    x = torch.randn(num_rows, width).to(DEVICE, torch.bfloat16) * 3
    x[-1, : width // 2] *= 1e-3
    ours, scale = quantise_rows(x)
    expected, expected_scale = fp8.quantise_rows(x, "torch")
    assert (ours.shape, ours.dtype, scale.shape) == (expected.shape, expected.dtype, expected_scale.shape)
    torch.testing.assert_close(scale, expected_scale, rtol=1e-6, atol=0)
    # A quotient that lies between two numbers may fall to either, for one last bit of the scale.
    differs = ours.view(torch.uint8).int() - expected.view(torch.uint8).int()
    assert differs.abs().max() <= (1 if DEVICE.type == "cuda" else 8)
    assert (differs != 0).float().mean() < (0.001 if DEVICE.type == "cuda" else 0.1)
    assert ours[num_rows:].float().abs().sum() == 0


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize(("num_rows", "width"), [(1, 16), (5, 48), (3, 2100), (2, 5120), (2, 11008)])
def test_activations_equal_those_of_torch_then_quantised(num_rows, width, is_gated):
    torch.manual_seed(width)
    pre = torch.randn(num_rows, width * (2 if is_gated else 1)).to(DEVICE, torch.bfloat16) * 2
    grad = torch.randn(num_rows, width).to(DEVICE, torch.bfloat16) * 1e-3
    exact = pre.float().requires_grad_()
    y = swiglu(exact, "torch") if is_gated else F.gelu(exact)
    (grad_pre,) = torch.autograd.grad(y, exact, grad.float())
    for ours, truth in (
        (activate(pre, is_gated), y.detach()),
        (activate_backward(grad, pre, is_gated), grad_pre),
    ):
        quantised, scale = ours
        assert quantised.shape == (16, truth.shape[1])
        torch.testing.assert_close(scale[:num_rows, 0], truth.abs().amax(dim=1) / 448, rtol=1e-4, atol=0)
        back = quantised.float() * scale
        off = float((back[:num_rows] - truth).norm() / truth.norm())
        assert off < (0.04 if DEVICE.type == "cuda" else 0.2)
        assert back[num_rows:].abs().sum() == 0


def test_a_row_of_zeros():
    ours, scale = quantise_rows(torch.zeros(3, 32, device=DEVICE, dtype=torch.bfloat16))
    assert torch.equal(ours.float() * scale, torch.zeros(16, 32, device=DEVICE))


@pytest.mark.skipif(DEVICE.type == "cpu", reason="the interpreter has no NaN in fp8")
def test_nothing_hides_what_is_not_finite():
    x = torch.zeros(3, 32, device=DEVICE, dtype=torch.bfloat16)
    x[1, 4], x[2, 4] = torch.nan, torch.inf
    ours, scale = quantise_rows(x)
    back = ours.float() * scale
    assert back[1, 4].isnan()
    assert back[2, 4].isnan()
