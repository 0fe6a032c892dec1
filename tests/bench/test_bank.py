"""The benchmark of the sweep runs, and refuses to time what finds something else."""

import pytest
import torch

from bench.bank import check_parity, measure
from bench.limits import measure_limits


def test_it_runs_at_a_small_size():
    found = measure(measure_limits(tiny=True), tiny=True)
    assert [row["way"] for row in found.rows] == ["ours", "dense", "dense bf16"]
    assert len(found.checks) == 1


def test_other_results_are_noticed():
    same = (torch.ones(3), torch.ones(3, 4), torch.ones(3, 2))
    check_parity(same, same)
    with pytest.raises(RuntimeError, match="top cosines"):
        check_parity(same, (torch.ones(3), torch.ones(3, 4), torch.zeros(3, 2)))
