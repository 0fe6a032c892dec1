"""Checks that run in every rank: gradient sync, parameter comparison, health. See ranks.py."""

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from distributed import gradsync
from distributed.flat import FlatParameters
from distributed.health import ArrivingGradients


class TwoTowers(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(7)
        self.audio = nn.Linear(5, 4)
        self.text = nn.Linear(3, 4)
        self.double()

    def forward(self, x_BF, y_BF):
        return (self.audio(x_BF) * self.text(y_BF)).sum()


def _data(rank):
    generator = torch.Generator().manual_seed(rank)
    return tuple(torch.randn(6, width, generator=generator, dtype=torch.float64) for width in (5, 3))


def parity_with_ddp(world, folder):
    """DDP averages whole losses; here each rank's loss is its share, 1 / world_size, and gradients are summed."""
    theirs = DistributedDataParallel(TwoTowers())
    theirs(*_data(world.rank)).backward()
    ours = TwoTowers()
    (ours(*_data(world.rank)) / world.world_size).backward()
    gradsync.sync_gradients(ours.parameters())
    for own, other in zip(ours.parameters(), theirs.module.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12)


def submodules_called_past_forward_are_synced(world, folder):
    """The old trainer's fault: encoders called on ddp.module, so that no hook fired and the ranks drifted."""
    x_BF, y_BF = _data(world.rank)

    def gradient(model, call):
        (call(model.audio(x_BF), model.text(y_BF)) / world.world_size).backward()
        return model.audio.weight.grad

    drifting = DistributedDataParallel(TwoTowers())
    local = gradient(drifting.module, lambda a, t: (a * t).sum())
    with pytest.raises(RuntimeError, match="differs"):
        gradsync.check_same_parameters([("audio.weight", local)])

    model = TwoTowers()
    gradient(model, lambda a, t: (a * t).sum())
    gradsync.sync_gradients(model.parameters())
    gradsync.check_same_parameters([("audio.weight", model.audio.weight.grad)])


def missing_gradients_count_as_zeros(world, folder):
    model = TwoTowers()
    arriving = ArrivingGradients(model.named_parameters())
    if world.rank == 1:
        model.audio(torch.ones(1, 5, dtype=torch.float64)).sum().backward()
    assert arriving.missing() == ["text.weight", "text.bias"]  # audio has one on some rank
    model.text.bias.requires_grad_(False)
    gradsync.sync_gradients(model.parameters())
    assert torch.equal(model.audio.weight.grad, torch.ones(4, 5, dtype=torch.float64))
    assert torch.equal(model.text.weight.grad, torch.zeros(4, 3, dtype=torch.float64))
    assert model.text.bias.grad is None


def mixed_dtypes_have_their_own_buffers(world, folder):
    params = [nn.Parameter(torch.zeros(3, dtype=d)) for d in (torch.float32, torch.bfloat16, torch.float64)]
    for param in params:
        param.grad = torch.full_like(param, world.rank + 1)
    gradsync.sync_gradients(params)
    for param in params:
        assert torch.equal(param.grad, torch.full_like(param, sum(range(1, world.world_size + 1))))


def flat_gradients_and_tail_are_summed_in_one_call(world, folder):
    model, reference = TwoTowers(), TwoTowers()
    named = list(model.named_parameters())
    flat = FlatParameters([named[:1], named[1:]], num_tail=3)
    for own in (model, reference):
        own(*_data(world.rank)).backward()
    flat.tail_X[1] = float("nan") if world.rank == 0 else 1.0
    flat.tail_X[2] = 1.0
    flat.sum_over_ranks()
    gradsync.sync_gradients(reference.parameters())
    for own, other in zip(model.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(own.grad, other.grad, rtol=1e-12, atol=1e-12)
    assert flat.tail_X[0] == 0.0
    assert flat.tail_X[1].isnan()
    assert flat.tail_X[2] == world.world_size
    torch.testing.assert_close(flat.gradient_norm(), gradsync.clip_gradients(reference.parameters()))


def differing_parameter_is_named_on_every_rank(world, folder):
    model = TwoTowers()
    gradsync.check_same_parameters(model.named_parameters())
    if world.rank == world.world_size - 1:
        with torch.no_grad():
            model.text.weight.view(-1)[3] += 1e-15
    with pytest.raises(RuntimeError, match=rf"parameter text\.weight differs.*ranks {world.world_size - 1} disagree"):
        gradsync.check_same_parameters(model.named_parameters())
