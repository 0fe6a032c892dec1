import torch

from bench.limits import Limits, measure_limits, seconds_of


def test_rates_are_measured_once() -> None:
    found = measure_limits(tiny=True)
    assert found.torch == torch.__version__
    assert found.matrix_flops > 1e8
    assert found.copy_bytes > 1e7
    assert measure_limits(tiny=True) is found


def test_the_longer_of_operations_and_bytes_bounds() -> None:
    limits = Limits("some chip", "2", matrix_flops=1e12, copy_bytes=1e9)
    assert limits.least_seconds(operations=2e12, bytes_moved=1e9) == 2.0
    assert limits.least_seconds(operations=1e12, bytes_moved=3e9) == 3.0
    assert limits.line() == "some chip, torch 2: matrix product 1 TFLOP/s, copy 1 GB/s"


def test_a_median_of_as_many_calls_as_asked_for() -> None:
    calls = []
    assert seconds_of(lambda: calls.append(0), torch.device("cpu"), count=5, warmup=2) >= 0
    assert len(calls) == 7
