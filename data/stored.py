"""The shards of a packing under way: those that are finished, and the one that is being written.

    block-00000.safetensors    the clips of shard 0, in the order of the listing
        sample_start, text_bytes, ...   the block of rows that the index takes (data/table_writer.py)
        complaints                      JSON: [[place, reason, source, detail], ...] of dropped clips
        num_listed                      clips, dropped ones included
        sha256, size                    of the shard

Samples that are stored already are found by key and compared byte by byte, so the same audio is stored once.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from data.columns import map_columns, write_columns
from data.reader import SAMPLE_BYTES
from data.shards import FileEntry, replaced_file, shard_name, sync_folder
from data.table_writer import joined_rows
from data.worker import Json

PIECE_BYTES = 1 << 17


class Stored:
    """The finished shards: where each clip's samples lie, and which samples are known, by 64-bit key and comparison."""

    def __init__(self, folder: Path, work: Path) -> None:
        self.folder, self.work = folder, work
        self.files: list[FileEntry] = []
        self.num_clips = self.num_samples = 0  # clips of the listing that were dealt with, samples written
        self._keys, self._starts, self._lengths = (np.zeros(0, dtype=np.int64) for _ in range(3))  # sorted by key
        self._new: dict[int, tuple[int, int]] = {}
        while (folder / shard_name(len(self.files))).is_file() and self._rows_path(len(self.files)).is_file():
            number = len(self.files)
            rows = map_columns(self._rows_path(number))
            entry = FileEntry(int(rows["size"][0]), rows["sha256"].tobytes().decode())
            if os.path.getsize(folder / shard_name(number)) != entry.size:
                raise ValueError(f"{folder / shard_name(number)} was changed; remove the folder and pack again")
            self._add(rows, entry)
        for partial in (*folder.glob(".*.part"), *work.glob(".*.part")):
            partial.unlink()

    def _rows_path(self, number: int) -> Path:
        return self.work / f"block-{number:05d}.safetensors"

    def rows(self) -> Iterator[tuple[dict[str, np.ndarray], list[list[str]]]]:
        """Of each shard, the rows of its clips, and reason, source and detail of those that were dropped."""
        for number in range(len(self.files)):
            rows = map_columns(self._rows_path(number))
            yield rows, [complaint[1:] for complaint in json.loads(rows["complaints"].tobytes())]

    def _add(self, rows: dict[str, np.ndarray], entry: FileEntry) -> None:
        start, length, key = rows["sample_start"], rows["num_samples"], rows["audio_key"]
        fresh = start >= self.num_samples
        self.files.append(entry)
        self.num_clips += int(rows["num_listed"][0])
        self.num_samples += entry.size // SAMPLE_BYTES
        self._keys = np.concatenate([self._keys, key[fresh]])
        by_key = np.argsort(self._keys, kind="stable")
        self._keys = self._keys[by_key]
        self._starts = np.concatenate([self._starts, start[fresh]])[by_key]
        self._lengths = np.concatenate([self._lengths, length[fresh]])[by_key]
        self._new.clear()

    def find(self, key: int) -> tuple[int, int] | None:
        """(first sample, number of samples) of a stored clip with this key."""
        if key in self._new:
            return self._new[key]
        place = int(np.searchsorted(self._keys, key))
        if place < len(self._keys) and self._keys[place] == key:
            return int(self._starts[place]), int(self._lengths[place])
        return None

    def remember(self, key: int, start: int, length: int) -> None:
        self._new.setdefault(key, (start, length))

    def finish_shard(self, partial: Path, rows: dict[str, np.ndarray]) -> None:
        """Rows first, the shard's name last: a shard that has its name has its rows."""
        with replaced_file(self._rows_path(len(self.files))) as file:
            write_columns(file, rows)
        os.replace(partial, self.folder / shard_name(len(self.files)))
        sync_folder(self.folder)
        entry = FileEntry(int(rows["size"][0]), rows["sha256"].tobytes().decode())
        self._add(map_columns(self._rows_path(len(self.files))), entry)


