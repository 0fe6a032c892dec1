"""Without a process group each collective is the identity. What needs other ranks: checks_collectives.py."""

import logging
import math

import pytest
import torch

from distributed import collectives


def test_collectives_are_the_identity():
    x_RE = torch.ones(2, 3, requires_grad=True)
    assert collectives.gather_rows(x_RE, [2], torch.bfloat16) is x_RE
    values, counts = collectives.gather_ints(torch.tensor([4, 5]))
    assert (values.tolist(), counts) == ([4, 5], [2])
    agreed = collectives.agree(stop=False, loss=math.nan)
    assert agreed["stop"] == 0
    assert math.isnan(agreed["loss"])
    assert collectives.sum_over_ranks(n=3) == {"n": 3.0}
    assert collectives.gather_json({"a": 1}) == [{"a": 1}]
    assert collectives.broadcast_json([1]) == [1]
    with pytest.raises(KeyError):
        collectives.on_rank_0(lambda: {}["missing"])
    collectives.barrier()


def test_packages_configure_no_logging():
    assert not logging.getLogger("distributed").handlers
