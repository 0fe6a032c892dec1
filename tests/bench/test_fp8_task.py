"""Towers are made, both kinds of product train on them, and what is said of the curves is true of them."""

import numpy as np
import pytest
import torch

from bench.findings import Findings
from bench.fp8_task import compare, curve, measure
from bench.limits import Limits


def test_a_curve_is_the_means_of_whole_stretches() -> None:
    np.testing.assert_allclose(curve([1.0, 3.0, 2.0, 4.0, 9.0], 2), [2.0, 3.0])


@pytest.mark.parametrize(("off", "is_met"), [(0.1, True), (0.4, False)])
def test_fp8_may_be_as_far_off_as_another_seed(off: float, is_met: bool) -> None:
    runs = {
        "bf16, seed 0": [2.0, 1.0], "bf16, seed 1": [2.1, 1.1], "bf16, seed 2": [1.7, 0.7],
        "fp8, seed 0": [2.0 + off, 1.0 - off],
    }  # fmt: skip
    found = Findings("")
    compare(found, runs, 1)
    (check,) = found.checks
    assert check.value == pytest.approx(off / 0.2)
    assert check.is_met == is_met
    assert [row["off the first"] for row in found.rows] == pytest.approx([0.0, 0.1, 0.3, off])
    assert found.rows[0]["to 2"] == 1.0


@pytest.mark.skipif(torch.cuda.is_available(), reason="the full program runs on a GPU")
def test_both_kinds_train_from_one_start() -> None:
    found = measure(Limits("CPU", "2", 1e12, 1e11), tiny=True)
    first, other, ours = ([row["to 2"], row["to 4"]] for row in found.rows)
    assert first != ours, "nothing was quantised"
    assert ours == pytest.approx(first, abs=0.2)
    assert other != first
