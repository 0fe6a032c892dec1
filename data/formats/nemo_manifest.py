"""NeMo manifests: JSON Lines, one utterance a line, with its place in an audio file.

    {"audio_filepath": "a/call7.wav", "offset": 12.5, "duration": 3.2, "text": "press the pound key", "speaker": "s1"}
 -> Clip("call7_12.5", ".../a/call7.wav", 12.5, 15.7, text="press the pound key", terms=("pound key",))

Without `offset` the clip starts with the file; without `duration` it is all of the rest. Labels are the list `terms`
where a line has one (what `lines_of` writes), else the glossary's terms in the text.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import PurePath
from typing import Any

from data.clip import Clip, make_clip
from data.fields import RecordError, label_of, seconds_of, text_of
from data.formats.source import Source


def clips(source: Source) -> Iterator[Clip]:
    """One clip a line. Raises ValueError when lines have no labels and no glossary is set."""
    return source.convert_records(lambda where, record: [_clip_of(record, where, source)])


def _clip_of(record: dict[str, Any], where: str, source: Source) -> Clip:
    written_path = text_of(record, "audio_filepath", may_be_empty=False)
    offset_s, duration_s = seconds_of(record, "offset"), seconds_of(record, "duration")
    if duration_s == 0:
        raise RecordError("bad_span", "duration is 0; allowed are seconds above 0")
    # Without an offset the duration is that of the whole file, rounded: the file itself says it better.
    end_s = None if offset_s is None or duration_s is None else round(offset_s + duration_s, 6)
    text = text_of(record, "text")
    written, ignored = source.labels(record, text)
    stem = PurePath(written_path).stem
    return make_clip(
        clip_id=label_of(record, "id", default=stem if offset_s is None else f"{stem}_{offset_s:g}"),
        audio_path=source.resolver.resolve(written_path),
        span_s=(offset_s, end_s),
        text=text,
        written=written,
        ignored=ignored,
        source=where,
        drops=source.drops,
        speaker=text_of(record, "speaker", default=""),
        recording=text_of(record, "recording", default=""),
    )


def line_of(clip: Clip) -> dict[str, Any]:
    """The line that NeMo reads, and that `clips` reads as this clip again. `duration_s` must be known."""
    assert clip.duration_s is not None, f"{clip.clip_id}: check_clips was not called"
    line: dict[str, Any] = {"audio_filepath": clip.audio_path}
    if clip.start_s is not None or clip.end_s is not None:
        line["offset"] = clip.start_s or 0.0
    line |= {"duration": round(clip.duration_s, 6), "text": clip.text, "id": clip.clip_id}
    line |= {name: value for name in ("speaker", "recording") if (value := getattr(clip, name))}
    return line | {"terms": list(clip.surfaces), "ignored_terms": list(clip.ignored)}
