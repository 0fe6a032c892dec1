"""The load benchmark at a small size over a real server, and that it would notice a mix-up."""

import json
from pathlib import Path

import pytest

from bench.serve import Answer, main, make_bodies, num_mixed_up
from tests.retrieval.small_models import write_full_model


def test_a_few_requests_are_answered_and_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = write_full_model(tmp_path / "run", seed=1)
    (tmp_path / "g.txt").write_text("voicemail\npound key\nmailbox\n")
    flags = ["--model", str(model), "--glossary", str(tmp_path / "g.txt"), "--device", "cpu"]
    assert main([*flags, "--requests", "30", "--alone", "5", "--out", str(tmp_path / "s.json")]) == 0
    figures = json.loads((tmp_path / "s.json").read_text())
    assert (figures["statuses"], figures["mixed_up"]) == ({"200": 30}, 0)
    assert "30 at once" in capsys.readouterr().out


def test_a_mix_up_is_noticed() -> None:
    mine, other = Answer(200, 0.1, {"a": 0.5, "b": 0.2}), Answer(200, 0.1, {"a": 0.4, "b": 0.3})
    close, refused = Answer(200, 0.2, {"a": 0.50001, "c": 0.2}), Answer(503, 0.1, {})
    assert num_mixed_up([mine, mine, mine], [mine, close, refused], 1e-4) == 0
    assert num_mixed_up([mine, other], [other, mine], 1e-4) == 2
    assert num_mixed_up([mine], [Answer(200, 0.1, {})], 1e-4) == 1


def test_bodies_are_clips_of_their_own() -> None:
    bodies = make_bodies(20)
    assert len(set(bodies)) == 20
    assert all(16_000 <= len(body) < 64_000 and len(body) % 2 == 0 for body in bodies)
