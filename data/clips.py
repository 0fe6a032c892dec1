"""Sample files in, `Clip`s out: fields checked, terms normalised, audio paths resolved, every refusal counted.

A record (JSON array or JSON Lines):

    {"segment_id": "POD02_S91", "term_chunk_audio": "a/POD02_S91_term_Artesia.wav",
     "term_chunk_text": "the city of artesia in", "term_chunk_audio_ground_truth_terms": ["Artesia"]}

Optional: `segment_id`, `term_chunk_audio_start` / `_end` (seconds within the file; else the whole file is the clip),
`partial_terms` (cut by the window: neither positive nor negative), `is_no_term_chunk`. Anything else is ignored:
`term_start_time` and its like count from the start of an utterance that is not at hand.

The chunked format (JSON Lines, one row a term) has `term, term_key, chunk_src_text, utter_id, chunk_idx,
chunk_audio_path`; rows of one `utter_id::chunk_idx` make one clip, an empty term makes it a no-term clip.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from data.drops import DropLog
from data.records import iterate_records
from data.settings import DataSettings
from data.terms import normalise_term, unusable_reason

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Clip:
    """One stretch of audio with what is said in it."""

    clip_id: str  # unique within its file
    audio_path: str
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


class RecordError(Exception):
    """A record that cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def load_clips(path: str | Path, settings: DataSettings, drops: DropLog) -> list[Clip]:
    """All usable clips of a samples file, in file order.

    Bad records are added to `drops` (the caller checks the limit); raises ValueError for a file that is not JSON or
    yields no clip at all.
    """
    resolver = PathResolver(Path(path), settings)
    clips: dict[tuple[str, float | None, float | None], Clip] = {}  # by audio and span
    taken: set[str] = set()
    for clip in _clips(Path(path), resolver, drops):
        identity = (clip.audio_path, clip.start_s, clip.end_s)
        known = clips.get(identity)
        if known is None:
            clip = _with_unique_id(clip, taken, drops)
            taken.add(clip.clip_id)
            clips[identity] = clip
        elif clip.segment_id == known.segment_id and clip.terms == known.terms and clip.text == known.text:
            drops.add("duplicate", clip.source, f"the same record as {known.source}")
        elif clip.text != known.text:
            drops.add("conflicting_text", clip.source, f"{clip.text!r:.60}, but {known.source} has {known.text!r:.60}")
        else:
            # The same audio listed once a term: apart, each record's terms would be negatives of the other.
            drops.note("merged_same_audio", clip.source, f"terms joined to those of {known.source}")
            clips[identity] = _merged(known, clip)
    resolver.warn_of_unused_remaps()
    if not clips:
        raise ValueError(f"{path}: no usable clip; {drops.summary()}")
    return list(clips.values())


def _clips(path: Path, resolver: PathResolver, drops: DropLog) -> Iterator[Clip]:
    chunk_rows: dict[str, Clip] = {}
    for index, record in iterate_records(path):
        source = f"{path}:{index}"
        drops.seen()
        try:
            if not isinstance(record, dict):
                raise RecordError("not_an_object", f"{type(record).__name__}; allowed is an object")
            if "chunk_audio_path" in record and "term_chunk_audio" not in record:
                clip = _clip_of_chunk_row(record, source, resolver, drops)
                known = chunk_rows.get(clip.clip_id)
                if known is not None and (known.audio_path, known.text) != (clip.audio_path, clip.text):
                    raise RecordError("conflicting_rows", f"other audio or text than {known.source} of the same chunk")
                chunk_rows[clip.clip_id] = clip if known is None else _merged(known, clip)
            else:
                yield _clip_of_record(record, source, resolver, drops)
        except RecordError as error:
            drops.add(error.reason, source, error.detail)
    yield from chunk_rows.values()


def _clip_of_record(record: dict[str, Any], source: str, resolver: PathResolver, drops: DropLog) -> Clip:
    segment_id = record.get("segment_id", source)
    if isinstance(segment_id, bool) or not isinstance(segment_id, str | int):
        raise RecordError("wrong_type", f"segment_id is {_shown(segment_id)}; allowed is a string")
    segment_id = str(segment_id)
    flag = record.get("is_no_term_chunk", False)
    if not isinstance(flag, bool):
        raise RecordError("wrong_type", f"is_no_term_chunk is {_shown(flag)}; allowed are true and false")
    says_no_term = flag or "no_term" in segment_id
    written = _strings(record, "term_chunk_audio_ground_truth_terms", default=[] if says_no_term else None)
    if flag and written:
        raise RecordError("no_term_with_terms", f"is_no_term_chunk is true, but the terms are {written!r:.80}")
    start_s, end_s = _seconds(record, "term_chunk_audio_start"), _seconds(record, "term_chunk_audio_end")
    if start_s is not None and end_s is not None and start_s >= end_s:
        raise RecordError("bad_span", f"term_chunk_audio_start {start_s} is not before term_chunk_audio_end {end_s}")
    return _clip(
        clip_id=segment_id,
        audio_path=resolver.resolve(_text(record, "term_chunk_audio", may_be_empty=False)),
        span_s=(start_s, end_s),
        text=_text(record, "term_chunk_text"),
        written=written,
        partial=_strings(record, "partial_terms", default=[]),
        source=source,
        drops=drops,
    )


