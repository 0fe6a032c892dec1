"""Parameters as views of one buffer, in one process. The sum over ranks: checks_sync.py."""

import pytest
import torch
from torch import nn

from distributed.flat import ALIGNMENT, FlatParameters


def make() -> tuple[nn.Module, FlatParameters]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    model.register_parameter("scalar", nn.Parameter(torch.tensor(0.5)))
    named = list(model.named_parameters())
    weights = [(name, p) for name, p in named if p.ndim > 1]
    rest = [(name, p) for name, p in named if p.ndim <= 1]
    return model, FlatParameters([weights, rest], num_tail=2)


def test_values_names_and_gradients_stay_those_of_the_model() -> None:
    model, flat = make()
    torch.manual_seed(0)
    twin = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    for name, expected in twin.state_dict().items():
        assert torch.equal(model.state_dict()[name], expected)
    x = torch.randn(5, 3)
    for _ in range(2):  # a second backward pass adds
        twin(x).square().sum().backward()
        (model(x).square().sum() * (2 * model.scalar)).backward()
    for (name, own), other in zip(list(model.named_parameters())[1:], twin.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, msg=name)
    norm = torch.stack([p.grad.norm() for p in model.parameters()]).norm()
    flat.tail_X.fill_(100.0)  # is no gradient
    torch.testing.assert_close(flat.gradient_norm(), norm)
    flat.zero()
    assert not any(p.grad.any() for p in model.parameters())
    assert not flat.tail_X.any()


def test_a_write_to_the_flat_values_is_seen_by_the_model_and_pieces_start_aligned() -> None:
    model, flat = make()
    with torch.no_grad():
        flat.groups[0].fill_(3.0)
        flat.groups[1].fill_(4.0)
    assert {(p.ndim > 1, v) for p in model.parameters() for v in p.flatten().tolist()} == {(True, 3.0), (False, 4.0)}
    assert model.scalar.item() == 4.0
    assert all(piece.start % ALIGNMENT == 0 for pieces in flat.pieces.values() for piece in pieces)
    assert [piece.name for piece in flat.pieces[flat.groups[1]]] == ["scalar", "0.bias", "1.bias"]


def test_a_replaced_gradient_and_mixed_kinds_are_refused() -> None:
    model, flat = make()
    flat.sum_over_ranks()
    model[0].weight.grad = None
    with pytest.raises(AssertionError, match=r"replaced the gradient of 0\.weight"):
        flat.sum_over_ranks()
    mixed = [("a", nn.Parameter(torch.zeros(2))), ("b", nn.Parameter(torch.zeros(2, dtype=torch.float64)))]
    with pytest.raises(ValueError, match=r"flat_optimizer: parameters of one dtype .* a \(torch\.float32, cpu\), b"):
        FlatParameters([mixed], 0)
