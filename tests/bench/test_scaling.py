from pathlib import Path
from typing import Any

import pytest

from bench import scaling
from bench.findings import Findings
from bench.scaling import launch, tabulate
from bench.scaling_parity import TO_FP32


def test_one_and_two_real_ranks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Bytes are those of the formula to the last one; gradients those of one rank, and DDP's."""
    lines = [line for ranks in (1, 2) for line in launch(ranks, [2], "cpu", True, tmp_path)]
    assert not [line for line in lines if "error" in line], lines
    found = Findings("")
    tabulate(found, lines, "cpu", num_cores=2)
    (check,) = found.checks
    assert check.is_met, check
    assert check.value > 0
    kinds = ["plain", "flat", "DDP", "after 4 steps", "after 4 steps, their way"]
    assert [x["check"] for x in lines if "check" in x and x["ranks"] == 2] == [f"fp32, {kind}" for kind in kinds]
    assert [(row["ranks"], row["side"]) for row in found.rows] == [(1, "ours"), (2, "ours"), (2, "DDP")]
    assert found.rows[1]["of formula"] == 1.0
    assert found.rows[1]["kB of ids"] > 0
    (ddp,) = [line for line in lines if line.get("check") == "fp32, DDP"]
    assert ddp["cosine"] > 1 - 1e-9
    assert any("share" in note for note in found.notes)


def line(side: str, ranks: int, seconds: float, clips: int = 16) -> dict[str, Any]:
    return {"side": side, "ranks": ranks, "clips": clips, "seconds": seconds, "recorded_s": seconds, "sent": 2e6,
            "ids_sent": 1e3, "least_s": 0.01 * seconds, "most_s": 0.02 * seconds, "peak_gib": 1.0,
            **({"expected": 1e6} if side == "ours" else {})}  # fmt: skip


def check(name: str, difference: float, cosine: float, ranks: int = 8) -> dict[str, Any]:
    return {"check": name, "ranks": ranks, "difference": difference, "within_a_tensor": 0.1, "temperature": 1e-3,
            "cosine": cosine}  # fmt: skip


CHECKS = [
    check("fp32, flat", 4e-7, 1.0), check("fp32, after 4 steps", 3e-7, 1.0),
    check("fp32, after 4 steps, their way", 0.1, 0.9), check("fp32, DDP", 0.2, 0.8),
    check("bf16, flat", 1e-2, 0.99995), check("bf16, after 4 steps", 1e-4, 0.9999999),
    check("bf16, after 4 steps, their way", 0.1, 0.99),
    check(TO_FP32, 0.1, 0.75, ranks=1), check(TO_FP32, 0.1, 0.5),
]  # fmt: skip
PARITY = {
    "N ranks and one, gradients and after steps, fp32": (4e-7, True),
    "cosine of N ranks and one, gradients and after steps, bf16": (0.99995, True),
}


def test_efficiency_is_against_the_own_side_with_one_rank() -> None:
    lines = [line("ours", 1, 0.10), line("ours, no graphs", 1, 0.20), line("ours", 8, 0.125),
             line("ours, no graphs", 8, 0.25),
             line("DDP", 8, 0.4)]  # fmt: skip
    lines += CHECKS
    found = Findings("")
    tabulate(found, lines, "cuda", num_cores=2)
    assert [row.get("of linear") for row in found.rows] == [None, None, *map(pytest.approx, (0.8, 0.8, 0.5))]
    assert found.rows[2]["x DDP"] == pytest.approx(0.4 / 0.125)
    assert found.rows[2]["in collectives"] == "1.0% to 2.0%"
    assert found.rows[2]["of formula"] == 2.0
    assert {check.name: (check.value, check.is_met) for check in found.checks} == {
        **PARITY,
        "of linear, 8 GPUs, 16 clips each": (pytest.approx(0.8), False),
    }


def test_of_ranks_that_share_a_gpu_no_speed_is_told() -> None:
    found = Findings("")
    tabulate(found, [line("ours", 1, 0.1), line("ours", 8, 0.8), line("DDP", 8, 1.0), *CHECKS], "cuda", 2, True)
    assert {check.name: (check.value, check.is_met) for check in found.checks} == PARITY
    assert not any({"of linear", "x DDP"} & row.keys() for row in found.rows)
    to_fp32 = [note for note in found.notes if note.startswith(TO_FP32)]
    assert [note.rpartition(" ")[2] for note in to_fp32] == ["2.5e-01", "5.0e-01"]  # of one rank, and of eight
    assert found.notes[-1] == "processes that share GPUs: their speed is no figure of merit"


def test_what_was_not_measured_meets_no_target(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scaling, "launch", lambda ranks, *_: [{"ranks": ranks, "error": "out of memory"}])
    monkeypatch.setattr(scaling.torch.cuda, "device_count", lambda: 2)
    found = scaling.measure_ranks(None, False, [2, 4], [16])
    assert not any(check.is_met for check in found.checks)
    assert found.notes == ["4 ranks left out: NCCL, 2 GPUs", "1 ranks ended early: out of memory",
                           "2 ranks ended early: out of memory"]  # fmt: skip
