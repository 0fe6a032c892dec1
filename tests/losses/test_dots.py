"""Products of listed pairs."""

import torch

from losses import dots
from losses.dots import add_at, pair_dots
from losses.pairs import Pairs
from tests.losses import tiles


def test_equals_indexing_and_multiplying(monkeypatch):
    monkeypatch.setattr(dots, "DOTS_AT_ONCE", 3)
    generator = torch.Generator().manual_seed(0)
    rows_RE, cols_CE = (torch.randn(n, 3, dtype=torch.float64, generator=generator, requires_grad=True) for n in (4, 5))
    pairs = Pairs(torch.tensor([0, 3, 3, -1, 1, 0, 2]), torch.tensor([4, 4, 0, -1, 2, 4, 1]))
    real = pairs.row_P >= 0
    found_P = pair_dots(rows_RE, cols_CE, pairs)
    expected_P = (rows_RE[pairs.row_P[real]] * cols_CE[pairs.col_P[real]]).sum(dim=1)
    assert torch.allclose(found_P[real], expected_P, rtol=0, atol=1e-14)
    assert (found_P[~real] == 0).all()
    weight_P = torch.randn(7, dtype=torch.float64, generator=generator)
    found = torch.autograd.grad((found_P * weight_P).sum(), (rows_RE, cols_CE))
    expected = torch.autograd.grad((expected_P * weight_P[real]).sum(), (rows_RE, cols_CE))
    assert all(torch.allclose(a, b, rtol=0, atol=1e-14) for a, b in zip(found, expected, strict=True))


def test_a_frozen_side_gets_none_and_bf16_is_summed_in_fp32():
    rows_RE, cols_CE = torch.ones(2, 300, dtype=torch.bfloat16, requires_grad=True), torch.ones(2, 300).bfloat16()
    found_P = pair_dots(rows_RE, cols_CE, Pairs(torch.tensor([0]), torch.tensor([1])))
    assert found_P.tolist() == [300.0]
    found_P.sum().backward()
    assert cols_CE.grad is None
    assert rows_RE.grad.dtype == torch.bfloat16
    assert rows_RE.grad.sum(dim=1).tolist() == [300.0, 0.0]


def test_sums_into_places_skip_padding_and_are_the_same_each_time():
    """Thousands of terms a place, in fp32: any other order of additions would show (on CUDA, with atomics)."""
    generator = torch.Generator().manual_seed(1)
    at_P = torch.randint(-1, 3, (20_000,), generator=generator).to(tiles.DEVICE)
    for shape in ((), (70,)):
        terms_P = torch.randn(20_000, *shape, generator=generator).to(tiles.DEVICE)
        found = [add_at(torch.zeros(5, *shape, device=tiles.DEVICE), at_P, terms_P) for _ in range(5)]
        assert all(torch.equal(found[0], other) for other in found)
        expected = torch.stack([terms_P[at_P == place].double().sum(dim=0) for place in range(5)])
        assert torch.allclose(found[0].double(), expected, rtol=0, atol=5e-3)
    assert add_at(torch.zeros(0, 3), at_P[:0].cpu(), torch.zeros(0, 3)).shape == (0, 3)


def test_gradients_of_many_pairs_are_the_same_each_time():
    generator = torch.Generator().manual_seed(2)
    leaves = [torch.randn(n, 16, generator=generator).to(tiles.DEVICE).requires_grad_() for n in (40, 3)]
    places = [torch.randint(0, n, (9000,), generator=generator).to(tiles.DEVICE) for n in (40, 3)]
    weight_P = torch.randn(9000, generator=generator).to(tiles.DEVICE)
    first, *others = (
        torch.autograd.grad((pair_dots(*leaves, Pairs(*places)) * weight_P).sum(), leaves) for _ in range(4)
    )
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))
