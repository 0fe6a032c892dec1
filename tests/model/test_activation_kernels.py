"""SwiGLU's and GELU's kernels against torch in fp64, values and gradients."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton")

from model.activation_kernels import gelu, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding's error; the interpreter cuts bf16 off where a GPU rounds it to the nearest.
UNIT = {torch.float32: 1e-6, torch.bfloat16: 2**-8 if DEVICE == "cuda" else 2**-7}


def plain_swiglu(x):
    gate, up = x.chunk(2, dim=1)
    return F.silu(gate) * up


def assert_no_worse(ours, plain, truth):
    """Root mean square error at most that of torch's own operations in this dtype, or of one rounding."""
    errors = [float((part - truth).detach().norm() / truth.detach().norm()) for part in (ours.double(), plain.double())]
    assert errors[0] <= max(UNIT[ours.dtype], (1.02 if DEVICE == "cuda" else 2.5) * errors[1]), errors


@pytest.mark.parametrize(
    ("fused", "plain", "num_columns"),
    [(swiglu, plain_swiglu, n) for n in (2, 96, 2 * 2049, 2 * 11008)] + [(gelu, F.gelu, n) for n in (1, 48, 5120)],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients(dtype, fused, plain, num_columns):
    torch.manual_seed(num_columns)
    x = (3.0 * torch.randn(3, num_columns)).to(DEVICE, dtype)
    grad = None

    def run(function, to):
        nonlocal grad
        leaf = x.to(to).clone().requires_grad_()
        y = function(leaf)
        grad = torch.randn_like(y) if grad is None else grad
        return y, torch.autograd.grad(y, leaf, grad.to(to))[0]

    ours, theirs, exact = run(fused, dtype), run(plain, dtype), run(plain, torch.float64)
    for mine, plain_one, truth in zip(ours, theirs, exact, strict=True):
        assert mine.dtype == dtype
        assert_no_worse(mine, plain_one, truth)


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(
    ("fused", "expected"), [(swiglu, [[0.0, 100.0]]), (gelu, [[0.0, 100.0, 0.8413447, 0.8413447]])]
)
def test_far_out_values_stay_finite(fused, expected):
    x = torch.tensor([[-100.0, 100.0, 1.0, 1.0]], device=DEVICE, requires_grad=True)
    y = fused(x)
    torch.testing.assert_close(y, torch.tensor(expected, device=DEVICE), rtol=1e-6, atol=1e-30)
    assert torch.autograd.grad(y.sum(), x)[0].isfinite().all()
