"""The feed-forward block in fp8: one node against products and activation apart, and against exact arithmetic."""

import pytest
import torch
import torch.nn.functional as F

from model.activations import swiglu
from model.fp8 import Fp8Product, why_no_fp8
from model.fp8_mlp import feed_forward

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HAS_FP8 = why_no_fp8(DEVICE, torch.bfloat16) is None
pytestmark = pytest.mark.skipif(DEVICE.type == "cuda" and not HAS_FP8, reason="this GPU has no fp8")
NUM_ROWS, WIDTH, WIDER = 9, 64, 160


def draw(*shape):
    return torch.randn(*shape).to(DEVICE, torch.bfloat16)


def error(ours, truth):
    ours, truth = ours.detach().double(), truth.detach().double()
    return float((ours - truth).norm() / truth.norm())


@pytest.mark.parametrize("is_gated", [True, False])
@pytest.mark.parametrize("kernels", ["triton", "torch"])
def test_values_and_gradients(kernels, is_gated):
    if kernels == "triton":
        pytest.importorskip("triton", reason="the kernels are written in Triton")
    torch.manual_seed(0)
    width = WIDER * (2 if is_gated else 1)
    first, second = draw(width, WIDTH) / WIDTH**0.5, draw(WIDTH, WIDER) / WIDER**0.5
    biases, x, grad = (draw(width), draw(WIDTH)), draw(NUM_ROWS, WIDTH).requires_grad_(), draw(NUM_ROWS, WIDTH)
    # The weights by plain torch both times: only what the kernels of the block do may differ.
    up, down = Fp8Product.of(first, biases[0], "torch"), Fp8Product.of(second, biases[1], "torch")
    y = feed_forward(x, up, down, is_gated, kernels)
    (ours,) = torch.autograd.grad(y, x, grad)
    exact_x = x.detach().double().requires_grad_()
    pre = exact_x @ first.double().T + biases[0].double()
    exact = (swiglu(pre, "torch") if is_gated else F.gelu(pre)) @ second.double().T + biases[1].double()
    (truth,) = torch.autograd.grad(exact, exact_x, grad.double())
    bound = 0.1 if DEVICE.type == "cuda" or kernels == "torch" else 0.2  # the interpreter rounds to fp8 less well
    assert (y.shape, y.dtype) == ((NUM_ROWS, WIDTH), torch.bfloat16)
    assert 1e-3 < error(y, exact) < bound
    assert 1e-3 < error(ours, truth) < bound


def test_no_rows():
    product = Fp8Product.of(draw(WIDTH, WIDTH), None)
    assert feed_forward(draw(0, WIDTH), product, product, False).shape == (0, WIDTH)


def test_the_node_keeps_the_pre_activation_alone():
    pytest.importorskip("triton", reason="the kernels are written in Triton")
    up, down, kept = (
        Fp8Product.of(draw(WIDER, WIDTH), None, "torch"),
        Fp8Product.of(draw(WIDTH, WIDER), None, "torch"),
        [],
    )
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        feed_forward(draw(NUM_ROWS, WIDTH).requires_grad_(), up, down, False, "triton")
    assert kept == [(NUM_ROWS, WIDER)]
