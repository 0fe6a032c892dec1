"""bench/lora.py at a tiny size: it runs, agrees with PEFT, and would notice a peer that does not."""

import pytest
import torch

from bench.limits import measure_limits
from bench.lora import draw, make_sides, measure, require_parity, set_dropout


def test_measures_every_column():
    found = measure(measure_limits(tiny=True), tiny=True)
    assert len(found.rows) == 1
    assert all(value is not None for value in found.rows[0].values())
    assert {check.wanted for check in found.checks} == {"at least", "at most"}


def test_parity_is_required():
    device = torch.device("cpu")
    ours, theirs, *_ = make_sides(32, 4, device)
    x, grad = draw(9, 32, device)
    set_dropout(ours[1], theirs[1], 0.0)
    require_parity(ours[0].step(x, (grad,)), theirs[0].step(x, grad.split(32, dim=1)))
    with torch.no_grad():
        ours[1][2].lora_B.mul_(1.5)
    with pytest.raises(RuntimeError, match="PEFT disagrees"):
        require_parity(ours[0].step(x, (grad,)), theirs[0].step(x, grad.split(32, dim=1)))
