"""Audio that lies inside a larger file is named by a place, "FILE:OFFSET+SIZE" in bytes, and read without unpacking.

    /x/shard-000.tar:1536+88244       a member of a tar: an audio file in its own right
    /x/shard_00000.dat:640000+64000   samples of an old shard: int16, little-endian, 16 kHz mono, no header
    /x/shard-00000.pcm:640000+64000   samples of a packed folder, the same

Only files that end in .tar, .dat and .pcm are read so; any other path is a whole file, whatever its name looks like.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

_PLACE = re.compile(r"(?s)(.+\.(?:tar|dat|pcm)):([0-9]{1,18})\+([0-9]{1,18})\Z")
SHARD_SUFFIX = ".pcm"  # of a packed folder (data/shards.py)
RAW_SUFFIXES = (".dat", SHARD_SUFFIX)


class Place(NamedTuple):
    """A file, or with `offset` and `size` (bytes) a part of one."""

    path: str
    offset: int = 0
    size: int | None = None  # None: the whole file

    @property
    def is_raw(self) -> bool:
        """Whether the bytes are bare samples."""
        return self.size is not None and self.path.endswith(RAW_SUFFIXES)

    def __str__(self) -> str:
        return self.path if self.size is None else f"{self.path}:{self.offset}+{self.size}"

    def num_bytes(self) -> int:
        """Bytes of the place, by its own account. Raises OSError."""
        return os.path.getsize(self.path) if self.size is None else self.size

    def read(self, offset: int, num_bytes: int) -> bytes:
        """Up to `num_bytes` from `offset` bytes after the place's start, never beyond its end. Raises OSError."""
        end = self.num_bytes()
        with open(self.path, "rb") as file:
            file.seek(self.offset + min(offset, end))
            return file.read(max(0, min(num_bytes, end - offset)))


def place_of(path: str | Path) -> Place:
    """Take an audio path apart."""
    match = _PLACE.match(str(path))
    return Place(str(path)) if match is None else Place(match[1], int(match[2]), int(match[3]))


def real_path(path: str) -> str:
    """The path with links followed: the same string for the same audio, also within a container."""
    place = place_of(path)
    return str(place._replace(path=os.path.realpath(place.path)))
