"""The attention benchmark, at tiny shapes."""

import json

import pytest
import torch

from bench import attention as bench
from bench.findings import run_alone
from bench.limits import measure_limits


def test_it_runs_and_tells_what_it_found(tmp_path, capsys):
    assert run_alone(bench.measure, ["--tiny", "--json", str(tmp_path / "found.json")]) == 0
    rows = json.loads((tmp_path / "found.json").read_text())["rows"]
    assert {row["pack"] for row in rows} == {"text tiny", "audio tiny"}
    assert "gradient error" in capsys.readouterr().out


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(bench, "distance", lambda *_: 1.0)
    with pytest.raises(RuntimeError, match=r"text tiny, .*: off by 1"):
        bench.measure(measure_limits(tiny=True), tiny=True)


def test_the_limit_counts_the_pairs_that_are_seen():
    pack = bench.Pack("", bench.Heads(1, 1, 16), [2, 3], True)
    limits = measure_limits(tiny=True)
    operations, num_bytes = 2 * (3 + 6) * 16 * 2, 2 * 5 * (48 + 16)
    assert bench.least_seconds(pack, limits, backward=False) == limits.least_seconds(operations, num_bytes)


def test_packs_are_as_long_as_they_should_be():
    by_name = {pack.name: pack for pack in bench.packs()}
    assert 18_000 < sum(by_name["audio 256"].lengths) < 24_000
    assert 2_000 < sum(by_name["text 256"].lengths) < 3_000
    assert max(by_name["text 256"].lengths) <= 16


@pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU more backends run")
def test_only_what_runs_here_is_tried():
    assert list(bench.backends(torch.device("cpu"))) == ["sdpa"]
