"""Random windows out of whole prompts with word times: clips without end out of little audio.

A window takes in whole words, with a margin of up to MARGIN_S on either side. Words wholly inside (20 ms tolerance) are
its text; glossary terms all of whose words are inside are its terms, nested ones included; a term that the window
cuts is ignored, neither positive nor negative.

The word file is JSON Lines: {"id", "audio", "duration_s", "words": [{"word", "start", "end"}, ...]}, seconds.
"""

from __future__ import annotations

import bisect
import itertools
import logging
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data.clips import Clip, PathResolver, RecordError
from data.drops import DropLog
from data.records import iterate_records
from data.settings import DataSettings
from data.terms import MIN_TERM_CHARS, is_usable_term, normalise_term

logger = logging.getLogger(__name__)

MARGIN_S = 0.1
TOLERANCE_S = 0.02
MAX_TERM_WORDS = 8
STREAM = 0x77696E  # keeps the windows' random numbers apart from those of the permutation and of augmentation


@dataclass(frozen=True, slots=True)
class Prompt:
    """A whole recording with its words; times in seconds from its start."""

    prompt_id: str
    audio_path: str
    duration_s: float
    words: tuple[str, ...]  # normal forms
    starts_s: tuple[float, ...]
    ends_s: tuple[float, ...]


def load_prompts(path: str | Path, settings: DataSettings, drops: DropLog) -> list[Prompt]:
    """Prompts of a word file. Bad lines are added to `drops`; ValueError when there is none left."""
    resolver = PathResolver(Path(path), settings)
    prompts = []
    for index, record in iterate_records(path):
        source = f"{path}:{index}"
        drops.seen()
        try:
            prompts.append(_prompt(record, resolver))
        except RecordError as error:
            drops.add(error.reason, source, error.detail)
    if not prompts:
        raise ValueError(f"word_times_path {path}: no usable prompt; {drops.summary()}")
    return prompts


