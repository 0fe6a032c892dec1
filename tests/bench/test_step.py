import json
import time

import pytest

from bench import step
from bench.findings import Findings
from bench.limits import Limits
from bench.ours import Shapes
from bench.step import compare, run_side

LIMITS = Limits("some chip", "2", matrix_flops=1e13, copy_bytes=1e12)


def line(clips: int, seconds: float) -> dict[str, float]:
    tokens = {"audio_tokens": 80.0 * clips, "text_tokens": 10.0 * clips}
    return {"clips": clips, "seconds": seconds, "seconds_in_a_row": seconds, "steps": 20, "peak_gib": 1.0,
            "captures": 0, "capture_s": 0.0, "waste": 0.01, **tokens}  # fmt: skip


def test_ratios_are_to_the_same_batch_and_to_tuneds_best() -> None:
    peers = [
        {"peer": kind, "clips": clips, "checkpointing": False, "steps": 9, "seconds": 1.0, "clips_per_s": rate,
         "peak_gib": 2.0}
        for kind, clips, rate in (("stock", 16, 10.0), ("tuned", 16, 25.0), ("tuned", 32, 40.0))
    ]  # fmt: skip
    peers.append({"peer": "tuned", "clips": 64, "checkpointing": True, "out_of_memory": True})
    found, shapes = Findings(""), Shapes.of(tiny=True)
    compare(found, shapes, LIMITS, [line(16, 0.016), line(32, 0.016), {"clips": 64, "out_of_memory": True}], peers)
    checks = {check.name: check.value for check in found.checks}
    assert checks["times stock at 16 clips"] == pytest.approx(100)
    assert checks["times tuned at 16 clips"] == pytest.approx(40)
    assert checks["best batch, times tuned's best"] == pytest.approx(2000 / 40)
    share = shapes.operations(80 * 32, 10 * 32) / 0.016 / 1e13
    assert checks["best batch, share of the matrix rate"] == pytest.approx(share)
    assert [row.get("ms") for row in found.rows][3::3] == ["out of memory", "out of memory"]


def test_no_peer_no_ratio() -> None:
    found = Findings("")
    compare(found, Shapes.of(tiny=True), LIMITS, [line(16, 0.016)], [])
    assert not any(check.is_met for check in found.checks if "times" in check.name)


def test_our_side_prints_a_line_a_size(capsys: pytest.CaptureFixture[str]) -> None:
    assert step.main(["--side", str(time.time()), "--clips", "2", "--tiny"]) == 0
    lines = [json.loads(one) for one in capsys.readouterr().out.splitlines()]
    assert [next(iter(one)) for one in lines] == ["built_after_s", "first_step_after_s", "clips"]
    assert lines[2]["seconds"] > 0
    assert lines[1]["first_step_after_s"] >= lines[0]["built_after_s"] > 0


def test_a_side_that_fails_or_hangs_still_tells_what_it_found() -> None:
    lines, failure = run_side(["-c", "print('{\"clips\": 1}'); raise SystemExit('no more')"], 60.0)
    assert (lines, failure) == ([{"clips": 1}], "no more")
    code = "import time; print('{\"clips\": 2}', flush=True); time.sleep(60)"
    lines, failure = run_side(["-c", code], 1.0)
    assert lines == [{"clips": 2}]
    assert failure.startswith("stopped after")
