"""The search benchmark at a small size: all ways find the same, the figures are there, a wrong way is found out."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import bench.search
from bench.search import main, measure, random_units, time_in_turn, ways_to_search


def test_every_peer_finds_the_same_and_the_report_is_whole(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = ["--sizes", "3000", "--batches", "1", "4", "--dim", "32", "--rounds", "2", "--threads", "1"]
    assert main([*flags, "--out", str(tmp_path / "search.json")]) == 0
    rows = json.loads((tmp_path / "search.json").read_text())["rows"]
    assert [(row["terms"], row["batch"]) for row in rows] == [(3000, 1), (3000, 4)]
    for row in rows:
        assert all(row[f"{name}_ms"] > 0 for name in ("ours", "faiss", "torch"))
        assert row["x_faiss"] == pytest.approx(row["faiss_ms"] / row["ours_ms"], abs=0.01)
    assert "x faiss" in capsys.readouterr().out


def test_a_way_that_finds_other_terms_is_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(*args):  # type: ignore[no-untyped-def]
        ways = ways_to_search(*args)
        return ways | {"faiss": lambda: np.zeros_like(ways["ours"]())}

    monkeypatch.setattr(bench.search, "ways_to_search", wrong)
    with pytest.raises(RuntimeError, match="faiss finds other terms"):
        measure("cpu", 500, 2, 8, 3, rounds=1, threads=1)


def test_ways_take_turns() -> None:
    order: list[str] = []
    ways = {name: lambda name=name: order.append(name) for name in ("a", "b")}
    times = time_in_turn(ways, rounds=2, warm_up=1)  # type: ignore[arg-type]
    assert order == ["a", "b"] * 3
    assert [len(taken) for taken in times.values()] == [2, 2]


def test_rows_are_units_whatever_the_number() -> None:
    rows = random_units(7, 16, seed=3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(7))
    assert torch.equal(rows, random_units(7, 16, seed=3))
