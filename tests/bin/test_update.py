"""The flat update against the plain one: same weights, same outcomes, the same skips; and reading late."""

import math

import pytest
import torch
from torch import Tensor, nn

from bin.update import FlatUpdate, Outcome, PlainUpdate, Update


def make(kind: type[FlatUpdate] | type[PlainUpdate], **more: bool) -> tuple[nn.Module, Update]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(7, 9), nn.Tanh(), nn.Linear(9, 3))
    named = list(model.named_parameters())
    groups = [
        {"params": [p for _, p in named if p.ndim > 1], "weight_decay": 0.1, "lr_scale": 1.0},
        {"params": [p for _, p in named if p.ndim <= 1], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    if kind is FlatUpdate:
        return model, FlatUpdate(groups, named, 1e-2, 0.98, **more)
    return model, PlainUpdate(groups, 1e-2, 0.98)


def run(model: nn.Module, update: Update, bad: tuple[int, ...] = (), steps: int = 8, late: bool = False):
    read: list[list[Outcome]] = []
    weights: list[Tensor] = []
    for step in range(steps):
        update.zero()
        generator = torch.Generator().manual_seed(step)
        loss = model(torch.randn(5, 7, generator=generator)).square().mean() * (1.0 + 100.0 * (step % 2))
        loss = loss * (math.nan if step in bad else 1.0)
        loss.backward()
        update.apply(step, {"loss": loss.detach(), "part": loss.detach() / 2}, step == 5, max_norm=0.5)
        read.append(update.outcomes(now=step == steps - 1))
        weights.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return read, weights


@pytest.mark.parametrize("bad", [(), (0, 3)])
def test_flat_and_plain_take_the_same_steps(bad: tuple[int, ...]) -> None:
    flat_read, flat_weights = run(*make(FlatUpdate), bad)
    plain_read, plain_weights = run(*make(PlainUpdate), bad)
    for step, (own, other) in enumerate(zip(flat_weights, plain_weights, strict=True)):
        torch.testing.assert_close(own, other, rtol=1e-5, atol=1e-6)
        before = run(*make(PlainUpdate), bad, steps=step)[1][-1] if step else None
        assert (before is not None and torch.equal(other, before)) == (step in bad and step > 0)
    for step, ((own,), (other,)) in enumerate(zip(flat_read, plain_read, strict=True)):
        assert own.step == other.step == step
        assert own.wants_stop is other.wants_stop is (step == 5)
        assert own.losses.keys() == {"loss", "part"}
        for ours, theirs in ((own.losses["loss"], other.losses["loss"]), (own.gradient_norm, other.gradient_norm)):
            assert ours == pytest.approx(theirs, rel=1e-5, nan_ok=True)
            assert math.isfinite(ours) == (step not in bad)


def test_a_skipped_step_leaves_weights_and_moments_as_they_were() -> None:
    model, update = make(FlatUpdate)
    run(model, update, steps=2)
    before = [state[key].clone() for state in update.optimizer.state.values() for key in ("step", "exp_avg")]
    run(model, update, bad=(0, 1), steps=2)
    after = [state[key] for state in update.optimizer.state.values() for key in ("step", "exp_avg")]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_a_large_loss_with_an_infinite_sum_is_skipped_too() -> None:
    model, update = make(FlatUpdate)
    update.zero()
    model(torch.ones(1, 7)).sum().backward()
    before = [p.detach().clone() for p in model.parameters()]
    update.apply(0, {"loss": torch.tensor(math.inf)}, False, 1.0)
    assert update.outcomes(now=True)[0].losses["loss"] == math.inf
    assert all(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


def test_late_reading_changes_when_and_not_what() -> None:
    at_once, weights = run(*make(FlatUpdate))
    late, late_weights = run(*make(FlatUpdate, reads_late=True))
    assert [[o.step for o in outcomes] for outcomes in late] == [[], [0], [1], [2], [3], [4], [5], [6, 7]]
    assert [o for outcomes in late for o in outcomes] == [o for outcomes in at_once for o in outcomes]
    assert torch.equal(weights[-1], late_weights[-1])
