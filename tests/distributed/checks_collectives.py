"""Checks that run in every rank: collectives. See ranks.py."""

import math

import pytest
import torch

from distributed import collectives as c


def _rows(counts, width, seed):
    """Every rank's rows, the same on all ranks: the one-process truth."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(n, width, generator=generator, dtype=torch.float64) for n in counts]


def _share(rank, own_RE, gathered_GE):
    """A loss share that is neither linear nor the same on every rank."""
    return (rank + 1) * ((own_RE @ gathered_GE.T).tanh().sum() + (gathered_GE**3).sum())


def gradients_equal_one_process(world, folder):
    for counts in ([3, 5, 2, 4], [2, 0, 3, 1], [0, 4, 0, 0], [2, 2, 2, 2]):
        counts = counts[: world.world_size]
        truth = [x.requires_grad_() for x in _rows(counts, 6, seed=1)]
        all_GE = torch.cat(truth)
        sum(_share(r, truth[r], all_GE) for r in range(world.world_size)).backward()

        own_RE = truth[world.rank].detach().clone().requires_grad_()
        gathered_GE = c.gather_rows(own_RE, counts)
        assert gathered_GE.dtype == torch.float64
        assert torch.equal(gathered_GE, all_GE)
        _share(world.rank, own_RE, gathered_GE).backward()
        torch.testing.assert_close(own_RE.grad, truth[world.rank].grad, rtol=1e-13, atol=1e-13)


def blocks_of_unequal_width_share_one_collective(world, folder):
    counts = [[2, 0, 1, 3][: world.world_size], [1, 4, 0, 2][: world.world_size], [0] * world.world_size]
    truth = [
        [x.requires_grad_() for x in _rows(n, w, seed)] for n, w, seed in zip(counts, (3, 5, 2), (1, 2, 3), strict=True)
    ]
    own = [block[world.rank].detach().clone().requires_grad_() for block in truth]
    gathered = c.gather_row_blocks(own, counts)
    assert [tuple(g.shape) for g in gathered] == [(sum(n), w) for n, w in zip(counts, (3, 5, 2), strict=True)]
    wholes = [torch.cat(block) for block in truth]
    for block, whole in zip(gathered, wholes, strict=True):
        assert torch.equal(block, whole)
    # only one of the blocks enters this loss: the other's gradient is zeros, on every rank
    (gathered[0] ** 2).sum().mul(world.rank + 1).backward()
    (wholes[0] ** 2).sum().mul(sum(range(1, world.world_size + 1))).backward()
    torch.testing.assert_close(own[0].grad, truth[0][world.rank].grad)
    assert own[1].grad is not None
    assert not own[1].grad.any()


def a_rank_whose_rows_need_no_gradient_still_joins_the_backward_pass(world, folder):
    counts = [0] + [2] * (world.world_size - 1)
    own_RE = torch.ones(counts[world.rank], 3, requires_grad=world.rank > 0)
    c.gather_rows(own_RE, counts).sum().backward()
    if world.rank:
        assert torch.equal(own_RE.grad, torch.full((2, 3), float(world.world_size)))


def bf16_wire_rounds_forward_only(world, folder):
    counts = [2] * world.world_size
    own_RE = (torch.arange(6.0).reshape(2, 3) / 7 + world.rank).requires_grad_()
    gathered_GE = c.gather_rows(own_RE, counts, torch.bfloat16)
    assert gathered_GE.dtype == torch.float32
    own_part = gathered_GE[2 * world.rank : 2 * world.rank + 2]
    assert torch.equal(own_part, own_RE.detach().bfloat16().float())  # a rank's own rows are rounded like the others'
    weight = 1 + 2**-12  # bf16 would drop it
    (gathered_GE * weight).sum().backward()
    assert torch.equal(own_RE.grad, torch.full((2, 3), weight * world.world_size))


def no_grad_and_inference_gathers_work(world, folder):
    with torch.no_grad():
        rows_GE = c.gather_rows(torch.full((1, 2), float(world.rank)), [1] * world.world_size)
    assert rows_GE[:, 0].tolist() == list(range(world.world_size))
    assert not rows_GE.requires_grad


def ints_of_any_length(world, folder):
    ranks = range(world.world_size)
    first, second, third = c.gather_int_arrays(
        [torch.arange(world.rank), torch.tensor([-(2**62) + world.rank]), torch.tensor([], dtype=torch.int64)]
    )
    assert (first[0].tolist(), first[1]) == ([i for r in ranks for i in range(r)], list(ranks))
    assert (second[0].tolist(), second[1]) == ([-(2**62) + r for r in ranks], [1] * world.world_size)
    assert (third[0].tolist(), third[1]) == ([], [0] * world.world_size)
    values, counts = c.gather_ints(torch.full((2,), world.rank))
    assert (values.tolist(), counts) == ([r for r in ranks for _ in range(2)], [2] * world.world_size)


def agreement_keeps_nan_and_needs_the_same_names(world, folder):
    last = world.world_size - 1
    agreed = c.agree(
        stop=world.rank == last, step=world.rank, below=-5.0 - world.rank, loss=math.nan if world.rank == last else 1.0
    )
    assert (agreed["stop"], agreed["step"], agreed["below"]) == (1.0, last, -5.0)
    assert math.isnan(agreed["loss"])  # a bare MAX all-reduce drops it on gloo
    assert c.agree(worst=math.inf if world.rank == 0 else 0.0) == {"worst": math.inf}
    with pytest.raises(ValueError, match="different names"):
        c.agree(**{f"name{world.rank}": 1.0})
    assert c.sum_over_ranks(a=0.5, b=world.rank) == {"a": 0.5 * world.world_size, "b": sum(range(world.world_size))}


def json_travels_without_pickle(world, folder):
    assert c.gather_json({"rank": world.rank, "é": "x" * world.rank}) == [
        {"rank": r, "é": "x" * r} for r in range(world.world_size)
    ]
    assert c.broadcast_json({"from": world.rank, "text": "žluť" * 50}) == {"from": 0, "text": "žluť" * 50}
    with pytest.raises(ValueError, match="JSON"):
        c.gather_json(math.nan)  # refused on every rank before anything is sent


def failure_on_rank_0_reaches_all(world, folder):
    assert c.on_rank_0(lambda: [world.rank]) == [0]

    def fail():
        raise FileNotFoundError("no such glossary")

    with pytest.raises(FileNotFoundError if world.rank == 0 else RuntimeError, match="no such glossary"):
        c.on_rank_0(fail)
    with pytest.raises(TypeError if world.rank == 0 else RuntimeError, match="serializable"):
        c.on_rank_0(lambda: object())
    c.barrier()
