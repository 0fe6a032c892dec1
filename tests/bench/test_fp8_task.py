"""What the comparison of curves says of curves; the runs themselves are bin/train.py's, tested as such."""

import numpy as np
import pytest

from bench.findings import Findings
from bench.fp8_task import compare, curve


def run_of(losses: list[float]) -> dict[str, object]:
    return {"loss": losses, "after": {"recall@10": 0.5}, "all_steps": {"clips_per_s_median": 10.0}}


def test_a_curve_is_the_means_of_whole_stretches() -> None:
    np.testing.assert_allclose(curve([1.0, 3.0, 2.0, 4.0, 9.0], 2), [2.0, 3.0])


@pytest.mark.parametrize(("off", "is_met"), [(0.1, True), (0.4, False)])
def test_fp8_may_be_as_far_off_as_another_seed(off: float, is_met: bool) -> None:
    runs = {
        "bf16, seed 0": run_of([2.0, 1.0]), "bf16, seed 1": run_of([2.1, 1.1]), "bf16, seed 2": run_of([1.7, 0.7]),
        "fp8, seed 0": run_of([2.0 + off, 1.0 - off]),
    }  # fmt: skip
    found = Findings("")
    compare(found, runs, 1)
    (check,) = found.checks
    assert check.value == pytest.approx(off / 0.2)
    assert check.is_met == is_met
    assert [row["off the first"] for row in found.rows] == pytest.approx([0.0, 0.1, 0.3, off])
    assert found.rows[0]["loss to 2"] == 1.0
