"""The successor of the term chunks: JSON Lines, one row a (chunk, term), grouped by utterance and chunk.

    {"term": "Pound Key", "term_key": "pound key", "chunk_src_text": "press the pound key",
     "utter_id": "u1", "chunk_idx": 0, "chunk_audio_path": "a/u1_0.wav"}
    {"term": "pound", ... the same utter_id and chunk_idx}
 -> Clip("u1::0", ".../a/u1_0.wav", text="press the pound key", terms=("pound key", "pound"))

An empty term makes a no-term clip. The rows of a chunk may stand anywhere in the file, so all are read before the
first clip comes; where another row of a chunk has other audio or text, that row is dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from data.clip import Clip, make_clip, merged
from data.fields import RecordError, label_of, text_of
from data.formats.source import Source


def clips(source: Source) -> Iterator[Clip]:
    """One clip a chunk."""
    chunks: dict[str, Clip] = {}

    def collect(where: str, record: dict[str, Any]) -> Iterable[Clip]:
        clip = _clip_of(record, where, source)
        known = chunks.get(clip.clip_id)
        if known is not None and (known.audio_path, known.text) != (clip.audio_path, clip.text):
            raise RecordError("conflicting_rows", f"other audio or text than {known.source} of the same chunk")
        chunks[clip.clip_id] = clip if known is None else merged(known, clip)
        return []

    yield from source.convert_records(collect)
    yield from chunks.values()


def _clip_of(record: dict[str, Any], where: str, source: Source) -> Clip:
    term = text_of(record, "term")
    return make_clip(
        clip_id=f"{text_of(record, 'utter_id', may_be_empty=False)}::{label_of(record, 'chunk_idx')}",
        audio_path=source.resolver.resolve(text_of(record, "chunk_audio_path", may_be_empty=False)),
        span_s=(None, None),
        text=text_of(record, "chunk_src_text"),
        written=[term] if term else [],
        ignored=[],
        source=where,
        drops=source.drops,
        speaker=text_of(record, "speaker", default=""),
    )
