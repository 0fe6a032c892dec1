"""The steps in torch against autograd on the formula, in fp64, and which devices take the kernels."""

import pytest
import torch

from lora.joint_steps import extend, finish, pack, uses_kernels
from lora.mask import keep_mask, keep_scale

P, NUM_IN, R = 6, 10, 2
SPANS = ((0, 4, 0), (4, 7, -1), (7, 12, 2))


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_extend_and_finish_are_the_formula_and_its_gradients(dropout):
    torch.manual_seed(0)
    x, seed, grad = draw(P, NUM_IN).requires_grad_(), torch.tensor([9]), draw(P, 12)
    down, ups = draw(2 * R, NUM_IN).requires_grad_(), [draw(4, R).requires_grad_(), draw(5, R).requires_grad_()]
    keep = keep_mask(seed, P, NUM_IN, dropout).double() * keep_scale(dropout) if dropout else 1.0
    low = (x * keep) @ down.T
    y = torch.cat([low[:, :R] @ ups[0].T, torch.zeros(P, 3, dtype=torch.float64), low[:, R:] @ ups[1].T], 1) * 1.5
    expected = torch.autograd.grad(y, (x, down, *ups), grad)

    with torch.no_grad():
        x_PE, low_PR = extend(x, down, seed, dropout, kernels=False)
        assert torch.equal(x_PE, torch.cat([x, low_PR], 1))
        assert (low_PR - low).abs().max() < 1e-12
        weight = torch.zeros(12, NUM_IN + 2 * R, dtype=torch.float64)  # no base: its gradient is the product's own
        weight[:4, NUM_IN : NUM_IN + R], weight[7:, NUM_IN + R :] = ups[0] * 1.5, ups[1] * 1.5
        given = (grad @ weight, grad, x, low_PR, down, seed, dropout, SPANS, R, 1.5)
        grad_x, grad_A, grad_B = finish(*given, (True, True, True), False)
        ours = (grad_x, grad_A, grad_B[:4], grad_B[7:])
        assert all((a - b).abs().max() < 1e-12 for a, b in zip(ours, expected, strict=True))
        assert finish(*given, (False, False, False), False) == (None, None, None)
        alone = finish(grad @ weight[:, NUM_IN:], *given[1:], (False, True, False), False)
        assert (alone[1] - grad_A).abs().max() < 1e-12


def test_pack_casts_and_scales_into_strided_places():
    lora_A, lora_B = torch.randn(R, NUM_IN), torch.randn(4, R)
    down, weight = torch.zeros(8, NUM_IN).bfloat16(), torch.zeros(6, 20).bfloat16()
    pack([(lora_A, lora_B)], [(down[2 : 2 + R], weight[1:5, 12 : 12 + R])], 3.0, kernels=False)
    assert torch.equal(down[2 : 2 + R], lora_A.bfloat16())
    assert torch.equal(weight[1:5, 12 : 12 + R], (lora_B * 3.0).bfloat16())
    assert weight.count_nonzero() == 4 * R


def test_the_cpu_takes_torch_and_says_so(caplog):
    uses_kernels.cache_clear()
    with caplog.at_level("INFO"):
        assert not uses_kernels(torch.device("cpu"), torch.float32)
        assert not uses_kernels(torch.device("cpu"), torch.float32)
    assert caplog.text.count("no CUDA device") == 1
