"""Random windows out of whole prompts with word times: clips without end out of little audio.

A window takes in whole words, with a margin of up to MARGIN_S on either side. What it holds is told in
data/timed_words.py; terms within longer terms are terms here, too.

The word file is JSON Lines: {"id", "audio", "duration_s", "words": [{"word", "start", "end"}, ...]}, seconds.
"""

from __future__ import annotations

import bisect
import itertools
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from data.clip import Clip
from data.drops import DropLog
from data.fields import RecordError, as_object, label_of
from data.paths import PathResolver
from data.phrases import Found, Phrases
from data.records import iterate_records
from data.settings import DataSettings
from data.terms import MIN_TERM_CHARS, is_usable_term, normalise_term
from data.timed_words import Prompt, stretch

logger = logging.getLogger(__name__)

MARGIN_S = 0.1
STREAM = 0x77696E  # keeps the windows' random numbers apart from those of the permutation and of augmentation


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
    record = as_object(record)
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
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
        raise RecordError("bad_words", f"allowed are objects with word, start, end ({error!r:.200})") from error
    prompt = Prompt(label_of(record, "id"), resolver.resolve(record["audio"]), duration_s, words, starts_s, ends_s)
    prompt.check()
    return prompt


class Windows:
    """Draws windows; `draw` is a pure function of (seed, epoch, index), the same on every rank."""

    def __init__(self, prompts: list[Prompt], terms: Iterable[str], settings: DataSettings) -> None:
        """`terms`: normal forms that are worth finding, those of the glossary and of the training clips."""
        if not prompts:
            raise ValueError("random windows need at least one prompt with word times")
        self.prompts = prompts
        self.settings = settings
        phrases = Phrases({term: term for term in terms})
        self.occurrences = [phrases.all(prompt.words) for prompt in prompts]
        if settings.window_words_as_terms:
            for prompt, found in zip(prompts, self.occurrences, strict=True):
                found += [Found(word, at, at) for at, word in enumerate(prompt.words) if _is_word_term(word)]
        # A window starts at a word drawn evenly over all words, so that long prompts get their share.
        self._word_offsets = list(itertools.accumulate((len(prompt.words) for prompt in prompts), initial=0))

    def possible_terms(self) -> set[str]:
        """Every term that a window may have as a positive."""
        return {one.term for found in self.occurrences for one in found}

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
        source = f"window of {prompt.prompt_id}"
        return stretch(prompt, start_s, end_s, clip_id, source, self.occurrences[which])


def _is_word_term(word: str) -> bool:
    return sum(char.isalpha() for char in word) >= MIN_TERM_CHARS and is_usable_term(word)
