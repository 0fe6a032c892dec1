"""Live streams through an audio tower at full size: latency from the last samples to the terms, and how many fit.

    python bench/stream.py --device cuda --out stream.json
    python bench/stream.py --device cpu --shapes tiny --terms 2000 --rounds 20 --most 8

The tower has the shape of Qwen2-Audio's and random weights, which cost the same; the glossary is random unit vectors;
the audio is noise. Nothing else is left out: samples come in as a chunk of one hop, the window is cut, copied to the
device, made into a log-mel, encoded, searched, and the terms are read on the host.

  one stream    from the call of `accept` with the chunk that completes a window, to the return of `query`
  many streams  all chunks of a hop are fed, then `advance` and each `query`: so many streams are live in real time when
                the longest of a few hops takes less than a hop. The number doubles while that holds, then bisects.

`--compare_with_published` prints the figures of a published system of this kind beside ours: median 37-44 ms, 95th
percentile 149-268 ms. They are of its own machine, so no ratio is formed.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from bench.random_checkpoint import PUBLISHED_AUDIO, PUBLISHED_TEXT, TINY_AUDIO
from bench.search import random_units
from data.audio import SAMPLE_RATE
from model.build import build_model
from model.settings import ModelSettings
from model.text_tower import TextConfig
from retrieval.index import Term, TermIndex
from retrieval.model_files import OpenedModel
from retrieval.retriever import Retriever
from retrieval.stream import Stream, advance

PROJ_DIM = 512
SETTLE_ROUNDS = 5  # rounds that are not timed
FIRST_HOPS = 2  # until windows are full
FINGERPRINT = "random weights"


def make_retriever(device: str, shapes: str, num_terms: int) -> Retriever:
    """An audio-only retriever over random weights, with a random index in use."""
    audio = PUBLISHED_AUDIO | (TINY_AUDIO if shapes == "tiny" else {})
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "audio.json"
        path.write_text(json.dumps(audio))
        settings = ModelSettings(audio_model=str(path), proj_dim=PROJ_DIM)
        built = build_model(settings, device, absent_text=TextConfig.from_hf(PUBLISHED_TEXT))
    retriever = Retriever(OpenedModel(built, 0.07, {}, FINGERPRINT))
    terms = [Term(f"term {n:07d}", f"Term {n}") for n in range(num_terms)]
    retriever.use(TermIndex(terms, random_units(num_terms, PROJ_DIM, 0), FINGERPRINT))
    return retriever


def noise(num_samples: int, seed: int) -> NDArray[np.int16]:
    return np.random.default_rng(seed).normal(0, 3_000, num_samples).astype(np.int16)


def one_stream_ms(stream: Stream, rounds: int) -> NDArray[np.float64]:
    """Milliseconds from chunk to terms, for `rounds` full windows."""
    hop, taken = round(stream.settings.hop_s * SAMPLE_RATE), []
    for number in range(rounds + SETTLE_ROUNDS):
        chunk = noise(hop, number)
        started = time.perf_counter()
        stream.accept(chunk)
        matches = stream.query()
        ended = time.perf_counter()
        assert matches, "a window without terms was not searched"
        if number >= SETTLE_ROUNDS:
            taken.append((ended - started) * 1e3)
    return np.array(taken)


def many_streams_ms(streams: Sequence[Stream], rounds: int) -> NDArray[np.float64]:
    """Milliseconds of a hop of all streams, from the first `feed` to the last `query`."""
    hop, taken = round(streams[0].settings.hop_s * SAMPLE_RATE), []
    chunks = [noise(hop, seed) for seed in range(16)]
    for stream in streams:
        stream.reset()
    for number in range(rounds + FIRST_HOPS):
        started = time.perf_counter()
        for i, stream in enumerate(streams):
            stream.feed(chunks[(i + number) % len(chunks)])
        advance(streams)
        found = [stream.query() for stream in streams]
        ended = time.perf_counter()
        assert all(found), "a window without terms was not searched"
        if number >= FIRST_HOPS:
            taken.append((ended - started) * 1e3)
    return np.array(taken)


def most_streams(retriever: Retriever, hop_s: float, most: int, rounds: int) -> list[dict[str, Any]]:
    """What was tried, smallest number of streams first; the largest that fits is found to within 1/8 of itself."""
    streams: list[Stream] = []
    worst_ms: dict[int, float] = {}

    def fits(count: int) -> bool:
        while len(streams) < count:
            streams.append(retriever.stream(hop=hop_s))
        worst_ms[count] = float(many_streams_ms(streams[:count], rounds).max())
        return worst_ms[count] <= hop_s * 1e3

    count = 1
    while count <= most and fits(count):
        count *= 2
    low, high = count // 2, min(count, most + 1)
    while low and high - low > max(1, low // 8):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return [{"streams": n, "worst_ms": round(ms, 2), "fits": ms <= hop_s * 1e3} for n, ms in sorted(worst_ms.items())]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"])
    parser.add_argument("--shapes", default="full", choices=["full", "tiny"])
    parser.add_argument("--terms", type=int, default=100_000)
    parser.add_argument("--hop", type=float, default=0.96, help="seconds")
    parser.add_argument("--rounds", type=int, default=200, help="windows of the one stream")
    parser.add_argument("--many_rounds", type=int, default=5, help="hops of many streams")
    parser.add_argument("--most", type=int, default=4096, help="streams tried, at most")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads of torch")
    parser.add_argument("--compare_with_published", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file for the figures")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)

    retriever = make_retriever(args.device, args.shapes, args.terms)
    stream = retriever.stream(hop=args.hop)
    taken = one_stream_ms(stream, args.rounds)
    median, p95, worst = (round(float(value), 2) for value in (*np.percentile(taken, [50, 95]), taken.max()))
    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    parameters = sum(p.numel() for p in retriever.model.parameters()) / 1e6
    print(f"{name}, torch {torch.__version__}: audio tower of {parameters:.0f} M, {args.terms} terms, window 1.92 s")
    print(
        f"one stream    chunk to terms: median {median} ms, 95th percentile {p95} ms, worst {worst} ms, n {args.rounds}"
    )
    if args.compare_with_published:
        print("              a published system, on its machine: median 37-44 ms, 95th percentile 149-268 ms")
    tried = most_streams(retriever, args.hop, args.most, args.many_rounds)
    for one in tried:
        verdict = "fits" if one["fits"] else "too slow"
        print(f"{one['streams']:5d} streams  {one['worst_ms']:9.2f} ms for a hop of {args.hop * 1e3:g} ms  {verdict}")
    live = max((one["streams"] for one in tried if one["fits"]), default=0)
    print(f"live in real time: {live} streams" + (" (the most that were tried)" if live == args.most else ""))
    if args.out is not None:
        figures = {"device": name, "torch": torch.__version__, "terms": args.terms, "shapes": args.shapes}
        latency = {"median_ms": median, "p95_ms": p95, "worst_ms": worst, "windows": args.rounds}
        args.out.write_text(json.dumps(figures | latency | {"live_streams": live, "tried": tried}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
