"""The kernels of the norms against the formulas of torch, values and gradients; widths of real towers included."""

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton", reason="the kernels are written in Triton")

from model.norm_kernels import add_norm, pool_norm
from tests.model.kernel_errors import DEVICE, assert_no_worse

EPS = 1e-5


def draw(*shape, dtype=torch.float32):
    return torch.randn(*shape).to(DEVICE, dtype)


def plain_norm(x_PD, weight_D, bias_D):
    if bias_D is None:
        return F.rms_norm(x_PD, x_PD.shape[-1:], weight_D, EPS)
    return F.layer_norm(x_PD, x_PD.shape[-1:], weight_D, bias_D, EPS)


@pytest.mark.parametrize("is_centred", [True, False])
@pytest.mark.parametrize("width", [3, 48, 384, 1280, 4096])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sum_and_norm(dtype, width, is_centred):
    """Against fp64; bf16 rounds twice each way, which the plain bf16 path does no better."""
    torch.manual_seed(width)
    x, delta, grad_sum, grad_y = (draw(3, width, dtype=dtype) for _ in range(4))
    x = x + 3.0  # far from centred: a variance by E[x^2] - E[x]^2 would show
    weight = 1 + 0.3 * draw(width, dtype=dtype)
    bias = 0.3 * draw(width, dtype=dtype) if is_centred else None

    def run(function, to):
        inputs = [t.detach().to(to).requires_grad_() for t in (x, delta)]
        total, y = function(*inputs, weight.to(to), None if bias is None else bias.to(to))
        grads = torch.autograd.grad((total, y), inputs, (grad_sum.to(to), grad_y.to(to)))
        return total, y, *grads

    ours = run(lambda a, b, w, c: add_norm(a, b, w, c, EPS), dtype)
    plain = run(lambda a, b, w, c: (a + b, plain_norm(a + b, w, c)), dtype)
    exact = run(lambda a, b, w, c: (a + b, plain_norm(a + b, w, c)), torch.float64)
    assert all(part.dtype == dtype for part in ours)
    assert ours[2] is ours[3] or torch.equal(ours[2], ours[3])
    for mine, theirs, truth in zip(ours, plain, exact, strict=True):
        assert_no_worse(mine, theirs, truth)


@pytest.mark.parametrize("is_centred", [True, False])
def test_either_gradient_may_be_absent_and_delta_too(is_centred):
    x, delta = draw(2, 20).requires_grad_(), draw(2, 20).requires_grad_()
    weight, bias = draw(20), draw(20) if is_centred else None
    expected_sum, expected_y = x + delta, plain_norm(x + delta, weight, bias)
    for take, reference in ((lambda s, y: y, expected_y), (lambda s, y: s, expected_sum)):
        value = take(*add_norm(x, delta, weight, bias, EPS))
        torch.testing.assert_close(value, reference)
        ours = torch.autograd.grad(value.square().sum(), (x, delta))
        theirs = torch.autograd.grad(reference.square().sum(), (x, delta), retain_graph=True)
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    same, alone = add_norm(x, None, weight, bias, EPS)
    assert same is x
    torch.testing.assert_close(alone, plain_norm(x, weight, bias))
    ours = torch.autograd.grad((alone.square() + same).sum(), x)
    theirs = torch.autograd.grad((plain_norm(x, weight, bias).square() + x).sum(), x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_nothing_is_recorded_without_a_gradient():
    total, y = add_norm(draw(2, 8), draw(2, 8), draw(8), None, EPS)
    assert not total.requires_grad
    assert y.grad_fn is None


@pytest.mark.parametrize("width", [48, 1280])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_pairs(dtype, width):
    """Clips of 5, 1, 4, 1 and 3 tokens: odd ones leave their last token out, single ones keep it."""
    first = torch.tensor([0, 2, 5, 6, 8, 10, 11], device=DEVICE)
    second = torch.tensor([1, 3, 5, 7, 9, 10, 12], device=DEVICE)
    x, delta, grad = draw(14, width, dtype=dtype), draw(14, width, dtype=dtype), draw(7, width, dtype=dtype)
    weight, bias = 1 + 0.3 * draw(width, dtype=dtype), draw(width, dtype=dtype)

    def plain(a, b, w, c):
        total = a + b
        return plain_norm((total[first] + total[second]) / 2, w, c)

    def run(function, to):
        inputs = [t.detach().to(to).requires_grad_() for t in (x, delta)]
        y = function(*inputs, weight.to(to), bias.to(to))
        return y, *torch.autograd.grad(y, inputs, grad.to(to))

    ours = run(lambda a, b, w, c: pool_norm(a, b, first, second, w, c, EPS), dtype)
    theirs, exact = run(plain, dtype), run(plain, torch.float64)
    for mine, plain_one, truth in zip(ours, theirs, exact, strict=True):
        assert_no_worse(mine, plain_one, truth)
    assert not ours[1][[4, 13]].any()
