"""The stream benchmark at a small size, and its search for the most streams on a made-up clock."""

import json
from pathlib import Path

import numpy as np
import pytest

import bench.stream
from bench.stream import main, make_retriever, most_streams
from retrieval.retriever import Retriever


@pytest.fixture(scope="module")
def tiny() -> Retriever:
    return make_retriever("cpu", "tiny", 300)


def test_it_measures_one_and_many(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--device", "cpu", "--shapes", "tiny", "--terms", "300", "--rounds", "3", "--most", "2", "--threads", "1"]
    assert main([*flags, "--many_rounds", "1", "--compare_with_published", "--out", str(tmp_path / "s.json")]) == 0
    figures = json.loads((tmp_path / "s.json").read_text())
    assert 0 < figures["median_ms"] <= figures["p95_ms"] <= figures["worst_ms"]
    assert [one["streams"] for one in figures["tried"]] == [1, 2]
    shown = capsys.readouterr().out
    assert "chunk to terms: median" in shown
    assert "median 37-44 ms" in shown


@pytest.mark.parametrize(("limit", "most"), [(1, 64), (5, 64), (37, 64), (64, 64), (999, 50), (0, 64)])
def test_the_most_streams_are_found_to_an_eighth(
    tiny: Retriever, limit: int, most: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = lambda streams, rounds: np.full(rounds, 960.0 if len(streams) <= limit else 960.1)  # noqa: E731
    monkeypatch.setattr(bench.stream, "many_streams_ms", clock)
    tried = most_streams(tiny, 0.96, most, rounds=2)
    found = max((one["streams"] for one in tried if one["fits"]), default=0)
    true = min(limit, most)
    assert found <= true
    assert true - found <= max(0, true // 8)
    assert [one["streams"] for one in tried] == sorted({one["streams"] for one in tried})


def test_the_model_only_hears(tiny: Retriever) -> None:
    assert "language_model" not in dict(tiny.model.named_children())
    assert len(tiny.terms or ()) == 300
