"""Terms of a live signal, from overlapping windows, in bounded memory.

A window of the last `window` seconds is looked at every `hop` seconds; at the start it is as long as the audio is.
With window 1.92, hop 0.96, lookback 1.92, and "voicemail" said from 1.1 to 1.7 s:

    seconds    0     0.96     1.92     2.88     3.84     4.80
    window 1   [------]                                          nothing above the threshold
    window 2   [---------------]                                 voicemail 0.71
    window 3          [-----------------]                        voicemail 0.78, mailbox 0.42
    window 4                   [-----------------]               nothing
    window 5                            [-----------------]      nothing

    query() at 2.88 s    voicemail 0.78 from 0.96 to 2.88, mailbox 0.42: a term counts once, with its best window
    query() at 4.79 s    the same: window 3 ended less than `lookback` ago
    query() at 4.80 s    nothing: what ended `lookback` or more before the audio's end is stale

The span of a match is its window, or the part of the window that the read-out points at where it does. A window that is
silent is not looked at: training never saw one.

`accept` does all of it for one stream. Many streams `feed` first and are then moved on together, as one batch:

    for stream, pcm in arrived: stream.feed(pcm)
    advance(streams)

Shapes: S samples.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
import soxr
from numpy.typing import NDArray
from torch import Tensor

from data.audio import MAX_CLIP_S, MIN_CLIP_S, SAMPLE_RATE, SILENCE_PEAK
from retrieval.matches import Hits, Match
from retrieval.pcm import check_rate, to_int16

Samples = NDArray[np.int16] | NDArray[np.floating] | Tensor

MAX_PENDING_S = 30.0
"""Audio that a stream holds beyond its window before it must be moved on."""
MAX_LOOKBACK_S = 600.0
MAX_BATCH = 256
"""Windows that are encoded together."""


class Finder(Protocol):
    """What a stream needs of a Retriever."""

    def find(self, waves: Sequence[NDArray[np.int16]], k: int) -> list[Hits]: ...

    def matches(self, hits: Hits, threshold: float | None = None) -> list[Match]: ...


@dataclass(frozen=True)
class StreamSettings:
    """Raises ValueError for what cannot be."""

    window_s: float = 1.92
    hop_s: float = 0.96
    lookback_s: float = 1.92
    k: int = 10
    threshold: float | None = None
    """Least cosine of a match; None lets the best k through however low they are."""

    def __post_init__(self) -> None:
        if not 0.1 <= self.window_s <= MAX_CLIP_S:
            raise ValueError(f"window: got {self.window_s}; allowed: 0.1 to {MAX_CLIP_S} s")
        if not MIN_CLIP_S <= self.hop_s <= self.window_s:
            raise ValueError(f"hop: got {self.hop_s}; allowed: {MIN_CLIP_S} s to the window, {self.window_s} s")
        if not 0 < self.lookback_s <= MAX_LOOKBACK_S:
            raise ValueError(f"lookback: got {self.lookback_s}; allowed: above 0, up to {MAX_LOOKBACK_S} s")
        if self.k < 1:
            raise ValueError(f"k: got {self.k}; allowed: at least 1")
        if self.threshold is not None and not -1 <= self.threshold <= 1:
            raise ValueError(f"threshold: got {self.threshold}; allowed: -1 to 1, a cosine")


@dataclass(frozen=True)
class Window:
    """A piece of a stream that is due: int16 samples and where they start, in samples from the stream's start."""

    pcm_S: NDArray[np.int16]
    start: int

    @property
    def end(self) -> int:
        return self.start + len(self.pcm_S)

    @property
    def is_silent(self) -> bool:
        peak = max(int(self.pcm_S.max(initial=0)), -int(self.pcm_S.min(initial=0)))
        return peak <= SILENCE_PEAK * 32768


