"""Chunks around a term, each with its own audio file or span (JSON array or JSON Lines): the samples of this project.

    {"segment_id": "POD02_S91", "term_chunk_audio": "a/POD02_S91_term_Artesia.wav",
     "term_chunk_text": "the city of artesia in", "term_chunk_audio_ground_truth_terms": ["Artesia"]}
 -> Clip("POD02_S91", ".../a/POD02_S91_term_Artesia.wav", text="the city of artesia in", terms=("artesia",))

Optional: `segment_id`, `term_chunk_audio_start` / `_end` (seconds within the file; else the whole file is the clip),
`partial_terms` (cut by the window: neither positive nor negative), `is_no_term_chunk`, `speaker`, `recording`.
Anything else is ignored: `term_start_time` and its like count from the start of an utterance that is not at hand.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from data.clip import Clip, make_clip
from data.fields import (
    RecordError,
    check_order,
    flag_of,
    label_of,
    seconds_of,
    shown,
    strings_of,
    text_of,
)
from data.formats.source import Source

START, END = "term_chunk_audio_start", "term_chunk_audio_end"
TERMS = "term_chunk_audio_ground_truth_terms"


def clips(source: Source) -> Iterator[Clip]:
    """One clip a record."""
    return source.convert_records(lambda where, record: [clip_of(record, where, source)])


def clip_of(record: dict[str, Any], where: str, source: Source) -> Clip:
    """The clip of one record. Raises RecordError."""
    segment_id = label_of(record, "segment_id", default=where)
    flag = flag_of(record, "is_no_term_chunk")
    written = strings_of(record, TERMS, default=[] if flag or "no_term" in segment_id else None)
    if flag and written:
        raise RecordError("no_term_with_terms", f"is_no_term_chunk is true, but the terms are {shown(written)}")
    start_s, end_s = seconds_of(record, START), seconds_of(record, END)
    check_order(start_s, end_s, START, END)
    return make_clip(
        clip_id=segment_id,
        audio_path=source.resolver.resolve(text_of(record, "term_chunk_audio", may_be_empty=False)),
        span_s=(start_s, end_s),
        text=text_of(record, "term_chunk_text"),
        written=written,
        ignored=strings_of(record, "partial_terms", default=[]),
        source=where,
        drops=source.drops,
        speaker=text_of(record, "speaker", default=""),
        recording=text_of(record, "recording", default=""),
    )


def record_of(clip: Clip) -> dict[str, Any]:
    """The record that `clips` reads as this clip again."""
    record: dict[str, Any] = {
        "segment_id": clip.clip_id,
        "term_chunk_audio": clip.audio_path,
        "term_chunk_text": clip.text,
        TERMS: list(clip.surfaces),
        START: clip.start_s,
        END: clip.end_s,
        "partial_terms": list(clip.ignored),
        "is_no_term_chunk": clip.is_no_term,
        "speaker": clip.speaker,
        "recording": clip.recording,
    }
    return {
        name: value
        for name, value in record.items()
        if value not in (None, "", []) or name in (TERMS, "term_chunk_text")
    }
