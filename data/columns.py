"""Columns of numbers in one safetensors file, written as a stream and read through a memory map.

    8 bytes     length of the header
    header      {"text_bytes": {"dtype": "U8", "shape": [120], "data_offsets": [0, 120]}, ...}, padded to 64 bytes
    data        the columns one after another, 8-byte types first, so that all are aligned

A table of strings is two columns: `name_bytes`, UTF-8 of all strings one after another, and `name_indptr`, where each
begins (one more entry than strings). The format is safetensors' own; it is written here because that library wants
each tensor whole in memory, and read here because it copies.
"""

from __future__ import annotations

import json
import math
import mmap
import os
import tempfile
from array import array
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

DTYPES = {"I64": np.int64, "F64": np.float64, "I32": np.int32, "I16": np.int16, "U8": np.uint8}
NAMES = {np.dtype(kind): name for name, kind in DTYPES.items()}
MAX_HEADER_BYTES = 1 << 20
COPY_BYTES = 1 << 20

Columns = Mapping[str, np.ndarray]


class Spool:
    """A column that grows: kept in an unnamed temporary file, so that nothing stays behind when the process dies."""

    def __init__(self, dtype: type, folder: str | Path | None = None) -> None:
        self.dtype = np.dtype(dtype)
        codes = {"int64": "q", "float64": "d", "int32": "i"}
        self._values: array[Any] | None = None if self.dtype == np.uint8 else array(codes[self.dtype.name])
        self._bytes = bytearray()
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - lives as long as the spool
        self._itemsize = self.dtype.itemsize
        self.num_bytes = self._num_flushed = 0

    def append(self, value: int | float) -> None:
        assert self._values is not None
        self._values.append(value)
        self.num_bytes += self._itemsize
        if self.num_bytes - self._num_flushed >= COPY_BYTES:
            self._flush()

    def extend(self, values: Iterable[int] | bytes | np.ndarray) -> None:
        """Bytes for a spool of uint8, numbers for the others."""
        if self._values is None:
            assert isinstance(values, bytes | np.ndarray)
            content = values if isinstance(values, bytes) else values.tobytes()
            self._bytes += content
            self.num_bytes += len(content)
        else:
            block = np.asarray(values if isinstance(values, np.ndarray) else list(values), dtype=self.dtype)
            self._values.frombytes(block.tobytes())
            self.num_bytes += block.nbytes
        if self.num_bytes - self._num_flushed >= COPY_BYTES:
            self._flush()

    @property
    def num_values(self) -> int:
        return self.num_bytes // self.dtype.itemsize

    def _flush(self) -> None:
        self._num_flushed = self.num_bytes
        if self._values is not None:
            self._file.write(self._values.tobytes())
            del self._values[:]
        else:
            self._file.write(self._bytes)
            self._bytes.clear()

    def read(self) -> np.ndarray:
        """All of it, as an array in memory."""
        self._flush()
        self._file.seek(0)
        values = np.frombuffer(self._file.read(), dtype=self.dtype)
        self._file.seek(0, os.SEEK_END)
        return values

    def copy_to(self, file: BinaryIO) -> None:
        self._flush()
        self._file.seek(0)
        while block := self._file.read(COPY_BYTES):
            file.write(block)

    def close(self) -> None:
        self._file.close()


class StringSpool:
    """A table of strings that grows."""

    def __init__(self, folder: str | Path | None = None) -> None:
        self.bytes, self.indptr = Spool(np.uint8, folder), Spool(np.int64, folder)
        self.indptr.append(0)

    def append(self, value: str) -> None:
        self.bytes.extend(value.encode("utf-8"))
        self.indptr.append(self.bytes.num_bytes)

    def extend(self, content: np.ndarray, sizes: np.ndarray) -> None:
        """Strings one after another, UTF-8, and how many bytes each has."""
        self.indptr.extend(self.bytes.num_bytes + np.cumsum(sizes))
        self.bytes.extend(content)

    def __len__(self) -> int:
        return self.indptr.num_values - 1

    def settled(self) -> Strings:
        """The strings so far, to read, in memory."""
        return Strings({"strings_bytes": self.bytes.read(), "strings_indptr": self.indptr.read()}, "strings")

    def columns(self, name: str) -> dict[str, Spool | np.ndarray]:
        return {f"{name}_bytes": self.bytes, f"{name}_indptr": self.indptr}


