"""The benchmark of the InfoNCE runs, and refuses to time what is not the same loss."""

import pytest
import torch

from bench.limits import measure_limits
from bench.loss import check_parity, measure, reference, tiled


def test_it_runs_at_a_small_size_with_every_peer():
    found = measure(measure_limits(tiny=True), tiny=True)
    assert [row["embeddings"] for row in found.rows] == ["bfloat16"] * 4 + ["float32"] * 3
    assert all(row["ms"] > 0 for row in found.rows)
    assert len(found.checks) == 4


def test_another_loss_is_noticed():
    cpu = torch.device("cpu")

    def other(*inputs):
        return tiled(32, cpu, False)(*inputs) * 1.01

    check_parity(tiled(32, cpu, False), reference(32, cpu), 32, 16, torch.float32, cpu)
    with pytest.raises(RuntimeError, match="loss off by"):
        check_parity(other, reference(32, cpu), 32, 16, torch.float32, cpu)
