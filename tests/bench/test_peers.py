"""A peer's step at tiny shapes; that it computes what our step does is in test_peer_parity.py."""

from collections.abc import Callable

import pytest
import torch

from bench import peers
from bench.drawn import Drawn
from bench.ours import Shapes
from bench.peers import Peer, measure_peer, objective, pad_ids

CPU = torch.device("cpu")


def test_recipes_differ_as_described() -> None:
    stock, tuned = (Peer(kind, Shapes.of(tiny=True), CPU, torch.bfloat16) for kind in ("stock", "tuned"))
    for peer, dtype, dropout in ((stock, torch.float32, 0.1), (tuned, torch.bfloat16, 0.0)):
        adapters = {n: p for n, p in peer.named_parameters() if "lora_" in n}
        assert all(p.requires_grad and p.dtype == dtype for p in adapters.values())
        assert len(adapters) == 2 * 3 * 2 * 2, "A and B of q, k and v in two layers of both towers"
        dropouts = {m.p for n, m in peer.named_modules() if "lora_dropout" in n and isinstance(m, torch.nn.Dropout)}
        assert dropouts == ({dropout} if dropout else set())
    assert hasattr(stock.wrapped.base_model.model, "lm_head")
    assert not hasattr(tuned.wrapped.base_model.model, "lm_head")
    trained = {n for n, p in tuned.named_parameters() if p.requires_grad and "lora_" not in n}
    assert trained == {f"{side}_head.{leaf}" for side in ("audio", "text") for leaf in ("weight", "bias")}


def test_a_setting_is_measured_within_its_budget() -> None:
    shapes = Shapes.of(tiny=True)
    found = measure_peer(Peer("tuned", shapes, CPU, torch.float32), shapes, 1, True, budget_s=0.0)
    assert found["steps"] == 3
    assert found["clips_per_s"] == 1 / found["seconds"]


@pytest.mark.parametrize(("in_loop", "num_batches"), [(False, peers.NUM_BATCHES), (True, peers.WARMUP + 3)])
def test_batches_take_turns_or_are_made_for_each_step(in_loop, num_batches, monkeypatch) -> None:
    drawn = []

    def prepare(one: Drawn, *others: object) -> peers.Prepared:
        drawn.append(one)
        return make(one, *others)

    make: Callable[..., peers.Prepared] = peers.prepare
    monkeypatch.setattr(peers, "prepare", prepare)
    shapes = Shapes.of(tiny=True)
    measure_peer(Peer("tuned", shapes, CPU, torch.float32), shapes, 1, False, budget_s=0.0, in_loop=in_loop)
    assert len(drawn) == num_batches
    assert len({one.waves[0].sum().item() for one in drawn}) == num_batches


def test_objective_of_perfect_embeddings_is_near_zero() -> None:
    rows = torch.eye(4)
    owner_N = torch.tensor([0, 1, 2, 3])
    assert float(objective(rows, rows, rows, owner_N)) < 1e-4
    assert float(objective(rows, rows.flip(0), rows.flip(0), owner_N)) > 10


def test_padded_ids_hold_each_string() -> None:
    ids_NL, mask_NL = pad_ids(torch.tensor([2, 4]), 50, CPU)
    assert ids_NL.shape == (2, 4)
    assert mask_NL.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1]]
