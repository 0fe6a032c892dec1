from dataclasses import fields, replace

import pytest
import torch

from bench import switches
from bench.limits import Limits
from bench.ours import Shapes, batches
from bench.switches import ALL_OFF, Curve, Switches, each_off, movement, train
from losses.settings import LossSettings

MOST_GAP = 2e-5
"""Of the loss, in fp32."""


def test_all_on_and_all_off_give_the_same_curve() -> None:
    shapes = Shapes.of(tiny=True)
    fed = batches(shapes, torch.device("cpu"), 3, 2)
    on, off = (train(shapes, one, fed, 12) for one in (Switches(), ALL_OFF))
    assert on.gap(off) < MOST_GAP
    assert movement(off.losses) > 50 * MOST_GAP  # it does train
    assert on.ms > 0


def test_every_flag_is_a_setting_and_each_is_off_once() -> None:
    for name, variant in each_off().items():
        assert getattr(variant, name) == getattr(ALL_OFF, name) != getattr(Switches(), name)
        assert replace(variant, **{name: getattr(Switches(), name)}) == Switches()
    assert len(each_off()) == len(fields(Switches))


def test_a_gap_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    def other(shapes: Shapes, variant: Switches, *_: int) -> Curve:
        return Curve([1.0, 0.5, 0.9 if variant.loss_kernels == LossSettings().loss_kernels else 0.4], 1.0)

    monkeypatch.setattr(switches, "train", other)
    monkeypatch.setattr(switches, "ALL_OFF", replace(ALL_OFF, loss_kernels="auto"))
    found = switches.measure(Limits("some chip", "2", 1e12, 1e11), tiny=True)
    assert not found.checks[0].is_met
    assert found.checks[0].value == pytest.approx(0.5 / 0.9)