def _clip_of_chunk_row(record: dict[str, Any], source: str, resolver: PathResolver, drops: DropLog) -> Clip:
    chunk_idx = record.get("chunk_idx")
    if isinstance(chunk_idx, bool) or not isinstance(chunk_idx, str | int):
        reason = "missing_field" if "chunk_idx" not in record else "wrong_type"
        raise RecordError(reason, f"chunk_idx is {_shown(chunk_idx)}; allowed is an integer")
    term = _text(record, "term")
    return _clip(
        clip_id=f"{_text(record, 'utter_id', may_be_empty=False)}::{chunk_idx}",
        audio_path=resolver.resolve(_text(record, "chunk_audio_path", may_be_empty=False)),
        span_s=(None, None),
        text=_text(record, "chunk_src_text"),
        written=[term] if term else [],
        partial=[],
        source=source,
        drops=drops,
    )


def _clip(
    *,
    clip_id: str,
    audio_path: str,
    span_s: tuple[float | None, float | None],
    text: str,
    written: list[str],
    partial: list[str],
    source: str,
    drops: DropLog,
) -> Clip:
    surfaces: dict[str, str] = {}
    ignored = {normalise_term(term): None for term in partial}
    for surface in written:
        term = normalise_term(surface)
        reason = unusable_reason(term)
        if reason:
            drops.note(reason, source, repr(surface))
            ignored[term] = None  # it is spoken, so a variant of it in a glossary is no fair negative
        else:
            surfaces.setdefault(term, surface.strip())
    return Clip(
        clip_id=clip_id,
        audio_path=audio_path,
        start_s=span_s[0],
        end_s=span_s[1],
        text=text,
        terms=tuple(surfaces),
        ignored=tuple(term for term in ignored if term and term not in surfaces),
        surfaces=tuple(surfaces.values()),
        is_no_term=not surfaces,
        source=source,
        segment_id=clip_id,
    )


def _merged(first: Clip, second: Clip) -> Clip:
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


def _with_unique_id(clip: Clip, taken: set[str], drops: DropLog) -> Clip:
    """Several clips of one utterance may carry its id: number the later ones."""
    if clip.clip_id not in taken:
        return clip
    number = 2
    while f"{clip.clip_id}#{number}" in taken:
        number += 1
    drops.note("repeated_id", clip.source, f"{clip.clip_id!r} again, with other audio; kept as #{number}")
    return replace(clip, clip_id=f"{clip.clip_id}#{number}")


# ---------------------------------------------------------------- fields


def _text(record: dict[str, Any], name: str, may_be_empty: bool = True) -> str:
    if name not in record:
        raise RecordError("missing_field", f"no {name}; there are {', '.join(sorted(map(str, record))[:8])}")
    value = record[name]
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name} is {_shown(value)}; allowed is a string")
    if not may_be_empty and not value.strip():
        raise RecordError("empty_field", f"{name} is empty")
    return _encodable(value, name).strip()


def _strings(record: dict[str, Any], name: str, default: list[str] | None) -> list[str]:
    if name not in record:
        if default is None:
            raise RecordError("missing_field", f"no {name}; there are {', '.join(sorted(map(str, record))[:8])}")
        return default
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordError("wrong_type", f"{name} is {_shown(value)}; allowed is a list of strings")
    return [_encodable(item, name) for item in value]


def _seconds(record: dict[str, Any], name: str) -> float | None:
    value = record.get(name)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong_type", f"{name} is {_shown(value)}; allowed is a number of seconds")
    if not math.isfinite(value) or value < 0:
        raise RecordError("bad_span", f"{name} is {value}; allowed are 0 and above")
    return float(value)


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("bad_text", f"{name} is {value!a:.60}, which holds half a surrogate pair") from error
    return value


def _shown(value: Any) -> str:
    return f"{value!r:.60} ({type(value).__name__})"


# ---------------------------------------------------------------- paths


class PathResolver:
    """Audio paths as written -> paths on this machine.

    `path_remap` is applied first. An absolute path is taken as it is. A relative one is looked for under `audio_root`
    where that is set, else in the folder of the samples file, then under `data_root`; it may not climb out of them.
    """

    def __init__(self, samples_path: Path, settings: DataSettings, exists: Callable[[str], bool] = os.path.lexists):
        roots = [settings.audio_root] if settings.audio_root else [str(samples_path.parent), settings.data_root]
        self.roots = [os.path.abspath(os.path.expanduser(root)) for root in roots]
        self.remaps = [tuple(pair.split("=", 1)) for pair in settings.path_remap]
        self.unused = {old for old, _ in self.remaps}
        self.exists = exists
        if settings.audio_root and not os.path.isdir(self.roots[0]):
            raise ValueError(f"audio_root is {settings.audio_root!r}, which is not a folder")

    def resolve(self, written: str) -> str:
        """An absolute path to something that exists; RecordError "missing" (says where it looked) or another."""
        if "\0" in written:
            raise RecordError("bad_path", f"{written!r:.60} holds a NUL")
        path = written
        for old, new in self.remaps:
            if path == old or path.startswith(old if old.endswith("/") else old + "/"):
                path = new + path[len(old) :]
                self.unused.discard(old)
                break
        candidates = [path] if os.path.isabs(path) else [os.path.join(root, path) for root in self.roots]
        for candidate, root in zip(candidates, self.roots, strict=False):
            inside = os.path.normpath(candidate)
            if not os.path.isabs(path) and not inside.startswith(root.rstrip("/") + "/"):
                raise RecordError("outside_root", f"{written!r} leaves {root}")
            if self.exists(inside):
                return inside
        raise RecordError("missing", f"{written!r}: looked for {', '.join(map(os.path.normpath, candidates))}")

    def warn_of_unused_remaps(self) -> None:
        for old in sorted(self.unused):
            logger.warning("path_remap %s=...: no audio path starts with it", old)
