"""Which form of the losses runs."""

import logging

import pytest
import torch

from losses import choice
from losses.choice import LossKernels, choose_kernels
from losses.settings import LossSettings

CPU, CUDA, F32 = torch.device("cpu"), torch.device("cuda"), torch.float32
LARGE, SMALL = 40_000, 100


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    choice.log_once.cache_clear()
    monkeypatch.setattr(choice, "has_triton", lambda: True)


@pytest.mark.parametrize(
    ("wanted", "device", "size", "expected"),
    [
        ("auto", CUDA, LARGE, LossKernels(tiled=True, triton=True)),
        ("auto", CUDA, SMALL, LossKernels(tiled=False, triton=False)),
        ("fused", CUDA, SMALL, LossKernels(tiled=True, triton=True)),
        ("dense", CUDA, LARGE, LossKernels(tiled=False, triton=False)),
        ("auto", CPU, SMALL, LossKernels(tiled=False, triton=False)),
        ("auto", CPU, LARGE, LossKernels(tiled=True, triton=False)),
        ("fused", CPU, SMALL, LossKernels(tiled=True, triton=False)),
    ],
)
def test_setting_device_and_size_decide(wanted, device, size, expected):
    assert choose_kernels(wanted, device, F32, size, size) == expected


def test_fp64_stays_with_torch_and_maxsim_with_its_matrices():
    assert choose_kernels("fused", CUDA, torch.float64, LARGE, LARGE) == LossKernels(tiled=True, triton=False)
    assert choose_kernels("fused", CUDA, F32, LARGE, LARGE, own_scores=True) == LossKernels(tiled=False, triton=True)


def test_without_triton_one_line_says_so(monkeypatch, caplog):
    monkeypatch.setattr(choice, "has_triton", lambda: False)
    caplog.set_level(logging.INFO, "losses.choice")
    for _ in range(3):
        assert choose_kernels("auto", CUDA, F32, LARGE, LARGE) == LossKernels(tiled=True, triton=False)
    assert len(caplog.records) == 1
    assert "triton is not installed" in caplog.text


def test_unknown_choice_is_refused():
    with pytest.raises(ValueError, match="loss_kernels is 'quick'; allowed: auto, fused, dense"):
        choose_kernels("quick", CPU, F32, 1, 1)
    with pytest.raises(ValueError, match="loss_kernels"):
        LossSettings(loss_kernels="quick")


def test_a_large_bank_is_searched_by_kernels():
    found = [choose_kernels("auto", CUDA, F32, 128, 200, num_bank=size) for size in (100_000, 2_000_000)]
    assert found == [LossKernels(tiled=False, triton=False), LossKernels(tiled=False, triton=True)]
