"""Packed folders: a few large files instead of a million small ones.

    shard-00000.pcm ...   int16, 16 kHz mono, little-endian, clips one after another, no header
    index.safetensors     columns (data/table.py): ids, texts, terms, where each clip's samples lie
    drops.jsonl           records that were left out, and why
    manifest.json         what packed it, and size and SHA-256 of each file; written last, so a folder with one is whole

Clip i of the index is samples `sample_start` to `sample_start + num_samples` of all shards one after another. Clips
with the same samples share them. The same input gives the same bytes, whatever the number of workers.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.audio import MAX_CLIP_S, SAMPLE_RATE
from data.columns import map_columns
from data.containers import SHARD_SUFFIX
from data.reader import SAMPLE_BYTES
from data.table import ClipTable

MANIFEST, INDEX, DROPS = "manifest.json", "index.safetensors", "drops.jsonl"
FORMAT, VERSION = "earmark-shards", 1
READ_BYTES = 1 << 22


@dataclass(frozen=True)
class FileEntry:
    """One file of the folder."""

    size: int  # bytes
    sha256: str


@dataclass(frozen=True)
class Manifest:
    num_clips: int
    num_samples: int  # stored ones: clips that share samples count once
    listing: str  # SHA-256 of the clips that were to be packed, by which a second run knows its work done
    files: dict[str, FileEntry]

    @property
    def shards(self) -> list[str]:
        return sorted(name for name in self.files if name.endswith(SHARD_SUFFIX))


@functools.cache
def _powers() -> np.ndarray:
    longest = round(MAX_CLIP_S * SAMPLE_RATE) + SAMPLE_RATE
    return np.cumprod(np.full(longest // 4, 0x5851F42D4C957F2D, dtype=np.int64))


def audio_key(pcm_S: np.ndarray) -> int:
    """A signed 64-bit key of int16 samples: equal samples, equal keys. A polynomial modulo 2^64, 8 bytes a term.

    Cheap and no proof: where it matters, the samples themselves are compared.
    """
    whole = len(pcm_S) // 4 * 4
    words = np.ascontiguousarray(pcm_S[:whole]).view(np.int64)
    with np.errstate(over="ignore"):
        key = np.dot(words, _powers()[: len(words)]) + np.int64(len(pcm_S))
        for sample in pcm_S[whole:].tolist():
            key = key * np.int64(0x2545F4914F6CDD1D) + np.int64(sample)
    return int(key)


def shard_name(number: int) -> str:
    return f"shard-{number:05d}{SHARD_SUFFIX}"


def is_packed(path: str | Path) -> bool:
    return (Path(path) / MANIFEST).is_file()


def read_manifest(folder: str | Path) -> Manifest:
    """Raises ValueError when there is none, or one of another format or version."""
    path = Path(folder) / MANIFEST
    try:
        found = json.loads(path.read_bytes())
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}); pack again") from error
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not JSON ({error}); pack again") from error
    try:
        if (found["format"], found["version"]) != (FORMAT, VERSION):
            raise ValueError(f"format is {found['format']!r} {found['version']!r}; allowed is {FORMAT!r} {VERSION}")
        files = {}
        for name, entry in found["files"].items():
            if name != os.path.basename(name) or name in ("", ".", ".."):
                raise ValueError(f"file {name!r} leaves the folder")
            files[name] = FileEntry(int(entry["size"]), str(entry["sha256"]))
        manifest = Manifest(int(found["num_clips"]), int(found["num_samples"]), str(found["listing"]), files)
        if INDEX not in files:
            raise ValueError(f"no {INDEX} among the files")
        return manifest
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{path}: {error!s:.200}; pack again") from error


def write_manifest(folder: Path, manifest: Manifest) -> None:
    content = {"format": FORMAT, "version": VERSION, "sample_rate": SAMPLE_RATE, **asdict(manifest)}
    with replaced_file(folder / MANIFEST) as file:
        file.write((json.dumps(content, indent=1, sort_keys=True) + "\n").encode())


def open_packed(folder: str | Path) -> ClipTable:
    """The clips of a packed folder; no audio is read. Raises ValueError where manifest, index and shards disagree."""
    folder = Path(folder).absolute()
    manifest = read_manifest(folder)
    for name, entry in manifest.files.items():
        try:
            size = os.path.getsize(folder / name)
        except OSError as error:
            raise ValueError(f"{folder / name}: {error.strerror or error}; copy the folder again") from error
        if size != entry.size:
            raise ValueError(f"{folder / name}: {size} bytes, the manifest says {entry.size}; copy the folder again")
    starts = [0]
    for name in manifest.shards:
        starts.append(starts[-1] + manifest.files[name].size // SAMPLE_BYTES)
    paths = [str(folder / name) for name in manifest.shards]
    index = folder / INDEX
    table = ClipTable(map_columns(index), paths, starts, str(index))
    if table.sample_start_C is None or len(table) != manifest.num_clips:
        raise ValueError(f"{index}: {len(table)} clips, the manifest says {manifest.num_clips}; pack again")
    return table


def verify(folder: str | Path, told: Callable[[int, int], None] = lambda done, total: None) -> list[str]:
    """Read everything and compare; what is wrong, one line a file. `told` gets bytes done and in all."""
    folder = Path(folder)
    manifest = read_manifest(folder)
    faults, done, total = [], 0, sum(entry.size for entry in manifest.files.values())
    for name, entry in manifest.files.items():
        try:
            size = os.path.getsize(folder / name)
            digest = hashlib.sha256()
            with open(folder / name, "rb") as file:
                for block in _blocks(file):
                    digest.update(block)
                    done += len(block)
                    told(done, total)
        except OSError as error:
            faults.append(f"{name}: {error.strerror or error}")
            continue
        if size != entry.size:
            faults.append(f"{name}: {size} bytes, the manifest says {entry.size}")
        elif digest.hexdigest() != entry.sha256:
            faults.append(f"{name}: the content is not what was packed (SHA-256 differs)")
    return faults


def file_entry(path: Path) -> FileEntry:
    digest, size = hashlib.sha256(), 0
    with open(path, "rb") as file:
        for block in _blocks(file):
            digest.update(block)
            size += len(block)
    return FileEntry(size, digest.hexdigest())


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    while block := file.read(READ_BYTES):
        yield block


class replaced_file:
    """`with replaced_file(path) as file`: all or, after an error or a kill, none. Synced before it gets its name."""

    def __init__(self, path: Path) -> None:
        self.path, self.partial = path, path.with_name(f".{path.name}.part")

    def __enter__(self) -> BinaryIO:
        self.file = open(self.partial, "wb")
        return self.file

    def __exit__(self, kind: Any, *rest: object) -> None:
        try:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        finally:
            self.file.close()
        if kind is None:
            os.replace(self.partial, self.path)
            sync_folder(self.path.parent)
        else:
            self.partial.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
