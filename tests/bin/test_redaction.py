"""Secrets replaced and refused. (A whole run: test_canary.py.)"""

import pytest

from bin.redaction import redact, refuse_secrets, secret_values


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
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
