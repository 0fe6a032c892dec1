"""LoraLinear: the fused node against the plain formula, real dropout, precision, what is kept for backward."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from lora.layers import LoraLinear, fused_lora_linear, plain_lora_linear

BOTH = pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])


def tensors(seed=0, rows=(3,), num_in=5, num_out=4, r=2, bias=True, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)

    weight, bias_O = draw(num_out, num_in), draw(num_out) if bias else None
    x, lora_A, lora_B = (draw(*shape).requires_grad_() for shape in ((*rows, num_in), (r, num_in), (num_out, r)))
    return x, weight, bias_O, lora_A, lora_B


def make_layer(fused, dropout=0.0, num_in=16, num_out=12, r=4, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    layer = LoraLinear(nn.Linear(num_in, num_out, dtype=dtype), r, 2 * r, dropout, fused)
    nn.init.normal_(layer.lora_B)
    return layer


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1000),
    rows=st.sampled_from([(3,), (1,), (2, 3), (2, 1, 2), (0,)]),
    bias=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1, 0.5]),
    contiguous=st.booleans(),
)
def test_fused_equals_plain_values_and_gradients(seed, rows, bias, dropout, contiguous):
    results = []
    for function in (plain_lora_linear, fused_lora_linear):
        x, weight, bias_O, lora_A, lora_B = tensors(seed, rows, bias=bias)
        given_x = x if contiguous else x.transpose(-1, 0).contiguous().transpose(-1, 0)
        torch.manual_seed(seed)
        y = function(given_x, weight, bias_O, lora_A, lora_B, 1.7, dropout)
        grad_y = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(seed))
        results.append((y.detach(), *torch.autograd.grad(y, (x, lora_A, lora_B), grad_y)))
    for plain, fused in zip(*results, strict=True):
        assert plain.shape == fused.shape
        assert not plain.numel() or (plain - fused).abs().max() < 1e-13


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_gradcheck(dropout):
    x, weight, bias_O, lora_A, lora_B = tensors()

    def run(x, lora_A, lora_B):
        torch.manual_seed(7)  # the same mask at every evaluation
        return fused_lora_linear(x, weight, bias_O, lora_A, lora_B, 2.0, dropout)

    assert torch.autograd.gradcheck(run, (x, lora_A, lora_B))


@BOTH
def test_starts_equal_to_its_base(fused):
    base = nn.Linear(6, 3)
    x = torch.randn(4, 6)
    layer = LoraLinear(base, 2, 4, 0.1, fused)
    assert torch.equal(layer(x), base(x))
    assert layer.lora_A.abs().max() > 0


@BOTH
def test_dropout_is_real_in_training_and_absent_in_evaluation(fused):
    """A dropout that is accepted and forced to 0 is the trap: two training passes must differ."""
    layer, x = make_layer(fused, dropout=0.1), torch.randn(8, 16)
    layer.train()
    assert not torch.equal(layer(x), layer(x))
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    without = make_layer(fused, dropout=0.0)
    assert torch.equal(layer(x), without.train()(x))


@BOTH
def test_dropout_zeroes_a_tenth_of_the_input_of_A_and_scales_the_rest(fused):
    layer = make_layer(fused, dropout=0.1, num_in=16, num_out=16, r=16).train()
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        layer.lora_A.copy_(torch.eye(16))
        layer.lora_B.copy_(torch.eye(16) / layer.scaling)
    seen = layer(torch.ones(20_000, 16)).detach()  # what A is given
    dropped = seen == 0
    assert dropped.float().mean() == pytest.approx(0.1, abs=0.005)
    assert (seen[~dropped] - 1 / 0.9).abs().max() < 1e-6
    assert dropped.float().mean(dim=0).max() < 0.11  # elements, not whole features


@BOTH
def test_checkpointing_replays_the_same_mask(fused):
    """Non-reentrant, and the input needs no gradient, as under a frozen embedding."""
    gradients = []
    for checkpointed in (False, True):
        layers = nn.Sequential(
            make_layer(fused, 0.3, 16, 16, seed=1), nn.GELU(), make_layer(fused, 0.3, 16, 16, seed=2)
        ).train()
        x = torch.randn(6, 16, generator=torch.Generator().manual_seed(3))
        torch.manual_seed(4)
        y = checkpoint(layers, x, use_reentrant=False) if checkpointed else layers(x)
        torch.rand(5)  # other draws in between
        y.square().sum().backward()
        gradients.append([p.grad for p in layers.parameters() if p.requires_grad])
    assert len(gradients[0]) == 4
    for direct, replayed in zip(*gradients, strict=True):
        assert direct.abs().max() > 0
        assert torch.equal(direct, replayed)


@BOTH
@pytest.mark.parametrize("base_dtype", [torch.float32, torch.bfloat16])
def test_autocast_bf16_with_fp32_masters(fused, base_dtype):
    layer, exact = make_layer(fused, dtype=base_dtype), make_layer(False, dtype=base_dtype).double()
    x = torch.randn(8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    y.float().square().mean().backward()
    exact(x.double()).square().mean().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_A.grad.dtype == torch.float32
    for name in ("lora_A", "lora_B"):
        grad, reference = getattr(layer, name).grad, getattr(exact, name).grad
        assert (grad - reference).norm() < 0.02 * reference.norm(), name


@BOTH
def test_bf16_base_and_input_without_autocast(fused):
    layer = make_layer(fused, dtype=torch.bfloat16)
    y = layer(torch.randn(8, 16).bfloat16())
    y.float().sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.grad.dtype == torch.float32


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_fused_keeps_no_more_than_it_needs(dropout):
    """x, the low-rank activation, and one byte an element for the mask; the plain form keeps a dropped copy as well."""
    num_rows, layer = 64, make_layer(True, dropout, dtype=torch.bfloat16).train()
    x = torch.randn(num_rows, 16).bfloat16().requires_grad_()
    parameters = {layer.base_layer.weight.data_ptr()}
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    assert parameters < kept.keys()  # the weight itself, no copy
    of_adapter = 2 * (layer.lora_A.numel() + layer.lora_B.numel())  # in bf16
    activations = sum(kept.values()) - 2 * layer.base_layer.weight.numel() - of_adapter
    mask = num_rows * 16 if dropout else 0
    assert activations == 2 * num_rows * 16 + 2 * num_rows * layer.r + mask


@BOTH
def test_the_frozen_weight_costs_no_backward_product(fused):
    """Backward: one product with W for x, and four thin ones with the adapters'. A gradient of W would double it."""
    num_rows, num_in, num_out, r = 64, 16, 12, 4
    layer, x = make_layer(fused), torch.randn(num_rows, num_in, requires_grad=True)
    y = layer(x)
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    with_x = 2 * num_rows * num_in * num_out
    assert with_x < counter.get_total_flops() <= with_x + 2 * num_rows * 2 * r * (num_in + num_out)
    assert layer.base_layer.weight.grad is None
    assert layer.base_layer.bias.grad is None


def test_input_that_needs_no_gradient_gets_no_product():
    num_rows, num_in, num_out, r = 64, 16, 12, 4
    y = make_layer(True)(torch.randn(num_rows, num_in))
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * num_rows * r * (num_in + 2 * num_out)


@BOTH
def test_compiles_without_graph_breaks(fused):
    layer = make_layer(fused, dropout=0.0).train()
    x = torch.randn(8, 16)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    y = compiled(x)
    y.sum().backward()
    (expected,) = torch.autograd.grad(layer(x).sum(), layer.lora_A)
    assert torch.allclose(y, layer(x))
    assert torch.allclose(layer.lora_A.grad, expected)
