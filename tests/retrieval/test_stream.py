"""Windows, evidence and time of a stream: the worked example, any chunking, many together, nothing that grows."""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from retrieval.matches import Hits, Match
from retrieval.retriever import Retriever
from retrieval.stream import MAX_PENDING_S, Stream, StreamSettings, advance
from tests.retrieval.small_models import tone

NAMES = ("voicemail", "mailbox")


class Marked:
    """A finder that reads its scores off the audio: a sample of 1000 + s is voicemail at s / 100, 2000 + s mailbox."""

    def __init__(self, spans: bool = False) -> None:
        self.batches: list[list[int]] = []
        self.spans = spans

    def find(self, waves: Sequence[NDArray[np.int16]], k: int) -> list[Hits]:
        self.batches.append([len(wave_S) for wave_S in waves])
        found = []
        for wave_S in waves:
            best = [
                int((wave_S[(wave_S > base) & (wave_S < base + 101)] - base).max(initial=0)) for base in (1000, 2000)
            ]
            order = np.argsort(best)[::-1][:k]
            spans = None
            if self.spans:
                at_s = int(np.argmax(wave_S > 1000)) / 16_000
                spans = np.array([[at_s, at_s + 0.1]] * len(order))
            found.append(Hits((np.array(best) / 100)[order].astype(np.float32), order, spans))
        return found

    def matches(self, hits: Hits, threshold: float | None = None) -> list[Match]:
        spans = [(None, None)] * len(hits.places_K) if hits.spans_K2 is None else hits.spans_K2.tolist()
        return [
            Match(round(float(score), 2), NAMES[place], NAMES[place].title(), {}, *span)
            for score, place, span in zip(hits.scores_K, hits.places_K, spans, strict=True)
            if threshold is None or score >= threshold
        ]


def audio(duration_s: float, **marks: tuple[float, float]) -> NDArray[np.int16]:
    """Quiet noise with marks: voicemail=(second, score)."""
    samples_S = np.full(round(duration_s * 16_000), 50, dtype=np.int16)
    for name, (at_s, score) in marks.items():
        samples_S[round(at_s * 16_000)] = 1000 * (NAMES.index(name) + 1) + round(score * 100)
    return samples_S


def told(stream: Stream) -> list[tuple[str, float, float, float]]:
    return [(m.term, m.score, m.start_s, m.end_s) for m in stream.query()]  # type: ignore[misc]


def test_the_worked_example() -> None:
    class Scripted(Marked):
        """What each window finds, as in the example."""

        script = iter([(0.1, 0.1), (0.71, 0.1), (0.78, 0.42), (0.1, 0.1), (0.1, 0.1)])

        def find(self, waves: Sequence[NDArray[np.int16]], k: int) -> list[Hits]:
            return [Hits(np.array(next(self.script), np.float32), np.arange(2)) for _ in waves]

    stream = Stream(Scripted(), StreamSettings(threshold=0.3))

    def at(second: float) -> list[tuple[str, float, float, float]]:
        stream.accept(audio(second - stream.end_s))
        assert stream.end_s == second
        return told(stream)

    assert at(0.96) == at(1.91) == []
    assert at(1.92) == at(2.87) == [("voicemail", 0.71, 0.0, 1.92)]
    best = [("voicemail", 0.78, 0.96, 2.88), ("mailbox", 0.42, 0.96, 2.88)]
    assert at(2.88) == at(3.84) == at(4.79) == best, "a term counts once, with its best window"
    assert at(4.80) == []


