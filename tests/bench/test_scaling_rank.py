import json
from pathlib import Path

import pytest
import torch

from bench import scaling_rank
from distributed.processes import World

ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)


def test_one_rank_is_checked_and_timed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scaling_rank.run(ALONE, [3], tmp_path, tiny=True)
    *checks, side = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(check["check"].startswith("fp32, ") for check in checks)
    assert len(checks) == 4
    assert (side["side"], side["ranks"], side["clips"], side["sent"], side["expected"]) == ("ours", 1, 3, 0, 0)
    assert side["seconds"] > 0


def test_a_rank_that_fails_says_why_in_a_line_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("RANK", "3")  # alone, an environment that cannot be right
    with pytest.raises(ValueError, match="WORLD_SIZE"):
        scaling_rank.main(["--device", "cpu", "--clips", "2", "--kept", str(tmp_path), "--tiny"])
    assert json.loads(capsys.readouterr().out)["error"].startswith("rank 3: ValueError: the environment has RANK")
