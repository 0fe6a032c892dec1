"""`Clip`: one stretch of audio with what is said in it. Every format becomes clips, and they are made here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from data.drops import DropLog
from data.fields import RecordError, check_order
from data.terms import normalise_term, unusable_reason

MAX_TEXT_CHARS = 3000  # nobody says as much in 30 s


@dataclass(frozen=True, slots=True)
class Clip:
    """One stretch of audio with what is said in it."""

    clip_id: str  # unique within its file
    audio_path: str  # a file, or a place within one (data/containers.py)
    start_s: float | None  # None: the whole file
    end_s: float | None
    text: str
    terms: tuple[str, ...]  # normal forms, the positives
    ignored: tuple[str, ...]  # normal forms of terms that are neither positive nor a fair negative
    surfaces: tuple[str, ...]  # `terms` as written, for display
    is_no_term: bool
    source: str  # file and record, for messages
    segment_id: str = ""  # as in the record; several clips of one utterance may share it
    duration_s: float | None = None  # known once the header was read
    speaker: str = ""  # empty: not told
    recording: str = ""  # the session that it was cut from; empty: not told


def make_clip(
    *,
    clip_id: str,
    audio_path: str,
    span_s: tuple[float | None, float | None],
    text: str,
    written: list[str],
    ignored: list[str],
    source: str,
    drops: DropLog,
    speaker: str = "",
    recording: str = "",
) -> Clip:
    """A clip from terms as written: normal forms, each once; an unusable one is noted in `drops` and ignored.

    Raises RecordError for a text that no clip can hold, and a span that does not go forward.
    """
    check_order(*span_s, "the start", "the end")
    if len(text) > MAX_TEXT_CHARS:
        raise RecordError("text_too_long", f"{len(text)} characters; allowed are {MAX_TEXT_CHARS}")
    surfaces: dict[str, str] = {}
    others = {normalise_term(term): None for term in ignored}
    for surface in written:
        term = normalise_term(surface)
        reason = unusable_reason(term)
        if reason:
            drops.note(reason, source, f"{surface!r:.200}")
            others[term] = None  # it is spoken, so a variant of it in a glossary is no fair negative
        else:
            surfaces.setdefault(term, surface.strip())
    return Clip(
        clip_id=clip_id,
        audio_path=audio_path,
        start_s=span_s[0],
        end_s=span_s[1],
        text=text,
        terms=tuple(surfaces),
        ignored=tuple(term for term in others if term and term not in surfaces),
        surfaces=tuple(surfaces.values()),
        is_no_term=not surfaces,
        source=source,
        segment_id=clip_id,
        speaker=speaker,
        recording=recording,
    )


def merged(first: Clip, second: Clip) -> Clip:
    """The first clip with the terms of both: the same audio, listed once a term."""
    surfaces = dict(zip(first.terms, first.surfaces, strict=True))
    for term, surface in zip(second.terms, second.surfaces, strict=True):
        surfaces.setdefault(term, surface)
    ignored = dict.fromkeys((*first.ignored, *second.ignored))
    return replace(
        first,
        terms=tuple(surfaces),
        surfaces=tuple(surfaces.values()),
        ignored=tuple(term for term in ignored if term not in surfaces),
        is_no_term=not surfaces,
    )


def joined(known: Clip, again: Clip, drops: DropLog) -> Clip:
    """What two clips of the same audio become, the second of which is dropped or noted."""
    if again.text != known.text:
        drops.add("conflicting_text", again.source, f"{again.text!r:.60}, but {known.source} has {known.text!r:.60}")
        return known
    if again.segment_id == known.segment_id and again.terms == known.terms:
        drops.add("duplicate", again.source, f"the same record as {known.source}")
        return known
    # The same audio listed once a term: apart, each record's terms would be negatives of the other.
    drops.note("merged_same_audio", again.source, f"terms joined to those of {known.source}")
    return merged(known, again)
