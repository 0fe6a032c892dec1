"""Which path the norms take, and that both agree. Parity with transformers is tested inside the towers."""

import pytest
import torch

from model.norms import LayerNorm, RMSNorm, stream_dtype

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_norm(kind, kernels, width=24):
    norm = LayerNorm(width, kernels) if kind == "layer" else RMSNorm(width, 1e-6, kernels)
    with torch.no_grad():
        for parameter in norm.parameters():
            parameter.copy_(torch.randn(width, generator=torch.Generator().manual_seed(4)) + 1.0)
    return norm.to(DEVICE).requires_grad_(False)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_kernels_and_torch_agree_and_only_frozen_weights_use_them(kind):
    pytest.importorskip("triton", reason="compares with the Triton kernels")
    x, delta = torch.randn(4, 24, device=DEVICE), torch.randn(4, 24, device=DEVICE, requires_grad=True)
    sums, ys = zip(*(make_norm(kind, kernels).add(x, delta) for kernels in ("triton", "torch")), strict=True)
    torch.testing.assert_close(sums[0], sums[1])
    torch.testing.assert_close(ys[0], ys[1], rtol=1e-5, atol=1e-5)
    assert type(ys[0].grad_fn).__name__ == "_AddNormBackward"
    assert type(ys[1].grad_fn).__name__ != "_AddNormBackward"
    trained = make_norm(kind, "triton").requires_grad_(True)
    y = trained.add(x, delta)[1]
    torch.testing.assert_close(y, ys[1], rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(y.sum(), trained.weight)[0].abs().sum() > 0
    with torch.no_grad():
        torch.testing.assert_close(trained(x + delta), ys[1], rtol=1e-5, atol=1e-5)


def test_pairs_agree():
    pytest.importorskip("triton", reason="compares with the Triton kernels")
    x, delta = torch.randn(5, 24, device=DEVICE), torch.randn(5, 24, device=DEVICE)
    first, second = torch.tensor([0, 3], device=DEVICE), torch.tensor([1, 3], device=DEVICE)
    ours, plain = (make_norm("layer", kernels).add_pairs(x, delta, first, second) for kernels in ("triton", "torch"))
    torch.testing.assert_close(ours, plain, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["layer", "rms"])
def test_remaking_gives_the_same_bits(kind):
    norm = make_norm(kind, "auto")
    x, y = norm.add(torch.randn(4, 24, device=DEVICE, requires_grad=True), torch.randn(4, 24, device=DEVICE))
    assert torch.equal(norm.remaking(x)(), y)


def test_fp64_is_plain():
    norm = make_norm("rms", "auto").double()
    x = torch.randn(3, 24, dtype=torch.float64, device=DEVICE)
    assert norm(x).dtype == torch.float64
    with pytest.raises(ValueError, match=r"kernels: got 'triton'.*float64"):
        make_norm("rms", "triton").double()(x)


def test_the_stream_takes_autocast_over_fp32_weights_alone():
    weight = torch.zeros(1)
    assert stream_dtype(weight) == torch.float32
    with torch.autocast("cpu", torch.bfloat16):
        assert stream_dtype(weight) == torch.bfloat16
        assert stream_dtype(weight.double()) == torch.float64
