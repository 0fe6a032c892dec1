"""The two-pass step has the gradient of the step in one pass, dropout and all."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from distributed.bigbatch import TwoPass, chunk_bounds

NUM_ROWS, WIDTH = 7, 5


class Net(nn.Module):
    """Two kinds of rows, dropout of both of torch's kinds, and a count of forward passes."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(3, WIDTH).double(), nn.Linear(WIDTH, WIDTH).double()
        self.num_passes = 0

    def forward(self, x_R3: Tensor) -> tuple[Tensor, Tensor]:
        self.num_passes += 1
        hidden = nn.functional.dropout(self.first(x_R3).tanh(), 0.3)
        keep = torch.empty(hidden.shape).bernoulli_(0.7)
        return self.second(hidden * keep), hidden


def step(num_chunks: int, num_kept: int) -> tuple[dict[str, Tensor], Tensor, int]:
    """Gradients, the random state after the step, and the number of forward passes."""
    net = Net()
    x_B3 = torch.randn(NUM_ROWS, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(2)
    encoders = [lambda a=a, b=b: net(x_B3[a:b]) for a, b in chunk_bounds([1] * NUM_ROWS, num_chunks)]
    two_pass = TwoPass(encoders, num_kept)
    rows_BE, hidden_BE = two_pass.rows
    loss = (rows_BE @ rows_BE.T).logsumexp(1).sum() + (hidden_BE.sum(0) ** 2).sum()
    loss.backward()
    two_pass.finish()
    return {n: p.grad for n, p in net.named_parameters()}, torch.get_rng_state(), net.num_passes


@pytest.mark.parametrize("num_chunks", [1, 2, 3, 7, 9])
@pytest.mark.parametrize("num_kept", [0, 1, 2])
def test_gradients_and_random_numbers_are_those_of_one_pass(num_chunks: int, num_kept: int) -> None:
    expected, state, _ = step(num_chunks, num_kept=num_chunks)  # the same chunks, so the same dropout, all kept
    found, found_state, num_passes = step(num_chunks, num_kept)
    assert torch.equal(found_state, state)
    assert num_passes == 2 * num_chunks - min(num_kept, num_chunks)
    for name, value in expected.items():
        assert float(value.abs().max()) > 1e-3
        torch.testing.assert_close(found[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_the_dropout_of_the_second_pass_matters() -> None:
    """Else the test above would pass without any random state."""
    torch.manual_seed(5)
    net, x_B3 = Net(), torch.randn(4, 3, dtype=torch.float64)
    assert not torch.equal(net(x_B3)[0], net(x_B3)[0])


def test_rows_without_a_gradient_are_left_alone() -> None:
    """A side with nothing in it gives rows that need none, and a loss may ignore a kind."""
    weight = torch.ones(2, requires_grad=True)
    two_pass = TwoPass([lambda: (weight[None] * 1, torch.zeros(0, 2)) for _ in range(3)])
    assert [tuple(part.shape) for part in two_pass.rows] == [(3, 2), (0, 2)]
    two_pass.rows[0].sum().backward()
    two_pass.finish()
    assert weight.grad.tolist() == [3, 3]
    two_pass.finish()
    assert weight.grad.tolist() == [3, 3], "a second finish does nothing"


def test_chunks_are_as_equal_as_can_be() -> None:
    assert chunk_bounds([1] * 7, 3) == [(0, 2), (2, 4), (4, 7)]
    assert chunk_bounds([1], 3) == [(0, 0), (0, 0), (0, 1)]
    assert chunk_bounds([], 1) == [(0, 0)]
    assert chunk_bounds([], 2) == [(0, 0), (0, 0)]
    assert chunk_bounds([9, 9, 9, 3, 3, 3, 3, 3, 3, 9], 3) == [(0, 2), (2, 6), (6, 10)]
    assert chunk_bounds([50, 1, 1], 2) == [(0, 0), (0, 3)], "what cannot be divided stays whole"


@settings(deadline=None)
@given(weights=st.lists(st.integers(1, 40), max_size=60), num_chunks=st.integers(1, 9))
def test_no_chunk_weighs_more_than_its_share_and_one_item(weights: list[int], num_chunks: int) -> None:
    bounds = chunk_bounds(weights, num_chunks)
    assert len(bounds) == num_chunks
    assert [i for start, stop in bounds for i in range(start, stop)] == list(range(len(weights)))
    for start, stop in bounds:
        assert sum(weights[start:stop]) <= sum(weights) / num_chunks + max(weights, default=0)