class OpenShard:
    """The shard that is being written."""

    def __init__(self, stored: Stored) -> None:
        self.stored = stored
        self.partial = stored.folder / f".{shard_name(len(stored.files))}.part"
        self.file: BinaryIO = open(self.partial, "w+b", buffering=0)  # noqa: SIM115 - closed in finish
        self.digest = hashlib.sha256()
        self.first = stored.num_samples
        self.num_samples = 0
        self.blocks: list[dict[str, np.ndarray]] = []
        self.complaints: list[list[Any]] = []
        self.num_clips = 0  # of the listing that were dealt with

    @property
    def num_bytes(self) -> int:
        return self.num_samples * SAMPLE_BYTES

    def add(self, answer: Json, memory: memoryview) -> None:
        """The block that a worker decoded: samples that are new go to the file in as few writes as possible."""
        rows = {
            name: np.frombuffer(memory, dtype, count, offset).copy()
            for name, (offset, count, dtype) in answer["columns"].items()
        }
        key, length = rows["audio_key"], rows["num_samples"]
        start = np.zeros(len(key), dtype=np.int64)
        pending = position = 0  # samples of the block: [pending, position) are to be written
        for place, (one_key, samples) in enumerate(zip(key.tolist(), length.tolist(), strict=True)):
            content = memory[position * SAMPLE_BYTES : (position + samples) * SAMPLE_BYTES]
            known = self._known(one_key, samples, content, memory, pending)
            if known is None:
                start[place] = self.first + self.num_samples + position - pending
                self.stored.remember(one_key, int(start[place]), samples)
                position += samples
            else:
                start[place] = known
                self._write(memory[pending * SAMPLE_BYTES : position * SAMPLE_BYTES])
                position += samples
                pending = position
        self._write(memory[pending * SAMPLE_BYTES : position * SAMPLE_BYTES])
        self.complaints += [[self.num_clips + place, *why] for place, *why in answer["complaints"]]
        self.blocks.append(rows | {"sample_start": start})
        self.num_clips += answer["num_listed"]

    def _known(self, key: int, samples: int, content: memoryview, memory: memoryview, pending: int) -> int | None:
        """Where the same samples are stored already; the bytes decide, the key only says where to look."""
        found = self.stored.find(key)
        if found is None or found[1] != samples:
            return None
        start = found[0]
        unwritten = self.first + self.num_samples  # from here on, samples lie in the block, from `pending` on
        if start >= unwritten:
            at = (pending + start - unwritten) * SAMPLE_BYTES
            same = memory[at : at + len(content)] == content
        elif start >= self.first:
            same = os.pread(self.file.fileno(), len(content), (start - self.first) * SAMPLE_BYTES) == content
        else:
            same = self._in_finished(start, len(content)) == content
        return start if same else None

    def _in_finished(self, start: int, num_bytes: int) -> bytes:
        first = 0
        for number, entry in enumerate(self.stored.files):
            if start < first + entry.size // SAMPLE_BYTES:
                with open(self.stored.folder / shard_name(number), "rb") as file:
                    file.seek((start - first) * SAMPLE_BYTES)
                    return file.read(num_bytes)
            first += entry.size // SAMPLE_BYTES
        raise AssertionError(start)

    def _write(self, content: memoryview) -> None:
        self.num_samples += len(content) // SAMPLE_BYTES
        while len(content):  # piece by piece: what was hashed is still in the processor's cache when it is written
            piece = content[: self.file.write(content[:PIECE_BYTES]) or 0]
            self.digest.update(piece)
            content = content[len(piece) :]

    def finish(self) -> None:
        os.fsync(self.file.fileno())
        self.file.close()
        rows = joined_rows(self.blocks)
        text = np.frombuffer(json.dumps(self.complaints).encode(), dtype=np.uint8)
        sha256 = np.frombuffer(self.digest.hexdigest().encode(), dtype=np.uint8)
        rows |= {"complaints": text, "sha256": sha256, "size": np.array([self.num_bytes])}
        rows["num_listed"] = np.array([self.num_clips])
        self.stored.finish_shard(self.partial, rows)
