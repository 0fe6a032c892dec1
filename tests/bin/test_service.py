"""The service over a real loopback socket: what it finds, what it refuses, and that requests do not mix."""

import http.client
import io
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf
import uvicorn
from websockets.exceptions import ConnectionClosed
from websockets.sync.client import connect

from bin.serve import ServeLimits
from bin.service import build_app
from retrieval.retriever import Retriever
from tests.bin.tones import TERMS
from tests.retrieval.small_models import tone

TOKEN = "a token of enough characters"
QUICK_FIND = Retriever.find
# Generous in time, for machines that are busy; the tests of the time limits have their own.
LIMITS = ServeLimits(max_body_mb=0.2, body_time_s=60.0, time_limit_s=60.0, max_requests=8, max_batch=8)


@dataclass
class Server:
    port: int
    retriever: Retriever  # another one of the same model, for what is expected

    def ask(
        self, body: bytes, query: str = "", token: str | None = TOKEN, method: str = "POST", path: str = "/v1/retrieve"
    ) -> tuple[int, dict]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        headers = {} if token is None else {"Authorization": f"Bearer {token}"}
        connection.request(method, f"{path}?{query}", body or None, headers)
        answer = connection.getresponse()
        text = answer.read().decode()
        connection.close()
        is_json = answer.headers["content-type"].startswith("application/json")
        return answer.status, json.loads(text) if is_json else {"text": text}


def start(folder: Path, limits: ServeLimits) -> Iterator[Server]:
    served, expected = Retriever.load(folder), Retriever.load(folder)
    expected.index(TERMS)
    served.use(expected.terms)  # type: ignore[arg-type]
    app = build_app(served, limits, None, TOKEN)
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error"))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield Server(listener.getsockname()[1], expected)
    server.should_exit = True
    thread.join(20)
    assert not thread.is_alive()
    assert app.state.service.batcher.is_closed


@pytest.fixture(scope="module")
def server(trained: Path) -> Iterator[Server]:
    yield from start(trained, LIMITS)


def wav(samples_S: np.ndarray, format: str = "WAV", rate: int = 16_000, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    sf.write(file, samples_S, rate, format=format, subtype=subtype)
    return file.getvalue()


def terms_of(answer: dict) -> list[str]:
    return [match["term"] for match in answer["matches"]]


def test_every_form_of_a_clip_gives_what_the_library_gives(server: Server) -> None:
    clip = tone(700)
    matches = server.retriever.search(clip, k=3)
    for body, query in ((wav(clip), ""), (wav(clip, "FLAC"), ""), (clip.astype("<i2").tobytes(), "format=pcm&")):
        status, answer = server.ask(body, f"{query}k=3")
        assert (status, answer["duration_s"]) == (200, 0.5)
        assert terms_of(answer) == [match.term for match in matches]
        assert [m["score"] for m in answer["matches"]] == pytest.approx([m.score for m in matches], abs=2e-6)
    between = (matches[0].score + matches[1].score) / 2
    assert terms_of(server.ask(wav(clip), f"threshold={between}")[1]) == [matches[0].term]
    assert len(terms_of(server.ask(wav(clip), "k=1000")[1])) == len(TERMS)


@pytest.mark.parametrize(
    ("body", "query", "status", "message"),
    [
        (b"<html>this is a page</html>", "", 422, "not_audio"),
        (b"", "", 422, "empty_file"),
        (wav(tone(440))[:-4_000], "", 422, "truncated"),
        (wav(np.zeros(0, np.int16)), "", 422, "empty_audio"),
        (wav(np.full(31 * 4_000, 9, np.int16), "FLAC", 4_000), "", 422, "too_long: 31.0000 s"),
        (wav(np.array([np.nan] * 900, np.float32), subtype="FLOAT"), "", 422, "not_finite"),
        (b"\x01\x02\x03", "format=pcm", 400, "3 bytes; allowed: whole 16-bit samples"),
        (b"", "format=pcm", 400, "0 samples"),
        (b"\x01\x00" * 100, "format=pcm", 400, "100 samples at 16 kHz"),
        (b"\x01\x00" * 9_000, "format=pcm&sample_rate=7", 400, "sample_rate: got 7; allowed: 4000 to 384000 Hz"),
        (wav(tone(440)), "k=0", 422, "k: Input should be greater than or equal to 1"),
        (wav(tone(440)), "threshold=nan", 422, "threshold"),
        (wav(tone(440)), "format=mp4", 422, "format"),
    ],
)
def test_what_is_no_clip_is_told(server: Server, body: bytes, query: str, status: int, message: str) -> None:
    got, answer = server.ask(body, query)
    assert got == status, answer
    assert message in answer["error"]


def test_only_the_token_opens(server: Server) -> None:
    for token in (None, "", "wrong", TOKEN + "x", TOKEN[:-1], "ä" * 30):
        assert server.ask(wav(tone(440)), token=token)[0] == 401
    assert server.ask(b"", token=None, method="GET", path="/metrics")[0] == 401
    status, answer = server.ask(b"", token=None, method="GET", path="/healthz")
    assert (status, answer["status"], answer["num_terms"]) == (200, "ok", len(TERMS))


def test_too_large_is_refused_declared_or_not(server: Server) -> None:
    status, answer = server.ask(b"x" * 300_000)
    assert (status, "300000 bytes; allowed: 200000" in answer["error"]) == (413, True)
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=30)
    headers = {"Authorization": f"Bearer {TOKEN}", "Transfer-Encoding": "chunked"}
    connection.request("POST", "/v1/retrieve", iter([b"x" * 50_000] * 5), headers, encode_chunked=True)
    assert connection.getresponse().status == 413
    connection.close()


