import json
from pathlib import Path

import pytest
import torch

from bench import scaling_rank
from bench.scaling_rank import against_one_rank, compare, run
from distributed.processes import World

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)
PAIR = World(0, 2, 0, torch.device("cpu"), "gloo", 0)


def test_one_rank_keeps_its_gradients_for_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(ALONE, [3], tmp_path, tiny=True)
    *checks, side = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    kinds = ["plain", "flat", "after 4 steps", "after 4 steps, their way"]
    assert [(check["check"], check["difference"]) for check in checks] == [(f"fp32, {kind}", 0.0) for kind in kinds]
    assert (side["side"], side["ranks"], side["clips"], side["sent"], side["expected"]) == ("ours", 1, 3, 0, 0)
    assert side["seconds"] > 0
    kept = scaling_rank.read_tensors(tmp_path / "fp32, flat.safetensors")
    assert {"log_inv_temperature", "audio_head.weight"} <= kept.keys()
    found = against_one_rank(tmp_path, "fp32, flat", PAIR, {name: 1.01 * value for name, value in kept.items()})
    assert found["difference"] == pytest.approx(0.01, rel=1e-3)
    assert found["within_a_tensor"] == pytest.approx(0.01, rel=1e-3)
    assert found["cosine"] == pytest.approx(1.0)
    assert against_one_rank(tmp_path, "never kept", PAIR, kept) == {}


def test_a_comparison_of_nothing_is_refused() -> None:
    with pytest.raises(AssertionError, match="a is zero"):
        compare({"a": torch.ones(2)}, {"a": torch.zeros(2)})
    with pytest.raises(AssertionError, match="b"):
        compare({"a": torch.ones(2)}, {"a": torch.ones(2), "b": torch.ones(2)})


def test_a_rank_that_fails_says_why_in_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")  # alone, an environment that cannot be right
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        scaling_rank.main(["--device", "cpu", "--clips", "2", "--kept", str(tmp_path), "--tiny"])
    assert json.loads(capsys.readouterr().out)["error"].startswith("rank 3: ValueError: the environment has RANK")
