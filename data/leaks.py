"""A test set that shares audio with the training set measures memory: such a pair of files is refused.

What is compared, the cheap first:

    id              the ids of the two files' records
    audio           spans of one file that overlap (links followed); different parts of one long file are no leak
    audio content   another file with the same bytes
    text            the same words in the same order, which is a leak only where texts are long
    samples         the same samples after decoding, whatever the container (reads all audio)
"""

from __future__ import annotations

import hashlib
import logging
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from data.audio import AudioError, read_pcm
from data.clip import Clip
from data.containers import place_of, real_path
from data.phrases import words_of
from data.shards import audio_key
from data.table import ClipTable, as_listed, rows_shared_with

logger = logging.getLogger(__name__)
T = TypeVar("T")

EXAMPLES = 3
SAMPLE_BYTES = 4096
READ_BYTES = 1 << 20
READ_THREADS = 16

Kind = Literal["id", "audio", "audio content", "text", "samples"]


class Leak(NamedTuple):
    """A test clip, and the training clip that it shares something with."""

    kind: Kind
    train: Clip
    test: Clip


class Span(NamedTuple):
    start_s: float
    end_s: float
    clip: Clip


def refuse_leaks(train: Sequence[Clip], test: Sequence[Clip], test_name: str = "test", content: bool = True) -> None:
    """Raise ValueError when a clip of `test` has an id of `train`, or audio that `train` holds too.

    Audio is the same when the file is the same one (links followed) and the spans overlap, or, with `content`, when
    another file holds the same bytes. Packed clips count with the files that they were made of; of a packed training
    set `content` compares samples, clip by clip.
    """
    listed = list(as_listed(test))
    if isinstance(train, ClipTable) and train.is_packed:
        near, rows = rows_shared_with(train, listed, _audio_keys(test) if content else [])
        found = find_leaks(near, listed, "id") or find_leaks(near, listed, "audio") or _same_keys(train, rows, test)
    else:
        kinds: list[Kind] = ["id", "audio", "audio content"] if content else ["id", "audio"]
        if content and listed and listed[0] is not test[0]:
            logger.warning("%s is packed: its content is compared through the files that it was made of", test_name)
        found = next((leaks for kind in kinds if (leaks := find_leaks(list(train), listed, kind))), [])
    if not found:
        return
    raise ValueError(
        f"{len(found)} of {len(test)} {test_name} clips have the same {found[0].kind} as training clips, so the "
        f"measurement would be of memory. For example (training, {test_name}):{examples_of(found)}\n"
        f"Take them out of one of the two files (--train_samples_path, --{test_name}_samples_path)"
    )


def find_leaks(train: list[Clip], test: list[Clip], kind: Kind, min_text_words: int = 1) -> list[Leak]:
    """The leaks of one kind, at most one a test clip. `text` looks at texts of `min_text_words` words or more."""
    if kind == "text":
        return _same_text(train, test, min_text_words)
    find = {"id": _same_ids, "audio": _same_spans, "audio content": _same_content, "samples": _same_samples}
    return find[kind](train, test)


def examples_of(leaks: list[Leak]) -> str:
    """A few leaks for a message, a line each."""
    return "".join(
        f"\n  {leak.train.source} and {leak.test.source}: {leak.test.clip_id}, {leak.test.audio_path}"
        for leak in leaks[:EXAMPLES]
    )


def _same_ids(train: list[Clip], test: list[Clip]) -> list[Leak]:
    known = {clip.segment_id: clip for clip in train}
    # A record without an id is named after its file and position, which says nothing about its content.
    return [
        Leak("id", known[clip.segment_id], clip)
        for clip in test
        if clip.segment_id in known and clip.segment_id != clip.source
    ]


def _same_spans(train: list[Clip], test: list[Clip]) -> list[Leak]:
    wanted = {real_path(clip.audio_path) for clip in test}
    spans: dict[str, list[Span]] = defaultdict(list)
    for clip in train:
        path = real_path(clip.audio_path)
        if path in wanted:
            spans[path].append(_span(clip))
    found: list[Leak] = []
    for clip in test:
        mine = _span(clip)
        for other in spans.get(real_path(clip.audio_path), ()):
            if mine.start_s < other.end_s and other.start_s < mine.end_s:
                found.append(Leak("audio", other.clip, clip))
                break
    return found


def _span(clip: Clip) -> Span:
    return Span(clip.start_s or 0.0, float("inf") if clip.end_s is None else clip.end_s, clip)


