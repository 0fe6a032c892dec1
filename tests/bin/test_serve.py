"""bin/serve.py as a program: who may reach it, a start from flags, a clean end by a signal."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest

from bin.serve import ServeLimits, main, read_token
from tests.bin.tones import ROOT, TERMS, environment
from tests.retrieval.small_models import tone


def test_only_loopback_needs_no_token(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("EARMARK_TOKEN", raising=False)
    for host in ("127.0.0.1", "localhost", "::1"):
        assert read_token(None, host) is None
    for host in ("0.0.0.0", "::", "192.168.1.5", "example.org"):
        with pytest.raises(ValueError, match=re.escape(f"host: got {host!r} without a token")):
            read_token(None, host)
    (tmp_path / "token").write_text("a token of enough characters\n")
    assert read_token(str(tmp_path / "token"), "0.0.0.0") == "a token of enough characters"
    monkeypatch.setenv("EARMARK_TOKEN", "another of enough characters")
    assert read_token(None, "0.0.0.0") == "another of enough characters"


@pytest.mark.parametrize(("content", "told"), [("short", "5 characters; allowed: 16 or more"), (" \n", "is empty")])
def test_useless_tokens_are_told_without_telling_them(tmp_path: Path, content: str, told: str) -> None:
    (tmp_path / "token").write_text(content)
    with pytest.raises(ValueError, match=told) as caught:
        read_token(str(tmp_path / "token"), "127.0.0.1")
    assert "short" not in str(caught.value).replace(str(tmp_path), "")
    with pytest.raises(ValueError, match="cannot be read"):
        read_token(str(tmp_path / "nowhere"), "127.0.0.1")


def test_limits_that_cannot_be_are_told() -> None:
    with pytest.raises(ValueError, match=re.escape("max_requests: got 0; allowed: above 0")):
        ServeLimits(max_requests=0)
    assert main(["--model", "/nowhere", "--index", "/nowhere"]) == 2


def test_it_serves_and_ends_by_a_signal(trained: Path, tones: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "bin" / "serve.py"), "--model", str(trained), "--port", str(port)]
    flags = ["--glossary", str(tones / "glossary.json"), "--device", "cpu"]
    program = subprocess.Popen([*command, *flags], cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        url = f"http://127.0.0.1:{port}"
        for _ in range(300):
            try:
                with urllib.request.urlopen(f"{url}/healthz", timeout=5) as answer:
                    assert json.load(answer)["status"] == "ok"
                    break
            except OSError:
                assert program.poll() is None, program.communicate()[1]
                time.sleep(0.1)
        body = tone(440).astype("<i2").tobytes()
        with urllib.request.urlopen(f"{url}/v1/retrieve?format=pcm&k=99", body, timeout=10) as answer:
            assert {match["term"] for match in json.load(answer)["matches"]} == {*TERMS, "parking lot", "hash key"}
        program.send_signal(signal.SIGTERM)
        assert program.wait(20) in (0, -signal.SIGTERM)
    finally:
        program.kill()
        program.communicate()
