"""Records out of a samples file, one at a time: a JSON array (streamed, however long) or JSON Lines, gzip or plain."""

from __future__ import annotations

import contextlib
import gzip
import io
import itertools
import json
import logging
import os
import stat
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ijson
import numpy as np

logger = logging.getLogger(__name__)

HEAD_BYTES = READ_BYTES = 1 << 16
MAX_LINE_BYTES = 1 << 26
MAX_DEPTH = 200
LEVELS = {"start_map": 1, "start_array": 1, "end_map": -1, "end_array": -1}
DECORATION = bytes(set(range(256)) - set(b'[]{}"'))
BRACKETS = np.zeros(256, np.int8)  # what a byte outside of strings adds to the depth
BRACKETS[list(b"[{")], BRACKETS[list(b"]}")] = 1, -1
GZIP_MAGIC = b"\x1f\x8b"
BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
UTF8_BOM = b"\xef\xbb\xbf"


def find_file(path: str, data_root: str, flag: str, or_folder: bool = False) -> Path:
    """The file as given, else under `data_root`; a folder only with `or_folder`.

    Raises ValueError that names `flag` and where it was looked for.
    """
    tried = [Path(path).expanduser()]
    if not tried[0].is_absolute():
        tried.append(Path(data_root).expanduser() / path)
    for candidate in tried:
        if candidate.is_file() or (or_folder and candidate.is_dir()):
            return candidate
        if candidate.is_dir():
            raise ValueError(f"{flag} is {path!r}, a folder; it must name a file")
    looked = ", ".join(dict.fromkeys(str(candidate.absolute()) for candidate in tried))
    raise ValueError(
        f"{flag} is {path!r}, and no such file was found (looked for {looked}). "
        f"Set {flag} to the file, or --data_root to the folder that it is under"
    )


