"""Clipping, missing gradients and the parameter hash in one process. What needs other ranks: checks_sync.py."""

import pytest
import torch
from torch import nn

from distributed import gradsync


def test_clip_matches_torch():
    for scale in (1e-3, 1e3):
        ours, theirs = nn.Linear(4, 3), nn.Linear(4, 3)
        for model in (ours, theirs):
            for i, param in enumerate(model.parameters()):
                param.grad = torch.linspace(-1, 2, param.numel()).view_as(param) * (i + 1) * scale
        norm = gradsync.clip_gradients(ours.parameters(), 1.0)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 1.0))
        for own, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(own.grad, other.grad)


def test_clip_accumulates_bf16_gradients_in_fp32():
    param = nn.Parameter(torch.zeros(100_000, dtype=torch.bfloat16))
    param.grad = torch.ones_like(param)
    norm = gradsync.clip_gradients([param])
    assert norm.dtype == torch.float32
    assert norm.item() == pytest.approx(100_000**0.5, rel=1e-5)


def test_sync_fills_missing_gradients_with_one_rank_too():
    model = nn.Linear(2, 2)
    gradsync.sync_gradients(model.parameters())
    assert not model.weight.grad.any()


def test_parameter_hash_sees_every_bit_dtype_and_name():
    one = {"a": torch.zeros(3), "b": torch.ones(2)}
    reference = gradsync.parameter_hash(one.items())
    assert gradsync.parameter_hash(reversed(one.items())) == reference
    others = [
        one | {"a": torch.tensor([0.0, -0.0, 0.0])},
        one | {"a": torch.zeros(3, dtype=torch.int32)},
        one | {"a": torch.zeros(3, 1)},
        {"a": one["a"], "c": one["b"]},
    ]
    assert reference not in {gradsync.parameter_hash(other.items()) for other in others}
    gradsync.parameter_hash([("scalar", torch.tensor(1.0)), ("half", torch.ones(2, dtype=torch.bfloat16))])
