"""The clips that are to be packed, each stretch of audio once and each id once, in a file instead of in memory.

Two passes over what an importer yields. The first writes each clip as a line of JSON and keeps two 64-bit keys of it,
of its audio (path and span) and of its id. Sorting the keys shows what was listed more than once, and the second pass
joins those and writes the final lines. Two million clips take some 100 MB of memory, however long their texts are.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import operator
import os
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from data.clip import Clip, joined
from data.columns import COPY_BYTES, Spool
from data.drops import DropLog
from data.terms import key64

_encode = json.JSONEncoder(ensure_ascii=False).encode  # json.dumps would make one for each clip
_values = operator.attrgetter(*(field.name for field in fields(Clip)))


def write_listing(clips: Iterable[Clip], path: Path, drops: DropLog) -> tuple[int, str]:
    """(number of clips, SHA-256 of the listing). What was listed twice is joined as `load_clips` does, and noted."""
    with tempfile.TemporaryFile(dir=path.parent) as lines:
        offsets, audio_keys, id_keys = (Spool(np.int64, path.parent) for _ in range(3))
        for clip in clips:
            offsets.append(lines.tell())
            audio_keys.append(key64(f"{clip.audio_path}\0{clip.start_s}\0{clip.end_s}"))
            id_keys.append(key64(clip.clip_id))
            lines.write(to_line(clip))
        offsets.append(lines.tell())
        return _join(lines, offsets.read(), audio_keys.read(), id_keys.read(), path, drops)


def _join(
    lines: BinaryIO,
    offsets_C1: np.ndarray,
    audio_keys_C: np.ndarray,
    id_keys_C: np.ndarray,
    path: Path,
    drops: DropLog,
) -> tuple[int, str]:
    # Places take 4 bytes each, and what is not needed any longer goes: this is where memory is at its highest.
    kind: type[np.integer] = np.int32 if len(audio_keys_C) < 1 << 31 else np.int64
    # Rows of one audio lie side by side in `by_audio`, in file order.
    by_audio = np.argsort(audio_keys_C, kind="stable").astype(kind)
    ordered = audio_keys_C[by_audio]
    del audio_keys_C
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]][: len(ordered)]).astype(kind)
    num_rows = np.diff(starts, append=kind(len(ordered)))
    del ordered
    firsts = by_audio[starts]
    id_keys_G = id_keys_C[firsts]
    del id_keys_C
    numbers = _Numbers(id_keys_G)
    is_alone = (num_rows == 1) & numbers.is_alone(id_keys_G)
    del id_keys_G
    in_file_order = np.argsort(firsts, kind="stable").astype(kind)
    rows, is_alone = firsts[in_file_order], is_alone[in_file_order]
    del firsts
    # Nearly all clips are listed once under an id of their own: neighbours of these are copied as they are.
    goes_on = is_alone[1:] & is_alone[:-1] & (np.diff(rows) == 1)
    heads = np.flatnonzero(np.r_[True, ~goes_on][: len(rows)]).astype(kind)
    del goes_on
    digest = hashlib.sha256()
    with open(path, "wb") as out:
        for run, head in enumerate(heads):  # not as a list, which would be far larger
            stop = heads[run + 1] if run + 1 < len(heads) else len(rows)
            if is_alone[head]:
                pieces = _pieces(lines, int(offsets_C1[rows[head]]), int(offsets_C1[rows[stop - 1] + 1]))
            else:
                group = in_file_order[head]
                same = by_audio[starts[group] : starts[group] + num_rows[group]]
                clip = _clip_at(lines, int(offsets_C1[same[0]]))
                for row in same[1:].tolist():
                    clip = joined(clip, _clip_at(lines, int(offsets_C1[row])), drops)
                pieces = iter([to_line(numbers.unique(clip, drops))])
            for piece in pieces:
                digest.update(piece)
                out.write(piece)
    return len(rows), digest.hexdigest()


class _Numbers:
    """Gives the second and later clips of one id a number, as `load_clips` does."""

    def __init__(self, keys_C: np.ndarray) -> None:
        self.keys_K, self.num_clips_K = np.unique(keys_C, return_counts=True)
        self.num_given_K = np.zeros(len(self.keys_K), dtype=np.int32)

    def is_alone(self, keys_G: np.ndarray) -> np.ndarray:
        """bool [G]: whether one clip only has the id of this key."""
        return self.num_clips_K[np.searchsorted(self.keys_K, keys_G)] == 1

    def unique(self, clip: Clip, drops: DropLog) -> Clip:
        place = self._place(clip.clip_id)
        assert place is not None, clip.clip_id
        if self.num_clips_K[place] == 1:
            return clip
        self.num_given_K[place] += 1
        if self.num_given_K[place] == 1:
            return clip
        while self._place(name := f"{clip.clip_id}#{self.num_given_K[place]}") is not None:
            self.num_given_K[place] += 1
        drops.note("repeated_id", clip.source, f"{clip.clip_id!r} again, with other audio; kept as {name!r}")
        return replace(clip, clip_id=name)

    def _place(self, name: str) -> int | None:
        """Where the id stands among those of the clips."""
        key = key64(name)
        place = int(np.searchsorted(self.keys_K, key))
        return place if place < len(self.keys_K) and int(self.keys_K[place]) == key else None


def to_line(clip: Clip) -> bytes:
    return _encode(_values(clip)).encode() + b"\n"


def of_line(line: bytes) -> Clip:
    values: list[Any] = [tuple(value) if isinstance(value, list) else value for value in json.loads(line)]
    return Clip(*values)


def _clip_at(lines: BinaryIO, offset: int) -> Clip:
    lines.seek(offset)
    return of_line(lines.readline())


def _pieces(lines: BinaryIO, start: int, stop: int) -> Iterator[bytes]:
    lines.seek(start)
    for at in range(start, stop, COPY_BYTES):
        yield lines.read(min(COPY_BYTES, stop - at))


class ListedBlock(NamedTuple):
    """Neighbours in a listing."""

    offset: int
    num_bytes: int
    num_clips: int


def blocks_of(path: Path, size: int, first: int = 0) -> Iterator[ListedBlock]:
    """The listing by blocks of `size` clips from clip `first` on, unread: `clips_at` reads one, in any process."""
    with open(path, "rb") as file:
        offset = sum(map(len, itertools.islice(file, first)))
        while lengths := list(map(len, itertools.islice(file, size))):
            yield ListedBlock(offset, sum(lengths), len(lengths))
            offset += sum(lengths)


def clips_at(descriptor: int, block: ListedBlock) -> list[Clip]:
    """The clips of a block of the listing that is open under the descriptor."""
    return list(map(of_line, os.pread(descriptor, block.num_bytes, block.offset).splitlines()))


def read_listing(path: Path, every: int = 1) -> Iterator[Clip]:
    """The final clips, in order; with `every` only each so manyth."""
    with open(path, "rb") as file:
        for line in itertools.islice(file, 0, None, every):
            yield of_line(line)
