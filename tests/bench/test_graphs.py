"""Both parts run on the CPU at small shapes, where packs are filled up and nothing is captured."""

import pytest

from bench import graphs


def test_parity_of_padded_and_plain_steps(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--clips", "5", "--shapes", "tiny", "--device", "cpu", "--steps", "3", "--batches", "2"]
    assert graphs.main(["parity", *small]) == 0
    printed = capsys.readouterr().out
    assert "cosine 1.0000000" in printed
    assert printed.count("largest difference 0.0000") == 2


def test_speed_prints_a_line_a_size_and_mode(capsys: pytest.CaptureFixture[str]) -> None:
    small = ["--clips", "2", "3", "--shapes", "tiny", "--device", "cpu", "--steps", "2", "--batches", "1"]
    assert graphs.main(["speed", *small]) == 0
    lines = [line.split()[:2] for line in capsys.readouterr().out.splitlines()[2:]]
    assert lines == [["2", "graphed"], ["2", "eager"], ["3", "graphed"], ["3", "eager"]]
