"""Old shards: the audio that samples name, as bare int16 samples one after another, found by path or key.

    shard_00000.dat         int16, little-endian, 16 kHz mono
    shard_00000.index.npz   key     ["POD02_S91_term_Artesia", ...]        object array of strings
                            relpath ["a/POD02_S91_term_Artesia.wav", ...]  object array of strings
                            dtype   ["int16", ...]                         object array of strings
                            offset  [0, 34000, ...]   length [34000, 27200, ...]   in samples, or both in bytes
 -> find("/old/place/a/POD02_S91_term_Artesia.wav") == "<folder>/shard_00000.dat:0+68000"

The object arrays are pickles, so these files are read only when `legacy_shards` names their folder, and then by a
reader that accepts arrays of strings and executes nothing (data/object_arrays.py). Whether offsets count samples or
bytes is told by the size of the .dat file; where neither fits, the shard is refused.
"""

from __future__ import annotations

import logging
import os
import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np

from data.containers import Place
from data.object_arrays import read_strings

logger = logging.getLogger(__name__)

OFFSETS = ("offset", "offsets", "start", "starts", "byte_offset")
LENGTHS = ("length", "lengths", "num_samples", "n_samples", "nframes", "size")
BYTES_PER_SAMPLE = 2


class LegacyShards:
    """All shards of a folder. Raises ValueError for a folder without any, and a shard that is not as above."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser().absolute()
        indexes = sorted(self.folder.glob("*.index.npz"))
        if not indexes:
            raise ValueError(
                f"legacy_shards is {str(folder)!r}; allowed is a folder that holds shard_*.index.npz files"
            )
        self._places: dict[str, str] = {}
        self._num_clips = 0
        ambiguous: set[str] = set()
        for index in indexes:
            for names, place in _read_index(index):
                self._num_clips += 1
                for name in names:
                    if self._places.setdefault(name, place) != place:
                        ambiguous.add(name)
        for name in ambiguous:
            del self._places[name]
        if ambiguous:
            some = ", ".join(sorted(ambiguous)[:3])
            logger.warning("legacy_shards %s: %d names stand for several clips each: %s", folder, len(ambiguous), some)

    def __len__(self) -> int:
        return self._num_clips

    def find(self, path: str) -> str | None:
        """The place of an audio path: by the longest end of it that is a relpath, else by its name as a key."""
        parts = os.path.normpath(path).lstrip("/").split("/")
        ends = ["/".join(parts[first:]) for first in range(len(parts))]
        for name in (*ends, Path(path).stem):
            if name in self._places:
                return self._places[name]
        return None


def _read_index(index: Path) -> list[tuple[tuple[str, str], str]]:
    """((relpath, key), place) of each clip of a shard."""
    shard = index.with_name(index.name.removesuffix(".index.npz") + ".dat")
    try:
        num_bytes = shard.stat().st_size
    except OSError as error:
        raise ValueError(f"{shard}: cannot be read ({error.strerror})") from error
    keys, relpaths, dtypes = (read_strings(index, name) for name in ("key", "relpath", "dtype"))
    offsets, lengths = _numbers(index, OFFSETS), _numbers(index, LENGTHS)
    if len({len(keys), len(relpaths), len(dtypes), len(offsets), len(lengths)}) != 1:
        raise ValueError(
            f"{index}: {len(keys)} keys, {len(relpaths)} relpaths, {len(dtypes)} dtypes, {len(offsets)} offsets and "
            f"{len(lengths)} lengths; allowed is one of each a clip"
        )
    if set(dtypes) - {"int16", "<i2", "i2"}:
        raise ValueError(f"{index}: dtype is {sorted(set(dtypes))}; allowed is int16")
    unit = _bytes_a_unit(index, offsets, lengths, num_bytes)
    places = (str(Place(str(shard), o * unit, n * unit)) for o, n in zip(offsets, lengths, strict=True))
    return [((os.path.normpath(r), k), place) for r, k, place in zip(relpaths, keys, places, strict=True)]


def _bytes_a_unit(index: Path, offsets: list[int], lengths: list[int], num_bytes: int) -> int:
    """2 when offsets and lengths count samples, 1 when they count bytes."""
    end = max((offset + length for offset, length in zip(offsets, lengths, strict=True)), default=0)
    for unit in (BYTES_PER_SAMPLE, 1):
        if end * unit == num_bytes:
            return unit
    raise ValueError(
        f"{index}: the last clip ends at {end}, but the .dat file has {num_bytes} bytes ({num_bytes // 2} samples); "
        "the two do not belong together, or one of them is cut off: make them anew, or leave this shard out"
    )


def _numbers(index: Path, names: tuple[str, ...]) -> list[int]:
    try:
        with np.load(index, allow_pickle=False) as arrays:
            found = [name for name in names if name in arrays.files]
            values: Any = arrays[found[0]] if found else None
    except (OSError, ValueError, EOFError, KeyError, NotImplementedError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(f"{index}: cannot be read ({error})") from error
    if values is None:
        raise ValueError(f"{index}: has none of the arrays {', '.join(names)}")
    if values.ndim != 1 or values.dtype.kind not in "iu" or (len(values) and int(values.min()) < 0):
        raise ValueError(f"{index}: array {found[0]!r} is {values.dtype} {values.shape}; allowed are counts in a row")
    return [int(value) for value in values]
