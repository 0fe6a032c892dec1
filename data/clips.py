"""Samples files in, `Clip`s out: the format told, audio paths resolved, one clip a stretch of audio, no refusal silent.

What each format looks like stands at the top of its importer in data/formats/.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from data.clip import Clip, joined
from data.drops import DropLog
from data.fields import RecordError
from data.formats.detect import importer_for
from data.formats.source import Source
from data.paths import PathResolver
from data.settings import InputSettings
from data.shards import is_packed, open_packed

__all__ = ["Clip", "PathResolver", "RecordError", "iterate_clips", "joined", "load_clips"]


def iterate_clips(path: str | Path, settings: InputSettings, drops: DropLog) -> Iterator[Clip]:
    """Each usable clip as its record comes by, in file order; `load_clips` also joins what is listed more than once.

    Bad records are added to `drops`. Raises ValueError for a file that cannot be read or is of no known format, and
    for a format without labels when no glossary is set.
    """
    if is_packed(path):
        table = open_packed(path)
        drops.seen(len(table))
        yield from table
        return
    source = Source(Path(path), settings, drops)
    yield from importer_for(source.path, settings)(source)
    source.resolver.warn_of_unused()


def load_clips(path: str | Path, settings: InputSettings, drops: DropLog) -> list[Clip]:
    """All usable clips of a samples file or folder, in file order, one a stretch of audio, each id once.

    Bad records are added to `drops` (the caller checks the limit); raises ValueError as `iterate_clips` does, and
    when there is no clip at all.
    """
    clips: dict[tuple[str, float | None, float | None], Clip] = {}  # by audio and span
    taken: dict[str, int] = {}  # by id, how many clips were given it
    for clip in iterate_clips(path, settings, drops):
        identity = (clip.audio_path, clip.start_s, clip.end_s)
        known = clips.get(identity)
        if known is None:
            clip = _with_unique_id(clip, taken, drops)
            clips[identity] = clip
        else:
            clips[identity] = joined(known, clip, drops)
    if not clips:
        raise ValueError(f"{path}: no usable clip; {drops.summary()}")
    return list(clips.values())


def _with_unique_id(clip: Clip, taken: dict[str, int], drops: DropLog) -> Clip:
    """Several clips of one utterance may carry its id: number the later ones."""
    number = taken.get(clip.clip_id, 0) + 1
    if number == 1:
        taken[clip.clip_id] = 1
        return clip
    while f"{clip.clip_id}#{number}" in taken:
        number += 1
    taken[clip.clip_id] = number
    taken[f"{clip.clip_id}#{number}"] = 1
    drops.note("repeated_id", clip.source, f"{clip.clip_id!r} again, with other audio; kept as #{number}")
    return replace(clip, clip_id=f"{clip.clip_id}#{number}")