def iterate_records(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(index, record) of each item, in file order; a record may be of any JSON type, the caller judges it.

    Raises ValueError when the file is missing, empty, not UTF-8, or not JSON (NaN and Infinity included), with the
    number of the record and what the parser said.
    """
    with open_text(path) as (file, start):
        start = start.lstrip()
        if not start:
            raise ValueError(f"{path}: the file is empty; expected a JSON array of records or one record a line")
        if start.startswith(b"["):
            yield from _iterate_array(Path(path), file, "item")
        elif start.startswith(b"{"):
            yield from _iterate_lines(Path(path), file)
        else:
            raise ValueError(
                f"{path}: starts with {start[:20]!r}; expected a JSON array of records or one record a line"
            )


def iterate_array_in(path: str | Path, key: str) -> Iterator[tuple[int, Any]]:
    """(index, item) of the array under `key` of the one object that the file is, streamed; errors as above."""
    with open_text(path) as (file, _):
        yield from _iterate_array(Path(path), file, f"{key}.item")


def keys_at_start(path: str | Path) -> Iterator[frozenset[str]]:
    """The keys of each object at the top (of the file, of its array, on its lines) within the first 64 kB.

    It is for telling formats apart, so it stops without an error where the text ends or is no JSON; an object that
    the 64 kB cut has the keys so far. Raises ValueError only for a file that cannot be read or is UTF-16.
    """
    with open_text(path) as (_, start):
        pass
    level, keys = -1 if start.lstrip().startswith(b"[") else 0, set[str]()
    try:
        for event, value in ijson.basic_parse(io.BytesIO(start), multiple_values=True):
            if event == "map_key" and level == 1:
                keys.add(value)
            level += LEVELS.get(event, 0)
            if event == "end_map" and level == 0:
                yield frozenset(keys)
                keys = set()
    except (ijson.JSONError, UnicodeDecodeError, ValueError) as error:
        logger.debug("the first 64 kB of %s end in: %s", path, error)
    if keys:
        yield frozenset(keys)


@contextlib.contextmanager
def open_text(path: str | Path) -> Iterator[tuple[BinaryIO, bytes]]:
    """(a stream at the text's beginning, its first 64 kB): gzip is unpacked, a UTF-8 byte order mark skipped.

    Raises ValueError for anything but a readable regular file, and for UTF-16.
    """
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # opening a FIFO would wait for its writer
            raise ValueError(f"{path}: cannot be read (it is not a file, but a folder, pipe or device)")
        with contextlib.ExitStack() as stack:
            file: Any = stack.enter_context(open(path, "rb"))
            if file.read(2) == GZIP_MAGIC:
                file.seek(0)
                file = stack.enter_context(gzip.GzipFile(fileobj=file))
            file.seek(0)
            start = file.read(HEAD_BYTES)
            if any(start.startswith(bom) for bom in BOMS):
                raise ValueError(f"{path}: the text is UTF-16; save it as UTF-8")
            file.seek(len(UTF8_BOM) if start.startswith(UTF8_BOM) else 0)
            yield file, start.removeprefix(UTF8_BOM)
    except (OSError, EOFError, zlib.error) as error:
        said = (error.strerror if isinstance(error, OSError) else None) or error
        raise ValueError(f"{path}: cannot be read ({said})") from error


def _iterate_array(path: Path, file: BinaryIO, prefix: str) -> Iterator[tuple[int, Any]]:
    index = 0
    try:
        for record in ijson.items(DepthGuard(file), prefix, use_float=True, buf_size=READ_BYTES):
            yield index, record
            index += 1
    except (ijson.JSONError, UnicodeDecodeError, ValueError, RecursionError) as error:
        problem = "ends in the middle (cut off?)" if "EOF" in str(error) or "ncomplete" in str(error) else "is not JSON"
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the array {problem} at record {index} (counted from 0): {said}") from error


def _iterate_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    index = 0
    for number in itertools.count(1):
        line = file.readline(MAX_LINE_BYTES)
        if not line:
            return
        if len(line) == MAX_LINE_BYTES:
            raise ValueError(f"{path}: line {number} is longer than {MAX_LINE_BYTES} bytes; expected one record a line")
        if not line.strip():
            continue
        try:
            if line.count(b"[") + line.count(b"{") > MAX_DEPTH:  # strings count here, not in the guard
                DepthGuard(io.BytesIO(line)).read()
            record = json.loads(line.decode("utf-8"), parse_constant=_refuse_constant)
        except (ValueError, RecursionError) as error:
            if number == 1 and not line.rstrip().endswith(b"}"):
                raise ValueError(
                    f"{path}: one JSON object over several lines; expected an array of records or one record a line"
                ) from error
            cut = "" if line.endswith(b"\n") else "; the last line has no end, so the file may be cut off"
            raise ValueError(f"{path}: line {number} is not JSON: {error}{cut}") from error
        yield index, record
        index += 1


class DepthGuard:
    """A stream of JSON that raises ValueError where brackets nest deeper than MAX_DEPTH.

    ijson keeps the path to where it stands for each level, which is quadratic: 200 kB of "[" took all memory.
    """

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self._depth = 0
        self._in_string = False
        self._escape = b""  # a backslash whose partner is still to be read

    def read(self, num_bytes: int = -1) -> bytes:
        """As the stream's own `read`."""
        chunk = self.file.read(num_bytes)
        text = self._escape + chunk
        self._escape = b"\\" if (len(text) - len(text.rstrip(b"\\"))) % 2 else b""
        if self._escape:
            text = text[:-1]
        if b"\\" in text:
            text = text.replace(b"\\\\", b"").replace(b'\\"', b"")
        parts = text.translate(None, DECORATION).split(b'"')
        outside = b"".join(parts[self._in_string :: 2])
        self._in_string ^= len(parts) % 2 == 0
        depths = self._depth + np.cumsum(BRACKETS[np.frombuffer(outside, np.uint8)], dtype=np.int64)
        if depths.max(initial=0) > MAX_DEPTH:
            raise ValueError(f"lists or objects are nested more than {MAX_DEPTH} deep")
        self._depth = int(depths[-1]) if len(depths) else self._depth
        return chunk


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; write null or leave the field out")
