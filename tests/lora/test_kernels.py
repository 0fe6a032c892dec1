"""The joint projection's kernels against the same steps in torch, in fp64 with the same mask."""

import pytest
import torch

pytest.importorskip("triton", reason="the kernels are written in Triton")

from lora import joint_steps
from lora.joint import Joined, joint_linear
from lora.kernels import add_parts, extend
from lora.mask import draw_seed

pytestmark = pytest.mark.usefixtures("interpreter_takes_loaded_bounds")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# One rounding's error; the interpreter cuts off where a GPU rounds to the nearest.
UNIT = 2**-10 if DEVICE == "cuda" else 2**-9
BIG = pytest.mark.skipif(DEVICE == "cpu", reason="sizes of real towers need a CUDA device")


def draw(*shape):
    return torch.randn(*shape).to(DEVICE, torch.float16)


def error(ours, truth):
    return float((ours.double() - truth).norm() / truth.norm())


def make_joined(num_in, sizes, r, adapted, dtype=torch.float16):
    torch.manual_seed(num_in)
    bases = [torch.nn.Linear(num_in, size, bias=i != 1) for i, size in enumerate(sizes)]
    bases = [base.to(DEVICE, dtype).requires_grad_(False) for base in bases]
    joined = Joined.of(bases, list(adapted), r)
    masters = []
    for size, is_adapted in zip(sizes, adapted, strict=True):
        if is_adapted:
            masters += [torch.randn(r, num_in, device=DEVICE) / num_in**0.5, torch.randn(size, r, device=DEVICE)]
    return bases, joined, [master.requires_grad_() for master in masters]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("num_rows", "num_in", "sizes", "r", "adapted"),
    [
        (5, 24, (24, 8, 8), 2, (1, 1, 1)),
        (70, 300, (40, 20, 20), 5, (1, 0, 1)),
        (37, 130, (20, 140, 20), 64, (1, 1, 1)),
        (600, 72, (16, 16, 16), 3, (0, 1, 0)),
        pytest.param(160, 4096, (4096,) * 3, 16, (1, 1, 1), marks=BIG),
        pytest.param(5300, 1280, (1280,) * 3, 16, (1, 1, 1), marks=BIG),
        pytest.param(2501, 3584, (3584, 512, 512), 64, (1, 0, 1), marks=BIG),
    ],
)
def test_kernels_equal_the_steps_in_torch(num_rows, num_in, sizes, r, adapted, dropout):
    _, joined, masters = make_joined(num_in, sizes, r, adapted)
    _, exact, _ = make_joined(num_in, sizes, r, adapted, torch.float64)
    with torch.no_grad():
        exact.weight_OE.copy_(joined.weight_OE)
        exact.bias_O.copy_(joined.bias_O)
    x, grad_y = draw(num_rows, num_in), draw(num_rows, sum(sizes))
    results = []
    for storage, kernels, dtype in ((joined, True, torch.float16), (exact, False, torch.float64)):
        torch.manual_seed(1)
        given_x = x.to(dtype).requires_grad_()
        ours = [m.detach().to(torch.promote_types(dtype, torch.float32)).requires_grad_() for m in masters]
        y = joint_linear(given_x, storage, ours, 1.5, dropout, kernels)
        results.append((y.detach(), *torch.autograd.grad(y, (given_x, *ours), grad_y.to(dtype))))
    for ours, truth in zip(*results, strict=True):
        assert ours.shape == truth.shape
        assert error(ours, truth) < 4 * UNIT


def test_the_mask_is_the_same_bit_for_bit_and_for_any_tiles():
    """x of ones: `low` counts the kept elements of a row, in numbers that fp16 holds exactly."""
    seed, x = draw_seed(torch.device(DEVICE)), torch.ones(70, 200, dtype=torch.float16, device=DEVICE)
    select = torch.zeros(64, 200, dtype=torch.float16, device=DEVICE)
    select[torch.arange(64), torch.arange(64) * 3] = 1
    for num_rows in (5, 70):
        ours = extend(x[:num_rows], select, seed, 0.5)
        expected = joint_steps.extend(x[:num_rows], select, seed, 0.5, kernels=False)
        for part, truth in zip(ours, expected, strict=True):
            assert torch.equal(part, truth)


def test_first_layer_without_gradient_of_x():
    _, joined, masters = make_joined(24, (24, 8, 8), 2, (1, 1, 1))
    x, grad_y = draw(40, 24), draw(40, 40)
    results = []
    for kernels in (True, False):
        torch.manual_seed(2)
        y = joint_linear(x, joined, masters, 1.0, 0.2, kernels)
        results.append(torch.autograd.grad(y, masters, grad_y))
    for ours, truth in zip(*results, strict=True):
        assert error(ours, truth.double()) < 4 * UNIT


def test_parts_are_added_in_both_places():
    parts = torch.randn(3, 5, 7, device=DEVICE), torch.randn(4, 600, 2, device=DEVICE)
    first, second = add_parts(*parts, 2.0)
    assert torch.allclose(first, parts[0].sum(0), atol=1e-5)
    assert torch.allclose(second, parts[1].sum(0) * 2, atol=1e-5)
    assert add_parts(None, parts[1], 1.0)[0] is None
