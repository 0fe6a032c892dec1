"""How a program ends: one line for users, a traceback for the rest, and the exit code."""

import time

import pytest

from bin.ending import run_program, tell_error
from distributed.collectives import FailedOnRank0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EARMARK_TRACEBACK", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_canary_0123")


def test_a_users_error_is_one_line_and_others_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert tell_error("bin/x.py", ValueError("lr: got 0")) == 2
    assert capsys.readouterr().err == "bin/x.py: error: lr: got 0\n"
    assert tell_error("bin/x.py", OSError("no route to hf_canary_0123")) == 1
    told = capsys.readouterr().err
    assert told.endswith("OSError: no route to <HF_TOKEN>\n\n")


def test_other_ranks_leave_the_word_to_rank_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    waits: list[float] = []
    monkeypatch.setattr(time, "sleep", waits.append)
    monkeypatch.setenv("RANK", "1")
    assert tell_error("bin/x.py", FailedOnRank0("rank 0 failed: ValueError: lr")) == 2
    assert (waits, capsys.readouterr().err) == ([5], "")


def test_the_exit_code_is_the_programs_own_or_that_of_its_error(capsys: pytest.CaptureFixture[str]) -> None:
    def wrong() -> None:
        raise ValueError("k: got 0")

    def stopped() -> None:
        raise KeyboardInterrupt

    def asked_for_help() -> None:
        raise SystemExit(3)

    assert [run_program("bin/x.py", lambda code=code: code) for code in (None, 0, 1)] == [0, 0, 1]
    assert run_program("bin/x.py", stopped) == 130
    assert capsys.readouterr().err == ""
    assert run_program("bin/x.py", wrong) == 2
    assert capsys.readouterr().err == "bin/x.py: error: k: got 0\n"
    assert run_program("bin/x.py", lambda: 1 // 0) == 1
    assert "ZeroDivisionError" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_program("bin/x.py", asked_for_help)
