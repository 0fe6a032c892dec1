"""Recordings with the times of their words, and the clip that a stretch of one makes.

Words wholly inside the stretch (20 ms tolerance) are its text, terms all of whose words are inside are its terms; a
term that the stretch cuts is ignored, neither positive nor negative.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from data.clip import Clip
from data.fields import RecordError
from data.phrases import Found

TOLERANCE_S = 0.02


@dataclass(frozen=True, slots=True)
class Prompt:
    """A recording, or a part of one, with its words; times in seconds from the start of the file."""

    prompt_id: str
    audio_path: str
    duration_s: float  # of the file, or where the part ends
    words: tuple[str, ...]  # normal forms; empty where nobody knows what was said
    starts_s: tuple[float, ...]
    ends_s: tuple[float, ...]
    begin_s: float = 0.0  # where the part begins
    speaker: str = ""
    recording: str = ""

    def check(self) -> None:
        """RecordError "bad_words" unless there are words, and they go forward within the part."""
        ordered = all(0 <= start < end for start, end in zip(self.starts_s, self.ends_s, strict=True))
        ordered &= all(earlier <= later for earlier, later in itertools.pairwise(self.starts_s))
        ordered &= bool(self.words) and math.isfinite(self.duration_s) and self.begin_s < self.duration_s
        if not ordered or self.starts_s[0] < self.begin_s - 0.05 or max(self.ends_s) > self.duration_s + 0.05:
            raise RecordError("bad_words", f"word times do not go forward from {self.begin_s} to {self.duration_s} s")


def stretch(
    prompt: Prompt,
    start_s: float,
    end_s: float,
    clip_id: str,
    source: str,
    positives: Iterable[Found],
    others: Iterable[Found] = (),
    surfaces: Mapping[str, str] | None = None,
) -> Clip:
    """The clip of a prompt from `start_s` to `end_s`.

    Args:
        prompt: the recording.
        start_s: the stretch in seconds of the file.
        end_s: its end.
        clip_id: of the clip; its `segment_id` is the prompt's id.
        source: of the clip, for messages.
        positives: occurrences in the prompt's words that become terms when inside, and are ignored when cut.
        others: occurrences that are ignored also when inside.
        surfaces: normal form -> as written; by default the normal form.
    """
    starts_s, ends_s = prompt.starts_s, prompt.ends_s

    def inside(word: int) -> bool:
        return starts_s[word] >= start_s - TOLERANCE_S and ends_s[word] <= end_s + TOLERANCE_S

    def touched(word: int) -> bool:
        return min(ends_s[word], end_s) - max(starts_s[word], start_s) > TOLERANCE_S or inside(word)

    terms: dict[str, None] = {}
    ignored: dict[str, None] = {}
    for found in positives:
        if all(map(inside, range(found.first, found.last + 1))):
            terms[found.term] = None
        elif any(map(touched, range(found.first, found.last + 1))):
            ignored[found.term] = None
    for found in others:
        if any(map(touched, range(found.first, found.last + 1))):
            ignored[found.term] = None
    # Words are in the order of their starts, so those that are inside lie in this range.
    near = range(bisect_left(starts_s, start_s - TOLERANCE_S), bisect_right(starts_s, end_s + TOLERANCE_S))
    return Clip(
        clip_id=clip_id,
        audio_path=prompt.audio_path,
        start_s=round(start_s, 4),
        end_s=round(end_s, 4),
        text=" ".join(prompt.words[word] for word in near if prompt.words[word] and inside(word)),
        terms=tuple(terms),
        ignored=tuple(term for term in ignored if term not in terms),
        surfaces=tuple(surfaces[term] if surfaces else term for term in terms),
        is_no_term=not terms,
        source=source,
        segment_id=prompt.prompt_id,
        duration_s=end_s - start_s,
        speaker=prompt.speaker,
        recording=prompt.recording,
    )
