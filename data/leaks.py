"""A test set that shares audio with the training set measures memory: such a pair of files is refused."""

from __future__ import annotations

import hashlib
import os
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from data.clips import Clip

EXAMPLES = 3
SAMPLE_BYTES = 4096
READ_THREADS = 16


class Span(NamedTuple):
    start_s: float
    end_s: float
    clip: Clip


def refuse_leaks(train: list[Clip], test: list[Clip], test_name: str = "test", content: bool = True) -> None:
    """Raise ValueError when a clip of `test` has an id of `train`, or audio that `train` holds too.

    Audio is the same when the file is the same one (links followed) and the spans overlap, or, with `content`, when
    another file holds the same bytes. Different parts of one long file are no leak.
    """
    found = _same_ids(train, test) or _same_spans(train, test) or (_same_content(train, test) if content else [])
    if not found:
        return
    kind = found[0][0]
    examples = "".join(f"\n  {a.source} and {b.source}: {b.clip_id}, {b.audio_path}" for _, a, b in found[:EXAMPLES])
    raise ValueError(
        f"{len(found)} of {len(test)} {test_name} clips have the same {kind} as training clips, so the measurement "
        f"would be of memory. For example (training, {test_name}):{examples}\n"
        f"Take them out of one of the two files (--train_samples_path, --{test_name}_samples_path)"
    )


Found = list[tuple[str, Clip, Clip]]


def _same_ids(train: list[Clip], test: list[Clip]) -> Found:
    known = {clip.segment_id: clip for clip in train}
    # A record without an id is named after its file and position, which says nothing about its content.
    return [
        ("id", known[clip.segment_id], clip)
        for clip in test
        if clip.segment_id in known and clip.segment_id != clip.source
    ]


def _same_spans(train: list[Clip], test: list[Clip]) -> Found:
    wanted = {os.path.realpath(clip.audio_path) for clip in test}
    spans: dict[str, list[Span]] = defaultdict(list)
    for clip in train:
        path = os.path.realpath(clip.audio_path)
        if path in wanted:
            spans[path].append(_span(clip))
    found: Found = []
    for clip in test:
        mine = _span(clip)
        for other in spans.get(os.path.realpath(clip.audio_path), ()):
            if mine.start_s < other.end_s and other.start_s < mine.end_s:
                found.append(("audio", other.clip, clip))
                break
    return found


def _span(clip: Clip) -> Span:
    return Span(clip.start_s or 0.0, float("inf") if clip.end_s is None else clip.end_s, clip)


def _same_content(train: list[Clip], test: list[Clip]) -> Found:
    """By size, then by 4 kB out of the middle, and only then by all bytes: most files are never read whole."""
    train_of, test_of = _by_file(train), _by_file(test)
    shared = set(train_of) & set(test_of)  # one file in both: spans were compared already
    candidates = [path for path in (*train_of, *test_of) if path not in shared]
    for measure in (os.path.getsize, _middle_hash, _whole_hash):
        groups: dict[object, list[str]] = defaultdict(list)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for path, value in zip(candidates, pool.map(lambda p, m=measure: _or_none(m, p), candidates), strict=True):
                if value is not None:
                    groups[value].append(path)
        pairs = [g for g in groups.values() if any(p in train_of for p in g) and any(p in test_of for p in g)]
        candidates = [path for group in pairs for path in group]
    found: Found = []
    for group in pairs:
        train_clip = next(train_of[path][0] for path in group if path in train_of)
        found += [("audio content", train_clip, clip) for path in group for clip in test_of.get(path, ())]
    return found


def _by_file(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    files: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        files[os.path.realpath(clip.audio_path)].append(clip)
    return files


def _or_none(measure, path: str):  # type: ignore[no-untyped-def]
    try:
        return measure(path)
    except OSError:
        return None  # unreadable files are the header check's business


def _middle_hash(path: str) -> bytes:
    size = os.path.getsize(path)
    with open(path, "rb") as file:
        file.seek(max(0, (size - SAMPLE_BYTES) // 2))
        return size.to_bytes(8, "little") + hashlib.blake2b(file.read(SAMPLE_BYTES), digest_size=16).digest()


def _whole_hash(path: str) -> bytes:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).digest()