class Stream:
    """One live signal. Holds a window of samples, what was fed and not yet looked at, and evidence not yet stale."""

    def __init__(self, finder: Finder, settings: StreamSettings, sample_rate: int = SAMPLE_RATE) -> None:
        """sample_rate: of what will be fed, Hz; another than 16000 is resampled on the way. ValueError for none."""
        check_rate(sample_rate)
        self.finder, self.settings, self.sample_rate = finder, settings, sample_rate
        self._window = round(settings.window_s * SAMPLE_RATE)
        self._hop = round(settings.hop_s * SAMPLE_RATE)
        self._lookback = round(settings.lookback_s * SAMPLE_RATE)
        self.reset()

    def reset(self) -> None:
        """Forget everything: time starts again at 0."""
        self._is_over = False
        self._samples = np.empty(0, dtype=np.int16)  # from sample `_first` on
        self._first, self._looked_at = 0, 0
        self._evidence: deque[tuple[int, list[Match]]] = deque()  # (end of the window in samples, its matches)
        self._resampler = (
            None
            if self.sample_rate == SAMPLE_RATE
            else soxr.ResampleStream(self.sample_rate, SAMPLE_RATE, 1, dtype="int16")
        )

    @property
    def end_s(self) -> float:
        """Seconds of audio so far: the stream's now."""
        return self._end / SAMPLE_RATE

    @property
    def _end(self) -> int:
        return self._first + len(self._samples)

    @property
    def pending_s(self) -> float:
        """Seconds that no window has looked at yet."""
        return self.end_s - self._looked_at / SAMPLE_RATE

    def accept(self, pcm: Samples) -> None:
        """Take a chunk of any length and look at every window that is due.

        Raises:
            ValueError: not int16 or float samples, NaN, more than one dimension. The stream is then as it was before.
        """
        samples_S = to_int16(pcm, "chunk")
        piece = int(MAX_PENDING_S / 2 * self.sample_rate)
        for start in range(0, len(samples_S), piece):
            self.feed(samples_S[start : start + piece])
            advance([self])

    def feed(self, pcm: Samples) -> None:
        """Only take a chunk; `advance` looks at it. Raises as `accept`, and when more than 30 s would be waiting."""
        samples_S = to_int16(pcm, "chunk")
        if self._is_over:
            raise ValueError("chunk: the stream is finished; reset it to start another")
        waiting_s = self.pending_s + len(samples_S) / self.sample_rate
        if waiting_s > MAX_PENDING_S:
            raise ValueError(f"chunk: {waiting_s:.1f} s would be waiting; allowed: {MAX_PENDING_S}; advance it first")
        if self._resampler is not None and len(samples_S):
            samples_S = self._resampler.resample_chunk(samples_S)
        self._samples = np.concatenate((self._samples, samples_S))

    def finish(self) -> None:
        """The signal is over: look at what is left after the last full hop. `reset` starts another."""
        look_at([(self, window) for window in self.take_rest()])

    def query(self) -> list[Match]:
        """The terms of the last `lookback` seconds, each once, best first, at most k."""
        self._drop_stale(self._end)
        best: dict[str, Match] = {}
        for _, matches in self._evidence:
            for match in matches:
                assert match.end_s is not None
                if round(match.end_s * SAMPLE_RATE) > self._end - self._lookback:  # a span may end before its window
                    known = best.get(match.term)
                    if known is None or match.score > known.score:
                        best[match.term] = match
        return sorted(best.values(), key=lambda match: (-match.score, match.term))[: self.settings.k]

    def take_due(self) -> list[Window]:
        """The windows that fed audio completes, oldest first. Each must come back through `add`, in this order."""
        return [self._cut(stop) for stop in range(self._looked_at + self._hop, self._end + 1, self._hop)]

    def take_rest(self) -> list[Window]:
        """`take_due`, and the last window, which ends where the signal does."""
        if self._resampler is not None and not self._is_over:
            rest_S = self._resampler.resample_chunk(np.empty(0, dtype=np.int16), last=True)
            self._samples = np.concatenate((self._samples, rest_S))
        self._is_over = True
        windows = self.take_due()
        if self._end - self._looked_at >= round(MIN_CLIP_S * SAMPLE_RATE):
            windows.append(self._cut(self._end))
        return windows

    def add(self, window: Window, hits: Hits | None) -> None:
        """Take in what was found in a window (None: it was silent)."""
        self._drop_stale(window.end)
        if hits is None:
            return
        start_s, end_s = window.start / SAMPLE_RATE, window.end / SAMPLE_RATE
        found = []
        for match in self.finder.matches(hits.first(self.settings.k), self.settings.threshold):
            if match.start_s is None or match.end_s is None:
                found.append(replace(match, start_s=start_s, end_s=end_s))
            else:
                found.append(replace(match, start_s=start_s + match.start_s, end_s=start_s + match.end_s))
        if found:
            self._evidence.append((window.end, found))

    def _drop_stale(self, now: int) -> None:
        while self._evidence and self._evidence[0][0] <= now - self._lookback:
            self._evidence.popleft()

    def _cut(self, stop: int) -> Window:
        """The window that ends at sample `stop`, which counts as looked at; audio before the next window is let go."""
        start = max(0, stop - self._window)
        window = Window(self._samples[start - self._first : stop - self._first].copy(), start)
        self._looked_at = stop
        first = max(self._first, stop - self._window)
        self._samples, self._first = self._samples[first - self._first :].copy(), first
        return window


def advance(streams: Sequence[Stream]) -> None:
    """Look at all windows that are due in any of the streams, which share one Retriever, together."""
    due = [(stream, stream.take_due()) for stream in streams]
    look_at([(stream, window) for stream, windows in due for window in windows])


def look_at(due: Sequence[tuple[Stream, Window]]) -> None:
    """Encode and search the windows in batches, and give each stream what was found in its own."""
    audible = [(stream, window) for stream, window in due if not window.is_silent]
    found: dict[int, Hits] = {}
    for start in range(0, len(audible), MAX_BATCH):
        part = audible[start : start + MAX_BATCH]
        k = max(stream.settings.k for stream, _ in part)
        hits = part[0][0].finder.find([window.pcm_S for _, window in part], k)
        found |= {id(window): one for (_, window), one in zip(part, hits, strict=True)}
    for stream, window in due:
        stream.add(window, found.get(id(window)))