def write_columns(file: BinaryIO, columns: Mapping[str, Spool | np.ndarray]) -> None:
    """Write a safetensors file. The same columns give the same bytes."""
    ordered = sorted(columns, key=lambda name: (-columns[name].dtype.itemsize, name))
    header: dict[str, object] = {}
    offset = 0
    for name in ordered:
        column = columns[name]
        size = column.num_bytes if isinstance(column, Spool) else column.nbytes
        shape = [column.num_values] if isinstance(column, Spool) else list(column.shape)
        header[name] = {"dtype": NAMES[column.dtype], "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-(len(text) + 8) % 64)
    file.write(len(text).to_bytes(8, "little") + text)
    for name in ordered:
        column = columns[name]
        if isinstance(column, Spool):
            column.copy_to(file)
        else:
            file.write(np.ascontiguousarray(column).data)


def map_columns(source: str | Path | int, name: str = "") -> dict[str, np.ndarray]:
    """The columns of a file (path or descriptor), mapped read-only. `name` is for messages.

    Raises ValueError for a file that is not whole or not of this format; no content is read but the header.
    """
    name = name or str(source)
    try:
        descriptor = source if isinstance(source, int) else os.open(source, os.O_RDONLY)
    except OSError as error:
        raise ValueError(f"{name}: cannot be read ({error.strerror or error})") from error
    try:
        size = os.fstat(descriptor).st_size
        if size < 8:
            raise ValueError(f"{name}: {size} bytes are no safetensors file")
        mapped = mmap.mmap(descriptor, size, prot=mmap.PROT_READ)
    except OSError as error:
        raise ValueError(f"{name}: cannot be mapped ({error.strerror or error})") from error
    finally:
        if not isinstance(source, int):
            os.close(descriptor)
    length = int.from_bytes(mapped[:8], "little")
    if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
        raise ValueError(f"{name}: the header declares {length} bytes, the file has {size}")
    try:
        header = json.loads(mapped[8 : 8 + length].decode("utf-8"))
        return {
            column: _column(mapped, 8 + length, entry)
            for column, entry in dict(header).items()
            if column != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError) as error:
        raise ValueError(f"{name}: not a safetensors file of columns: {error}") from error


def _column(mapped: mmap.mmap, data_at: int, entry: dict[str, Any]) -> np.ndarray:
    if entry["dtype"] not in DTYPES:
        raise ValueError(f"dtype is {entry['dtype']!r}; allowed: {', '.join(DTYPES)}")
    kind = np.dtype(DTYPES[str(entry["dtype"])])
    shape, offsets = entry["shape"], entry["data_offsets"]
    if not all(type(number) is int and number >= 0 for number in (*shape, *offsets)) or len(offsets) != 2:
        raise ValueError(f"shape {shape} and data_offsets {offsets} must be whole numbers of 0 and above")
    start, stop = offsets
    count = math.prod(shape)
    if stop - start != count * kind.itemsize or data_at + stop > len(mapped):
        raise ValueError(f"shape {shape} does not fit data_offsets {offsets} in {len(mapped)} bytes")
    return np.frombuffer(mapped, dtype=kind, count=count, offset=data_at + start).reshape(shape)


class Strings:
    """A mapped table of strings: `strings[i]` decodes one. ValueError where it is not UTF-8 or out of bounds."""

    def __init__(self, columns: Columns, name: str) -> None:
        self.name = name
        self.bytes_, self.indptr = columns[f"{name}_bytes"], columns[f"{name}_indptr"]
        if self.bytes_.ndim != 1 or self.indptr.ndim != 1 or self.indptr.dtype != np.int64:
            raise ValueError(f"{name}: the string table has columns of another kind")
        self._view = memoryview(self.bytes_)  # type: ignore[arg-type]
        if len(self.indptr) == 0 or self.indptr[0] != 0 or self.indptr[-1] != len(self.bytes_):
            raise ValueError(f"{name}: the string table does not end where its bytes do")

    def __len__(self) -> int:
        return len(self.indptr) - 1

    def __getitem__(self, row: int) -> str:
        start, stop = self.indptr[row], self.indptr[row + 1]
        if not 0 <= start <= stop <= len(self._view):
            raise ValueError(f"{self.name} {row}: bytes {start} to {stop} of {len(self._view)}: the index is damaged")
        try:
            return str(self._view[start:stop], "utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(f"{self.name} {row} is not UTF-8: the index is damaged") from error
