"""The plain activations, and weights that lie side by side."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from model.activations import join_weights, joined_weight, swiglu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.fixture
def pair():
    return tuple(nn.Linear(6, width, bias=False, device=DEVICE).requires_grad_(False) for width in (4, 5))


def test_kernels_and_torch_agree():
    pytest.importorskip("triton", reason="compares with the Triton kernels")
    x = torch.randn(3, 10, device=DEVICE)
    torch.testing.assert_close(swiglu(x, "triton"), swiglu(x, "torch"))


def test_swiglu_takes_the_gate_first():
    x = torch.randn(3, 8, dtype=torch.float64)
    torch.testing.assert_close(swiglu(x), F.silu(x[:, :4]) * x[:, 4:])


def test_joining_keeps_names_and_values_and_shares_memory(pair):
    before = [copy.deepcopy(part.state_dict()) for part in pair]
    assert joined_weight(*pair) is None
    join_weights(*pair)
    for part, state in zip(pair, before, strict=True):
        assert part.state_dict().keys() == state.keys()
        assert torch.equal(part.weight, state["weight"])
        assert part.weight.is_contiguous()
    rows = joined_weight(*pair)
    assert torch.equal(rows, torch.cat([part.weight for part in pair]))
    pair[1].load_state_dict({"weight": torch.ones(5, 6)})  # in place
    assert torch.equal(joined_weight(*pair)[4:], torch.ones(5, 6, device=DEVICE))
    join_weights(*pair)
    assert joined_weight(*pair).data_ptr() == rows.data_ptr()


def test_whatever_parts_the_weights_is_noticed(pair):
    join_weights(*pair)
    for parted in (copy.deepcopy(pair), tuple(copy.deepcopy(part).double() for part in pair)):
        assert joined_weight(*parted) is None
    pair[0].weight.requires_grad_(True)
    assert joined_weight(*pair) is None
    pair[0].weight.requires_grad_(False)
    assert joined_weight(pair[0], nn.Sequential(pair[1])) is None
    assert joined_weight(pair[1], pair[0]) is None
    pair[0].weight = nn.Parameter(torch.zeros(4, 6, device=DEVICE), requires_grad=False)
    assert joined_weight(*pair) is None


def test_a_bias_has_no_place_in_the_joined_product():
    pair = [nn.Linear(6, 4, bias=has_bias).requires_grad_(False) for has_bias in (False, True)]
    join_weights(*pair)
    assert joined_weight(*pair) is None