def test_evidence_is_stale_lookback_after_its_windows_end() -> None:
    stream = Stream(Marked(), StreamSettings(threshold=0.3))
    stream.accept(audio(0.96, voicemail=(0.5, 0.9)))
    stream.accept(audio(0.96))
    assert told(stream) == [("voicemail", 0.9, 0.0, 0.96)], "equal scores: the earlier window stays"
    stream.accept(audio(1.919))
    assert told(stream) == [("voicemail", 0.9, 0.0, 1.92)], "window 1 is stale, window 2 not yet"
    stream.accept(audio(0.001))
    assert told(stream) == []


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(0, 40_000), max_size=12), st.sampled_from([8_000, 15_360]))
def test_any_chunking_looks_at_the_same_windows(cuts: list[int], hop: int) -> None:
    signal = np.random.default_rng(0).integers(-900, 900, 130_000).astype(np.int16)
    whole, pieces = (Stream(Marked(), StreamSettings(hop_s=hop / 16_000)) for _ in range(2))
    whole.accept(signal)
    borders = [0, *np.minimum(np.cumsum(cuts), len(signal)).tolist(), len(signal)]
    for start, stop in pairwise(borders):
        pieces.accept(signal[start:stop])
    lengths = [[n for batch in s.finder.batches for n in batch] for s in (whole, pieces)]  # type: ignore[attr-defined]
    assert lengths[0] == lengths[1] == [min(30_720, i * hop) for i in range(1, len(signal) // hop + 1)]
    assert told(whole) == told(pieces)
    assert whole.end_s == pieces.end_s == pytest.approx(130_000 / 16_000)


def test_memory_stays_bounded_and_so_does_what_waits() -> None:
    stream = Stream(Marked(), StreamSettings(threshold=0.3, lookback_s=5.0))
    for _ in range(200):
        stream.accept(audio(1.1, voicemail=(0.1, 0.8)))
        assert len(stream._samples) <= 1.92 * 16_000 + 0.96 * 16_000
        assert stream._samples.base is None, "a view would hold on to all that was"
        assert len(stream._evidence) <= 7
    stream.reset()
    with pytest.raises(ValueError, match=re.escape(f"31.0 s would be waiting; allowed: {MAX_PENDING_S}")):
        stream.feed(audio(31))
    assert stream.end_s == 0
    stream.accept(audio(95))  # `accept` looks as it goes
    assert stream.pending_s < 0.96


def test_many_streams_are_one_batch_and_do_not_mix() -> None:
    finder = Marked()
    streams = [Stream(finder, StreamSettings(threshold=0.3)) for _ in range(5)]
    for i, stream in enumerate(streams):
        stream.feed(audio(0.96 * (i + 1), voicemail=(0.2, 0.5 + i / 100)) if i % 2 else audio(0.96))
    advance(streams)
    assert [len(batch) for batch in finder.batches] == [1 + 2 + 1 + 4 + 1]
    assert [bool(told(stream)) for stream in streams] == [False, True, False, False, False]  # stream 3's is stale
    assert told(streams[1])[0][:2] == ("voicemail", 0.51)


def test_a_read_outs_own_spans_are_shifted_and_go_stale_by_themselves() -> None:
    stream = Stream(Marked(spans=True), StreamSettings(threshold=0.3, k=1))
    stream.accept(audio(1.92, voicemail=(0.5, 0.9)))
    ((_, _, start_s, end_s),) = told(stream)
    assert (start_s, end_s) == pytest.approx((0.5, 0.6))
    stream.accept(audio(0.5))
    assert told(stream), "2.42 s: the span ended 1.82 s ago"
    stream.accept(audio(0.12))
    assert told(stream) == [], "2.54 s: 1.94 s ago, though its window would still count"


def test_finish_looks_at_the_rest_and_reset_starts_anew() -> None:
    finder = Marked()
    stream = Stream(finder, StreamSettings(threshold=0.3))
    stream.accept(audio(2.5, voicemail=(2.4, 0.8)))
    assert told(stream) == []
    stream.finish()
    assert told(stream) == [("voicemail", 0.8, 0.58, 2.5)]
    stream.finish()
    assert sum(map(len, finder.batches)) == 3, "nothing is looked at twice"
    stream.reset()
    assert (told(stream), stream.end_s) == ([], 0)
    stream.accept(audio(0.96, mailbox=(0.1, 0.6)))
    assert told(stream) == [("mailbox", 0.6, 0.0, 0.96)]


def test_silence_is_not_looked_at() -> None:
    finder = Marked()
    stream = Stream(finder, StreamSettings())
    stream.accept(np.zeros(50_000, np.int16))
    assert finder.batches == []
    assert told(stream) == []


def test_another_rate_is_resampled_across_chunks() -> None:
    finder = Marked()
    stream = Stream(finder, StreamSettings(), sample_rate=48_000)
    signal = (np.sin(np.arange(48_000 * 3) / 20) * 900).astype(np.int16)
    for start in range(0, len(signal), 7_001):
        stream.accept(signal[start : start + 7_001])
    stream.finish()
    assert stream.end_s == pytest.approx(3, abs=1e-3)
    assert sum(map(len, finder.batches)) == 4  # three hops and the rest


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.array([0.1, np.nan]), "1 samples are NaN or infinite"),
        (np.zeros((5, 2), np.int16), "allowed: one dimension"),
        (np.zeros(5, np.int64), "int64 samples"),
    ],
)
def test_a_bad_chunk_changes_nothing(chunk: np.ndarray, message: str) -> None:
    stream = Stream(Marked(), StreamSettings(threshold=0.3))
    stream.accept(audio(1.0, voicemail=(0.5, 0.9)))
    before = told(stream)
    with pytest.raises(ValueError, match=message):
        stream.accept(chunk)
    stream.accept(np.zeros(0, np.int16))
    assert (told(stream), stream.end_s) == (before, 1.0)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"window_s": 31.0}, "window: got 31.0; allowed: 0.1 to 30.0 s"),
        ({"hop_s": 2.0}, "hop: got 2.0; allowed: 0.01 s to the window"),
        ({"hop_s": float("nan")}, "hop: got nan"),
        ({"lookback_s": 0.0}, "lookback: got 0.0; allowed: above 0"),
        ({"k": 0}, "k: got 0"),
        ({"threshold": 2.0}, "threshold: got 2.0; allowed: -1 to 1"),
    ],
)
def test_settings_that_cannot_be_are_told(wrong: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        StreamSettings(**wrong)  # type: ignore[arg-type]


def test_a_real_models_stream_is_its_search(retriever: Retriever, model_folder: Path) -> None:
    retriever.index(["voicemail", "pound key", "mailbox"])
    signal = np.concatenate([tone(300 + 200 * i, 0.48, seed=i) for i in range(8)])
    stream = retriever.stream(k=3)
    stream.accept(signal)
    windows = [(max(0, stop - 30_720), stop) for stop in range(15_360, len(signal) + 1, 15_360)]
    best: dict[str, float] = {}
    for start, stop in windows:
        if stop > len(signal) - 30_720:
            for match in retriever.search(signal[start:stop], k=3):
                best[match.term] = max(best.get(match.term, -1), match.score)
    assert {m.term: pytest.approx(m.score, abs=2e-6) for m in stream.query()} == best
    with pytest.raises(ValueError, match="no index is in use"):
        Retriever.load(model_folder).stream()
