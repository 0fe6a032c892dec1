"""Impossible settings name their field; the wire follows the device."""

import math

import pytest
import torch

from distributed.settings import DistributedSettings


def test_settings_refuse_what_cannot_work():
    for field, value in {
        "collective_timeout_s": 0,
        "start_timeout_s": math.nan,
        "parameter_hash_every": -1,
        "max_nonfinite_steps": 0,
        "keep_checkpoints": 0,
    }.items():
        with pytest.raises(ValueError, match=rf"{field} is .*; allowed"):
            DistributedSettings(**{field: value})


def test_wire_dtype_follows_the_device():
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    assert DistributedSettings().wire_dtype(cpu) is None
    assert DistributedSettings().wire_dtype(cuda) is torch.bfloat16
    assert DistributedSettings(gather_dtype="full").wire_dtype(cuda) is None
    assert DistributedSettings(gather_dtype="bf16").wire_dtype(cpu) is torch.bfloat16