def _same_content(train: list[Clip], test: list[Clip]) -> list[Leak]:
    """By size, then by 4 kB out of the middle, and only then by all bytes: most files are never read whole."""
    train_of, test_of = _by_file(train), _by_file(test)
    shared = set(train_of) & set(test_of)  # one file in both: spans were compared already
    candidates = [path for path in (*train_of, *test_of) if path not in shared]
    for measure in (_num_bytes, _middle_hash, _whole_hash):
        groups: dict[object, list[str]] = defaultdict(list)
        with ThreadPoolExecutor(READ_THREADS) as pool:
            for path, value in zip(candidates, pool.map(lambda p, m=measure: _or_none(m, p), candidates), strict=True):
                if value is not None:
                    groups[value].append(path)
        pairs = [g for g in groups.values() if any(p in train_of for p in g) and any(p in test_of for p in g)]
        candidates = [path for group in pairs for path in group]
    found: list[Leak] = []
    for group in pairs:
        train_clip = next(train_of[path][0] for path in group if path in train_of)
        found += [Leak("audio content", train_clip, clip) for path in group for clip in test_of.get(path, ())]
    return found


def _same_keys(train: ClipTable, rows: list[int], test: Sequence[Clip]) -> list[Leak]:
    """`rows` of the training clips have the samples of a test clip."""
    by_key = dict(zip(_audio_keys(test), as_listed(test), strict=True)) if rows else {}
    return [Leak("samples", train.as_listed(row), by_key[int(train.columns["audio_key"][row])]) for row in rows]


def _audio_keys(clips: Sequence[Clip]) -> list[int]:
    """Of each clip's samples; 0 where they cannot be read, which is for others to tell."""
    if isinstance(clips, ClipTable) and clips.is_packed:
        return clips.columns["audio_key"].tolist()
    return [key or 0 for key in _mapped(_audio_key, clips)]


def _audio_key(clip: Clip) -> int | None:
    pcm_S = _samples(clip)
    return None if pcm_S is None else audio_key(pcm_S)


def _same_text(train: list[Clip], test: list[Clip], min_words: int) -> list[Leak]:
    known = {words: clip for clip in train if len(words := tuple(words_of(clip.text))) >= min_words}
    return [Leak("text", known[words], clip) for clip in test if (words := tuple(words_of(clip.text))) in known]


def _same_samples(train: list[Clip], test: list[Clip]) -> list[Leak]:
    known = {digest: clip for clip, digest in zip(train, _mapped(_sample_hash, train), strict=True) if digest}
    hashes = zip(test, _mapped(_sample_hash, test), strict=True)
    return [Leak("samples", known[digest], clip) for clip, digest in hashes if digest in known]


def _sample_hash(clip: Clip) -> bytes | None:
    pcm_S = _samples(clip)
    return None if pcm_S is None else hashlib.blake2b(pcm_S.tobytes(), digest_size=16).digest()


def _samples(clip: Clip) -> np.ndarray | None:
    try:
        return read_pcm(clip.audio_path, clip.start_s, clip.end_s)
    except AudioError:
        return None  # no clip of a set that can be read


def _mapped(measure: Callable[[Clip], T | None], clips: Sequence[Clip]) -> list[T | None]:
    with ThreadPoolExecutor(READ_THREADS) as pool:
        return list(pool.map(measure, clips))


def _by_file(clips: Iterable[Clip]) -> dict[str, list[Clip]]:
    files: dict[str, list[Clip]] = defaultdict(list)
    for clip in clips:
        files[real_path(clip.audio_path)].append(clip)
    return files


def _or_none(measure, path: str):  # type: ignore[no-untyped-def]
    try:
        return measure(path)
    except OSError:
        return None  # unreadable files are the header check's business


def _num_bytes(path: str) -> int:
    return place_of(path).num_bytes()


def _middle_hash(path: str) -> bytes:
    place = place_of(path)
    size = place.num_bytes()
    middle = place.read(max(0, (size - SAMPLE_BYTES) // 2), SAMPLE_BYTES)
    return size.to_bytes(8, "little") + hashlib.blake2b(middle, digest_size=16).digest()


def _whole_hash(path: str) -> bytes:
    place, digest = place_of(path), hashlib.blake2b(digest_size=16)
    for offset in range(0, place.num_bytes(), READ_BYTES):
        digest.update(place.read(offset, READ_BYTES))
    return digest.digest()