def raw_request(server: Server, declared: int, sent: bytes) -> socket.socket:
    raw = socket.create_connection(("127.0.0.1", server.port), timeout=30)
    head = (
        f"POST /v1/retrieve HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {declared}\r\n\r\n"
    )
    raw.sendall(head.encode() + sent)
    return raw


def test_half_sent_bodies_are_given_up_and_block_nobody(trained: Path) -> None:
    body = wav(tone(440))
    for server in start(trained, replace(LIMITS, body_time_s=1.5)):
        stalled = [raw_request(server, len(body), body[:5_000]) for _ in range(2)]
        left = raw_request(server, len(body), body[:5_000])
        left.close()
        assert server.ask(body)[0] == 200, "others are served meanwhile"
        for raw in stalled:
            answer = raw.recv(4_096)
            assert answer.startswith(b"HTTP/1.1 408"), answer
            raw.close()
        assert server.ask(body)[0] == 200


def test_two_hundred_at_once_each_get_their_own_answer(server: Server) -> None:
    """25 times as many as there are places."""
    clips = [tone(200 + 13 * i, 0.1 + 0.01 * (i % 30), seed=i) for i in range(200)]
    expected = [[match.term for match in found] for found in server.retriever.search_many(clips, k=6)]
    before = metrics(server)
    with ThreadPoolExecutor(200) as pool:
        answers = list(pool.map(lambda clip: server.ask(wav(clip), "k=6"), clips))
    assert [status for status, _ in answers] == [200] * 200
    assert len({tuple(terms) for terms in expected}) > 5, "answers can be told apart"
    same = sum(terms_of(answer) == terms for (_, answer), terms in zip(answers, expected, strict=True))
    assert same >= 198, "batches may swap terms that score the same to the last bit, nothing more"
    for (_, answer), clip in zip(answers, clips, strict=True):
        assert answer["duration_s"] == round(len(clip) / 16_000, 4)
    after = metrics(server)
    assert after["earmark_clips_total"] - before["earmark_clips_total"] == 200
    assert after["earmark_batches_total"] - before["earmark_batches_total"] < 200, "clips were encoded together"


def metrics(server: Server) -> dict[str, float]:
    status, answer = server.ask(b"", method="GET", path="/metrics")
    assert status == 200
    lines = [line for line in answer["text"].splitlines() if not line.startswith("#")]
    return {name: float(value) for name, value in (line.rsplit(" ", 1) for line in lines)}


def test_metrics_count_what_happened(server: Server) -> None:
    before = metrics(server)
    server.ask(b"no audio")
    after = metrics(server)
    key = 'earmark_requests_total{status="422"}'
    assert after[key] - before.get(key, 0) == 1
    assert after["earmark_request_seconds_count"] - before["earmark_request_seconds_count"] == 1
    assert after["earmark_streams"] == 0


def test_live_streams_side_by_side(server: Server) -> None:
    signals = [np.concatenate([tone(300 + 170 * i + 90 * j, 0.48, seed=i) for j in range(6)]) for i in range(4)]

    def listen(signal: np.ndarray) -> list[dict]:
        url = f"ws://127.0.0.1:{server.port}/v1/stream?k=3"
        with connect(url, additional_headers={"Authorization": f"Bearer {TOKEN}"}) as live:
            got = []
            for start in range(0, len(signal), 15_360):
                live.send(signal[start : start + 15_360].astype("<i2").tobytes())
                got.append(json.loads(live.recv(10)))
            live.send("finish")
            return [*got, json.loads(live.recv(10))]

    with ThreadPoolExecutor(4) as pool:
        heard = list(pool.map(listen, signals))
    for signal, answers in zip(signals, heard, strict=True):
        stream = server.retriever.stream(k=3)
        for answer, start in zip(answers, range(0, len(signal), 15_360), strict=False):
            stream.accept(signal[start : start + 15_360])
            assert answer["end_s"] == stream.end_s
            assert terms_of(answer) == [match.term for match in stream.query()]


@pytest.mark.parametrize(
    ("query", "token", "message", "told"),
    [
        ("", "wrong", b"", "wrong or no token"),
        ("k=0", TOKEN, b"", "k: got 0"),
        ("sample_rate=1", TOKEN, b"", "sample_rate: got 1"),
        ("", TOKEN, b"\x00", "whole 16-bit samples"),
        ("", TOKEN, "hello", "allowed are binary messages"),
        ("", TOKEN, b"\x01\x00" * 490_000, "would be waiting"),
    ],
)
def test_streams_are_refused_clearly(server: Server, query: str, token: str, message: bytes | str, told: str) -> None:
    url = f"ws://127.0.0.1:{server.port}/v1/stream?{query}"
    with connect(url, additional_headers={"Authorization": f"Bearer {token}"}) as live:
        if message:
            live.send(message)
        assert told in json.loads(live.recv(10))["error"]
        with pytest.raises(ConnectionClosed):
            live.recv(10)


def test_a_slow_model_is_told_of_and_the_service_lives_on(trained: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    let = threading.Event()
    monkeypatch.setattr(Retriever, "find", lambda *args: let.wait(30) and QUICK_FIND(*args))
    for server in start(trained, replace(LIMITS, time_limit_s=1.5)):
        status, answer = server.ask(wav(tone(440)))
        assert (status, "no answer within 1.5 s" in answer["error"]) == (504, True)
        let.set()
        assert server.ask(wav(tone(440)))[0] == 200
