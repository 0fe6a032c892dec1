"""Secrets replaced and refused; one line for users, a traceback for the rest. (A whole run: test_canary.py.)"""

import time

import pytest

from bin.redaction import redact, refuse_secrets, secret_values, tell_error
from distributed.collectives import FailedOnRank0


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EARMARK_TRACEBACK", raising=False)
    for name, value in (
        ("HF_TOKEN", "hf_canary_0123"),
        ("MY_SECRET", "short"),
        ("RUNS", "/data/runs/long"),
        ("TIKTOKEN_CACHE_DIR", "/data/runs/long"),
    ):
        monkeypatch.setenv(name, value)


def test_only_what_is_called_secret_is_replaced() -> None:
    assert redact("https://u:hf_canary_0123@x short /data/runs/long") == "https://u:<HF_TOKEN>@x short /data/runs/long"
    assert not {"RUNS", "TIKTOKEN_CACHE_DIR", "MY_SECRET"} & set(secret_values().values())


def test_settings_with_a_secret_are_refused() -> None:
    refuse_secrets({"runs_dir": "/data/runs/long", "lr": 0.1})
    with pytest.raises(ValueError, match="model_name holds the value of HF_TOKEN"):
        refuse_secrets({"model_name": "https://hf_canary_0123@hub"})


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