def _prompt(record: Any, resolver: PathResolver) -> Prompt:
    if not isinstance(record, dict):
        raise RecordError("not_an_object", f"{type(record).__name__}; allowed is an object")
    missing = {"id", "audio", "duration_s", "words"} - record.keys()
    if missing:
        raise RecordError("missing_field", f"no {', '.join(sorted(missing))}")
    if not isinstance(record["audio"], str) or not isinstance(record["words"], list) or not record["words"]:
        raise RecordError("wrong_type", "allowed are a string `audio` and a filled list `words`")
    try:
        duration_s = float(record["duration_s"])
        words = tuple(normalise_term(word["word"]) for word in record["words"])
        starts_s = tuple(float(word["start"]) for word in record["words"])
        ends_s = tuple(float(word["end"]) for word in record["words"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise RecordError("bad_words", f"allowed are objects with word, start, end ({error!r})") from error
    ordered = all(0 <= start < end for start, end in zip(starts_s, ends_s, strict=True))
    ordered &= all(earlier <= later for earlier, later in itertools.pairwise(starts_s))
    if not ordered or not math.isfinite(duration_s) or ends_s[-1] > duration_s + 0.05:
        raise RecordError("bad_words", f"word times do not go forward from 0 to {duration_s} s")
    return Prompt(str(record["id"]), resolver.resolve(record["audio"]), duration_s, words, starts_s, ends_s)


class Windows:
    """Draws windows; `draw` is a pure function of (seed, epoch, index), the same on every rank."""

    def __init__(self, prompts: list[Prompt], terms: Iterable[str], settings: DataSettings) -> None:
        """`terms`: normal forms that are worth finding, those of the glossary and of the training clips."""
        if not prompts:
            raise ValueError("random windows need at least one prompt with word times")
        self.prompts = prompts
        self.settings = settings
        phrases = {tuple(term.replace("-", " ").split()): term for term in terms}
        phrases = {words: term for words, term in phrases.items() if 0 < len(words) <= MAX_TERM_WORDS}
        # (term, first word, last word) of each prompt.
        self.occurrences = [_occurrences(prompt.words, phrases) for prompt in prompts]
        # A window starts at a word drawn evenly over all words, so that long prompts get their share.
        self._word_offsets = list(itertools.accumulate((len(prompt.words) for prompt in prompts), initial=0))

    def possible_terms(self) -> set[str]:
        """Every term that a window may have as a positive."""
        possible = {term for found in self.occurrences for term, _, _ in found}
        if self.settings.window_words_as_terms:
            possible |= {word for prompt in self.prompts for word in prompt.words if _is_word_term(word)}
        return possible

    def whole_clips(self) -> list[Clip]:
        """Each prompt as one clip, for the check that no test audio gets into training by way of windows."""
        return [
            self.clip(which, 0.0, prompt.duration_s, f"prompt:{prompt.prompt_id}")
            for which, prompt in enumerate(self.prompts)
        ]

    def draw(self, seed: int, epoch: int, index: int) -> Clip:
        """Window number `index` of the epoch, 0 and up, as a clip."""
        rng = np.random.default_rng((STREAM, seed, epoch, index))
        word = int(rng.integers(self._word_offsets[-1]))
        which = bisect.bisect_right(self._word_offsets, word) - 1
        prompt = self.prompts[which]
        wanted_s = rng.uniform(self.settings.window_min_s, self.settings.window_max_s)
        first, last = self._span(prompt, word - self._word_offsets[which], wanted_s)
        start_s = max(0.0, prompt.starts_s[first] - rng.uniform(0.0, MARGIN_S))
        end_s = min(prompt.duration_s, prompt.ends_s[last] + rng.uniform(0.0, MARGIN_S))
        return self.clip(which, start_s, end_s, f"window:{epoch}:{index}:{prompt.prompt_id}")

    def _span(self, prompt: Prompt, first: int, wanted_s: float) -> tuple[int, int]:
        """First and last word: from `first` on, as many as fit into `wanted_s` (one at least)."""
        last = first
        while last + 1 < len(prompt.words) and prompt.ends_s[last + 1] - prompt.starts_s[first] <= wanted_s:
            last += 1
        # At a prompt's end, or with short words, reach the shortest allowed length by words before, then after.
        while prompt.ends_s[last] - prompt.starts_s[first] < self.settings.window_min_s:
            if first > 0:
                first -= 1
            elif last + 1 < len(prompt.words):
                last += 1
            else:
                break
        return first, last

    def clip(self, which: int, start_s: float, end_s: float, clip_id: str) -> Clip:
        """The clip of prompt number `which` from `start_s` to `end_s`."""
        prompt = self.prompts[which]
        starts_s, ends_s = prompt.starts_s, prompt.ends_s
        num_words = len(prompt.words)
        inside = [starts_s[k] >= start_s - TOLERANCE_S and ends_s[k] <= end_s + TOLERANCE_S for k in range(num_words)]
        touched = [
            min(ends_s[k], end_s) - max(starts_s[k], start_s) > TOLERANCE_S or inside[k] for k in range(num_words)
        ]
        terms: dict[str, None] = {}
        ignored: dict[str, None] = {}
        for term, first, last in self.occurrences[which]:
            if all(inside[first : last + 1]):
                terms[term] = None
            elif any(touched[first : last + 1]):
                ignored[term] = None
        if self.settings.window_words_as_terms:
            for word, whole, part in zip(prompt.words, inside, touched, strict=True):
                if _is_word_term(word):
                    if whole:
                        terms[word] = None
                    elif part:
                        ignored[word] = None
        return Clip(
            clip_id=clip_id,
            audio_path=prompt.audio_path,
            start_s=round(start_s, 4),
            end_s=round(end_s, 4),
            text=" ".join(word for word, whole in zip(prompt.words, inside, strict=True) if whole),
            terms=tuple(terms),
            ignored=tuple(term for term in ignored if term not in terms),
            surfaces=tuple(terms),
            is_no_term=not terms,
            source=f"window of {prompt.prompt_id}",
            segment_id=prompt.prompt_id,
            duration_s=end_s - start_s,
        )


def _is_word_term(word: str) -> bool:
    return sum(char.isalpha() for char in word) >= MIN_TERM_CHARS and is_usable_term(word)


def _occurrences(words: tuple[str, ...], phrases: dict[tuple[str, ...], str]) -> list[tuple[str, int, int]]:
    """Every glossary term in the words, nested and overlapping ones included."""
    return [
        (phrases[words[first:stop]], first, stop - 1)
        for first in range(len(words))
        for stop in range(first + 1, min(first + MAX_TERM_WORDS, len(words)) + 1)
        if words[first:stop] in phrases
    ]
