"""Term chunks out of recordings with word times: a window around each glossary term, and some without a term.

    words   please dial one for new york or hold the line      terms: new york, york      margin 1.0 s
    term    [----------- 1.0 s | new york | 1.0 s -----------]  terms ("new york",), ignored ("york",)
    none    a window of the same length in the widest stretch that names no term

Longest matches are the terms; each makes a window, clipped to the recording, which also holds the other terms wholly
inside it. Terms that it cuts, and terms nested in longer ones, are ignored: neither positive nor negative. Windows
without a term come out of the gaps between terms, `no_term_ratio` of them to one with a term, each as long as
a term's window where the gap allows it, so that length tells nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Iterator

import numpy as np

from data.audio import MAX_CLIP_S
from data.clip import Clip
from data.fields import RecordError
from data.phrases import Found, Phrases
from data.terms import key64
from data.timed_words import TOLERANCE_S, Prompt, stretch

logger = logging.getLogger(__name__)

MIN_GAP_S = 0.5  # a shorter stretch between terms makes no window
MAX_WAITING = 10_000  # gaps kept for terms to come


class TermWindows:
    """Cuts recordings one after another; what comes out depends on their order and content alone."""

    def __init__(self, phrases: Phrases, margin_s: float, no_term_ratio: float) -> None:
        self.phrases = phrases
        self.margin_s = margin_s
        self.no_term_ratio = no_term_ratio
        self.num_term = self.num_no_term = 0
        self._waiting: deque[tuple[Prompt, float, float, str]] = deque(maxlen=MAX_WAITING)

    def cut(self, prompt: Prompt, source: str) -> Iterator[Clip]:
        """The windows of one recording, and windows without a term of this one or an earlier one.

        Raises RecordError for words that are not in order or take no time.
        """
        prompt.check()
        terms, nested = self.phrases.longest(prompt.words)
        wanted_s: list[float] = []
        spans: set[tuple[float, float]] = set()
        for number, found in enumerate(terms):
            start_s = max(prompt.begin_s, prompt.starts_s[found.first] - self.margin_s)
            end_s = min(prompt.duration_s, prompt.ends_s[found.last] + self.margin_s)
            if end_s - start_s < TOLERANCE_S:
                raise RecordError("bad_words", f"{found.term!r} takes {end_s - start_s:.4f} s, which no word can")
            if (start_s, end_s) in spans:
                continue  # in a short recording the windows of two terms may be the whole of it
            spans.add((start_s, end_s))
            wanted_s.append(end_s - start_s)
            clip_id = f"{prompt.prompt_id}_term_{number}"
            yield stretch(prompt, start_s, end_s, clip_id, source, terms, nested, self.phrases.surfaces)
        self.num_term += len(spans)
        self._waiting.extend((prompt, start_s, end_s, source) for start_s, end_s in _gaps(prompt, [*terms, *nested]))
        for length_s in wanted_s:
            if self.num_no_term < int(self.num_term * self.no_term_ratio) and self._waiting:
                yield self._no_term(length_s)
        # A recording of many terms asks for more than it has gaps for: others make up for it.
        while self.num_no_term < int(self.num_term * self.no_term_ratio) and self._waiting:
            yield self._no_term(2 * self.margin_s + 0.5)

    def _no_term(self, length_s: float) -> Clip:
        prompt, start_s, end_s, source = self._waiting.popleft()
        clip_id = f"{prompt.prompt_id}_no_term_{round(start_s * 1000)}"
        length_s = min(max(length_s, MIN_GAP_S), end_s - start_s, MAX_CLIP_S)
        start_s += np.random.default_rng(key64(clip_id) & 0xFFFFFFFF).uniform(0.0, end_s - start_s - length_s + 1e-9)
        self.num_no_term += 1
        return stretch(prompt, start_s, min(end_s, start_s + length_s), clip_id, source, ())

    def report(self, where: str) -> None:
        """Log how many windows there are; a warning when gaps were too few."""
        wanted = int(self.num_term * self.no_term_ratio)
        logger.info("%s: %d windows with a term, %d without", where, self.num_term, self.num_no_term)
        if self.num_no_term < wanted:
            logger.warning("%s: gaps for %d windows without a term, not for %d", where, self.num_no_term, wanted)


def _gaps(prompt: Prompt, found: list[Found]) -> list[tuple[float, float]]:
    """(start, end) in seconds of the stretches of whole words between terms, the widest first; each holds a word."""
    named = {word for one in found for word in range(one.first, one.last + 1)}
    named |= {at for at, word in enumerate(prompt.words) if not word}  # unknown words may be a term
    gaps: list[tuple[float, float]] = []
    first: int | None = None
    for word in range(len(prompt.words) + 1):
        free = word < len(prompt.words) and word not in named
        if free and first is None:
            first = word
        elif not free and first is not None:
            # Up to the neighbouring words' edges; the recording's own edges where there is no neighbour.
            start_s = prompt.ends_s[first - 1] if first else prompt.begin_s
            end_s = prompt.starts_s[word] if word < len(prompt.words) else prompt.duration_s
            if end_s - start_s >= MIN_GAP_S:
                gaps.append((start_s, end_s))
            first = None
    return sorted(gaps, key=lambda gap: gap[0] - gap[1])
