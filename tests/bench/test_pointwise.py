"""The benchmark of the kernels at tiny sizes: every case's two ways agree, a wrong one is found out, rows are whole."""

import pytest
import torch

pytest.importorskip("triton", reason="the benchmark runs the Triton kernels")

import bench.pointwise
from bench.pointwise import HEADER, Case, Row, cases, check, measure


@pytest.fixture
def _tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"AUDIO_WIDTH": 24, "TEXT_WIDTH": 32, "TEXT_FFN": 48, "NUM_MELS": 8}
    sizes |= {"CLIP_SAMPLES": 2240, "CLIP_TOKENS": 7, "AUDIO_TOKENS": (21,), "TEXT_TOKENS": (16,)}
    sizes |= {"DEVICE": "cuda" if torch.cuda.is_available() else "cpu"}
    for name, value in sizes.items():
        monkeypatch.setattr(bench.pointwise, name, value)
    torch.manual_seed(0)


@pytest.mark.usefixtures("_tiny")
def test_every_case_agrees_with_torch_and_counts_its_bytes() -> None:
    seen = {}
    for case in cases():
        check(case)
        seen[case.name] = case.num_bytes
        assert case.floor()()[0].numel() > 0
    assert len(seen) == 12
    assert seen["sum and layer norm"] == 4 * 21 * 24 * 2
    assert seen["swiglu, backward"] == 5 * 16 * 48 * 2
    assert all(size > 0 for size in seen.values())


def test_a_result_that_differs_is_no_comparison() -> None:
    x = torch.ones(3)
    with pytest.raises(ValueError, match="wrong at 3 tokens: differs from torch"):
        check(Case("wrong", 3, 1, 6, lambda: (x,), lambda: (x + 1,)))


def test_without_a_gpu_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="needs a CUDA device"):
        measure()


def test_a_row_prints_rates_and_ratios() -> None:
    row = Row("step", 10, 20, 3_000_000, ours_us=2.0, torch_us=6.0, floor_us=1.0)
    assert (row.ratio, row.of_floor) == (3.0, 0.5)
    assert "1500" in row.line()
    assert len(row.line()) == len(HEADER)
