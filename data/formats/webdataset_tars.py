"""webdataset: tars whose members with the same name up to its first dot are one sample. Read in place, never unpacked.

    shard-000.tar   call7_91.flac
                    call7_91.json   {"text": "press the pound key", "terms": ["pound key"], "speaker": "ann"}
                    call7_92.wav    call7_92.txt  "please hold the line"
 -> Clip("call7_91", ".../shard-000.tar:1536+88244", text="press the pound key", terms=("pound key",), speaker="ann")

A sample needs an audio member and text, from .json (`text`, or the fields of data/formats/term_chunks.py) or .txt.
Labels are the list `terms` where there is one, else the glossary's terms in the text. The audio's place in the tar
stands in for its path, so tars have to be plain, not .tar.gz. Absolute names, names with "..", links and devices are
refused though nothing is unpacked: such a tar was made to do harm, or by mistake.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from data.clip import Clip, make_clip
from data.containers import Place
from data.fields import RecordError, as_object, text_of
from data.formats import term_chunks
from data.formats.source import Source

AUDIO = ("flac", "wav", "mp3", "ogg", "opus", "aiff")
MAX_TEXT_BYTES = 1 << 24

Sample = dict[str, tarfile.TarInfo]  # by extension


def clips(source: Source) -> Iterator[Clip]:
    """One clip a sample, tars of a folder by path. Raises ValueError when labels are wanted and no glossary is set."""
    paths = sorted(source.path.rglob("*.tar")) if source.path.is_dir() else [source.path]
    for path in paths:
        yield from _clips_of_tar(path, source)


def _clips_of_tar(path: Path, source: Source) -> Iterator[Clip]:
    try:
        with tarfile.open(path, "r:") as tar:

            def make(where: str, item: tuple[str, Sample]) -> Iterable[Clip]:
                return [_clip_of(tar, path, *item, where, source)]

            yield from source.convert(_samples(tar, path, source), make)
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - tarfile.BLOCKSIZE))
            if file.read().strip(b"\0"):
                source.drops.note("tar_without_end", str(path), "no empty block at its end: it may be cut off")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        if isinstance(error, ValueError) and not isinstance(error, UnicodeError):
            raise
        # What came before the break was good: it stays, and the rest is counted as one loss.
        source.drops.seen()
        source.drops.add("broken_tar", str(path), f"{error}; .tar.gz has to be unpacked to .tar first")


def _samples(tar: tarfile.TarFile, path: Path, source: Source) -> Iterator[tuple[str, tuple[str, Sample]]]:
    """(tar:key, (key, its members)): a sample's members stand one after another."""
    key, sample = "", Sample()
    for member in tar:
        tar.members = []  # type: ignore[attr-defined]  # else it keeps all of them
        reason = _unsafe(member)
        if reason:
            source.drops.seen()
            source.drops.add("unsafe_member", f"{path}:{member.name!a}", reason)
            continue
        if not member.isfile():
            continue
        pure = PurePosixPath(member.name)
        stem, _, extension = pure.name.partition(".")
        this = str(pure.with_name(stem)) if stem else pure.name
        if key != this and sample:
            yield f"{path}:{key}", (key, sample)
            sample = Sample()
        key = this
        sample[extension.lower()] = member
    if sample:
        yield f"{path}:{key}", (key, sample)


def _unsafe(member: tarfile.TarInfo) -> str:
    """Why a member is refused; empty for files and folders with a plain relative name."""
    if member.name.startswith(("/", "\\")) or ".." in PurePosixPath(member.name).parts:
        return "its name is absolute or climbs out of the folder"
    if not (member.isfile() or member.isdir()):
        return f"it is a link or device (type {member.type!r})"
    if member.issparse():
        return "it is stored with holes, so it has no one place in the tar"
    return ""


def _clip_of(tar: tarfile.TarFile, path: Path, key: str, sample: Sample, where: str, source: Source) -> Clip:
    audio = [sample[extension] for extension in AUDIO if extension in sample]
    if len(audio) != 1:
        raise RecordError("no_audio_member" if not audio else "several_audio_members", f"members: {', '.join(sample)}")
    place = str(Place(str(path.absolute()), audio[0].offset_data, audio[0].size))
    record: dict[str, Any] = {}
    if "json" in sample:
        try:
            record = as_object(json.loads(_text(tar, sample["json"])), "the .json member")
        except (ValueError, RecursionError) as error:
            raise RecordError("bad_json", str(error)[:200]) from error
    if term_chunks.TERMS in record:
        fields = {"segment_id": key} | record
        return term_chunks.clip_of(fields | {"term_chunk_audio": place}, where, source)
    text = text_of(record, "text", default="")
    if not text and "txt" in sample:
        text = text_of({"txt": _text(tar, sample["txt"])}, "txt")
    if "text" not in record and "txt" not in sample:
        raise RecordError("missing_field", f"no .txt member and no text in .json; members: {', '.join(sample)}")
    written, ignored = source.labels(record, text)
    return make_clip(
        clip_id=key,
        audio_path=place,
        span_s=(None, None),
        text=text,
        written=written,
        ignored=ignored,
        source=where,
        drops=source.drops,
        speaker=text_of(record, "speaker", default=""),
        recording=text_of(record, "recording", default=""),
    )


def _text(tar: tarfile.TarFile, member: tarfile.TarInfo) -> str:
    if member.size > MAX_TEXT_BYTES:
        raise RecordError("text_too_long", f"{member.name} has {member.size} bytes; allowed are {MAX_TEXT_BYTES}")
    file = tar.extractfile(member)  # opens it within the tar, writes nothing
    assert file is not None, member
    try:
        return file.read().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise RecordError("bad_text", f"{member.name} is not UTF-8 ({error})") from error
