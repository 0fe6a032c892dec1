"""bin/serve.py under load: a thousand requests at once, and the same requests one after another.

    python bench/serve.py --model runs/mine --glossary glossary.json --requests 1000

The server is started as a user starts it, on this machine. Each request is a clip of its own, noise of 0.5 to 2 s, sent
as raw samples over a connection of its own. Told are the answers by status, the time from request to answer, and what
many at once are worth: their rate over the rate of one after another. Every answer is compared with the one that the
same clip gets alone, so that a mix-up between requests would show. Exit code 1 when any answer is not 200 or another.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import asyncio
import json
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
START_S, ANSWER_S = 600.0, 300.0
SCORE_TOLERANCE = 1e-4  # of a cosine: other batches sum in another order
BF16_TOLERANCE = 2e-2


@dataclass(frozen=True)
class Answer:
    """One response: status, seconds, and score by term."""

    status: int
    seconds: float
    scores: dict[str, float]


def make_bodies(count: int) -> list[bytes]:
    rng = np.random.default_rng(0)
    lengths = rng.integers(8_000, 32_000, count)
    return [rng.normal(0, 3_000, length).astype("<i2").tobytes() for length in lengths]


async def ask(port: int, body: bytes, k: int) -> Answer:
    """POST one clip over its own connection."""
    started = time.perf_counter()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/retrieve?format=pcm&k={k} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}"
    writer.write(f"{head}\r\n\r\n".encode() + body)
    await writer.drain()
    raw = await asyncio.wait_for(reader.read(), ANSWER_S)
    writer.close()
    status = int(raw.split(b" ", 2)[1])
    found = json.loads(raw.partition(b"\r\n\r\n")[2]).get("matches", []) if status == 200 else []
    return Answer(status, time.perf_counter() - started, {match["term"]: match["score"] for match in found})


async def ask_all(port: int, bodies: Sequence[bytes], k: int, at_once: int) -> tuple[list[Answer], float]:
    """The answers in order, and the seconds that all of them took."""
    places = asyncio.Semaphore(at_once)

    async def one(body: bytes) -> Answer:
        async with places:
            return await ask(port, body, k)

    started = time.perf_counter()
    answers = await asyncio.gather(*(one(body) for body in bodies))
    return list(answers), time.perf_counter() - started


def num_mixed_up(alone: Sequence[Answer], together: Sequence[Answer], tolerance: float) -> int:
    """Clips whose scores differ by more than rounding between the two ways, of those answered both times."""
    mixed = 0
    for a, b in zip(alone, together, strict=True):
        if a.status == b.status == 200:
            shared = a.scores.keys() & b.scores.keys()
            mixed += not shared or any(abs(a.scores[term] - b.scores[term]) > tolerance for term in shared)
    return mixed


def wait_until_up(port: int, program: subprocess.Popen) -> None:
    """Raises RuntimeError when the server ends instead of listening."""
    until = time.monotonic() + START_S
    while time.monotonic() < until:
        if program.poll() is not None:
            raise RuntimeError(f"bin/serve.py ended with exit code {program.returncode}")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    raise RuntimeError(f"bin/serve.py did not listen within {START_S:g} s")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--glossary", required=True)
    parser.add_argument("--device", default="auto", choices=["auto", "cpu", "cuda"])
    parser.add_argument("--requests", type=int, default=1000, help="all at once")
    parser.add_argument("--alone", type=int, default=100, help="of them, also sent one after another")
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, str(ROOT / "bin" / "serve.py"), "--model", args.model, "--glossary", args.glossary]
    program = subprocess.Popen(
        [*command, "--device", args.device, "--port", str(port), "--time_limit_s", str(ANSWER_S)]
    )
    try:
        wait_until_up(port, program)
        bodies = make_bodies(args.requests)
        asyncio.run(ask_all(port, bodies[:20], args.k, 4))  # warm-up
        alone, alone_s = asyncio.run(ask_all(port, bodies[: args.alone], args.k, 1))
        together, together_s = asyncio.run(ask_all(port, bodies, args.k, args.requests))
    finally:
        program.terminate()
        program.wait(30)
    tolerance = SCORE_TOLERANCE if args.device == "cpu" else BF16_TOLERANCE
    mixed = num_mixed_up(alone, together[: len(alone)], tolerance)
    statuses = Counter(answer.status for answer in together)
    rates = {"alone_a_second": len(alone) / alone_s, "together_a_second": len(together) / together_s}
    seconds = {"alone_s": [a.seconds for a in alone], "together_s": [a.seconds for a in together]}
    for name, taken in seconds.items():
        median, p95 = np.percentile(taken, [50, 95]) * 1e3
        way = f"{len(taken)} at once" if name == "together_s" else f"{len(taken)} one after another"
        rate = rates[name.replace("_s", "_a_second")]
        print(f"{way:24s} median {median:.1f} ms, 95th percentile {p95:.1f} ms, {rate:.0f} a second")
    print(f"at once over one after another: {rates['together_a_second'] / rates['alone_a_second']:.2f} x the rate")
    print(f"answers by status: {dict(statuses)}; mixed up: {mixed} of {len(alone)}")
    if args.out is not None:
        args.out.write_text(json.dumps({**rates, "statuses": statuses, "mixed_up": mixed}, indent=1) + "\n")
    return 0 if statuses == {200: len(together)} and not mixed else 1


if __name__ == "__main__":
    sys.exit(main())
