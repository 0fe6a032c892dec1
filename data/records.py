"""Records out of a samples file, one at a time: a JSON array (streamed, however long) or JSON Lines."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import ijson

BOMS = {b"\xff\xfe": "UTF-16", b"\xfe\xff": "UTF-16"}
UTF8_BOM = b"\xef\xbb\xbf"


def find_file(path: str, data_root: str, flag: str) -> Path:
    """The file as given, else under `data_root`. Raises ValueError that names `flag` and where it was looked for."""
    tried = [Path(path).expanduser()]
    if not tried[0].is_absolute():
        tried.append(Path(data_root).expanduser() / path)
    for candidate in tried:
        if candidate.is_file():
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
    path = Path(path)
    try:
        with path.open("rb") as file:
            start = file.read(4096)
            if any(start.startswith(bom) for bom in BOMS):
                raise ValueError(f"{path}: the text is UTF-16; save it as UTF-8")
            file.seek(len(UTF8_BOM) if start.startswith(UTF8_BOM) else 0)
            start = start.removeprefix(UTF8_BOM).lstrip()
            if not start:
                raise ValueError(f"{path}: the file is empty; expected a JSON array of records or one record a line")
            if start.startswith(b"["):
                yield from _iterate_array(path, file)
            elif start.startswith(b"{"):
                yield from _iterate_lines(path, file)
            else:
                raise ValueError(
                    f"{path}: starts with {start[:20]!r}; expected a JSON array of records or one record a line"
                )
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from error


def _iterate_array(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    index = 0
    try:
        for record in ijson.items(file, "item", use_float=True):
            yield index, record
            index += 1
    except (ijson.JSONError, UnicodeDecodeError, ValueError, RecursionError) as error:
        problem = "ends in the middle (cut off?)" if "EOF" in str(error) or "ncomplete" in str(error) else "is not JSON"
        said = " ".join(str(error).split())[:200]
        raise ValueError(f"{path}: the array {problem} at record {index} (counted from 0): {said}") from error


def _iterate_lines(path: Path, file: BinaryIO) -> Iterator[tuple[int, Any]]:
    index = 0
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        try:
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


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number; write null or leave the field out")
