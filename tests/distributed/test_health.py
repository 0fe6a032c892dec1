"""Non-finite steps and parameters that get no gradient."""

import math

import pytest
import torch
from torch import nn

from distributed import gradsync
from distributed.health import ArrivingGradients, NonFiniteGuard, nonfinite_gradients


def test_a_non_finite_norm_is_reported_and_spreads_no_nan():
    params = [nn.Parameter(torch.zeros(2)) for _ in range(2)]
    params[0].grad, params[1].grad = torch.tensor([1.0, math.inf]), torch.tensor([3.0, 4.0])
    assert gradsync.clip_gradients(params, 1.0).item() == math.inf
    assert params[1].grad.tolist() == [3.0, 4.0]
    assert nonfinite_gradients([("a", params[0]), ("b", params[1])]) == ["a"]
    with pytest.raises(ValueError, match="max_norm is 0"):
        gradsync.clip_gradients(params, 0)


def test_guard_lets_a_few_steps_go_then_names_the_culprit(caplog):
    guard = NonFiniteGuard(3)
    assert guard.check(1, loss=1.0, grad_norm=2.0)
    assert not guard.check(2, loss=math.nan, grad_norm=2.0)
    assert not guard.check(3, loss=1.0, grad_norm=math.inf)
    assert guard.check(4, loss=1.0, grad_norm=2.0)  # the count starts anew
    for step in (5, 6):
        assert not guard.check(step, loss=math.nan)
    assert "step 6 is skipped: loss is nan (2 in a row)" in caplog.text
    with pytest.raises(RuntimeError, match=r"grad_norm is inf at step 7: 3 such steps in a row"):
        guard.check(7, loss=1.0, grad_norm=math.inf)
    assert guard.num_skipped == 5


def test_missing_gradients_are_named_but_zeros_and_frozen_are_fine():
    params = {name: nn.Parameter(torch.zeros(2)) for name in ("zeros", "none", "frozen", "before")}
    params["frozen"].requires_grad_(False)
    params["before"].sum().backward()
    for param in params.values():
        param.grad = torch.zeros(2)  # a buffer that is always there says nothing
    arriving = ArrivingGradients(params.items())
    (params["zeros"] * 0).sum().backward()
    assert arriving.missing() == ["none", "before"]
    assert not params["zeros"]._post_accumulate_grad_hooks
