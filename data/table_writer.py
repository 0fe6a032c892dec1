"""Writes the columns of a table (data/table.py), by blocks of clips. Blocks can be made in other processes.

    rows_of([clip, ...])    a block: for each field what its clips add to the table's columns
        text_bytes, text_sizes                  UTF-8 of all its strings, and how many bytes each has
        positive_terms, positive_sizes          places among the block's terms, and how many each clip has
        term_bytes, term_sizes, term_key        the block's terms, each once
    joined_rows             two blocks and more as one
    TableWriter.extend      takes blocks in order, and makes one table of them, whatever their sizes

Shapes: C clips of a block.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data.clip import Clip
from data.columns import Columns, Spool, StringSpool, write_columns
from data.table import PACKED, PER_CLIP, ROWS, TEXTS
from data.terms import key64, normalise_term, run_groups, variant_group

WORDS = ("term", "surface")


def rows_of(clips: Sequence[Clip], *, packed: bool = False) -> dict[str, np.ndarray]:
    """A block of clips; `packed`: also the keys and word runs that packed folders hold, the samples' place excepted."""
    rows: dict[str, np.ndarray] = {}
    for field in TEXTS:
        rows |= _strings(field, [getattr(clip, field) for clip in clips])
    for field in ("start_s", "end_s", "duration_s"):
        values = [getattr(clip, field) for clip in clips]
        rows[field] = np.array([math.nan if value is None else value for value in values], dtype=np.float64)
    texts = [normalise_term(clip.text) for clip in clips]
    rows["text_key"] = _int64([key64(text) if text else 0 for text in texts])
    places: dict[str, dict[str, int]] = {name: {} for name in WORDS}  # of each string among the block's
    owned: dict[str, list[int]] = {f"{row}_{part}": [] for row, parts in ROWS.items() for part in parts}
    for clip in clips:
        for column, words in (
            ("positive_terms", clip.terms),
            ("ignored_terms", clip.ignored),
            ("positive_surfaces", clip.surfaces),
        ):
            seen = places["surface" if column == "positive_surfaces" else "term"]
            owned[column].extend(seen.setdefault(word, len(seen)) for word in words)
    rows |= {column: _int64(found) for column, found in owned.items()}
    rows["positive_sizes"] = _int64([len(clip.terms) for clip in clips])
    rows["ignored_sizes"] = _int64([len(clip.ignored) for clip in clips])
    for name, seen in places.items():
        rows |= {**_strings(name, list(seen)), f"{name}_key": _int64(list(map(key64, seen)))}
    if packed:
        runs = list(map(run_groups, texts))
        rows["spoken_groups"] = _int64(list(itertools.chain.from_iterable(runs)))
        rows["spoken_sizes"] = _int64(list(map(len, runs)))
        rows["path_key"] = _int64([key64(clip.audio_path) for clip in clips])
        rows["segment_key"] = _int64([key64(clip.segment_id) for clip in clips])
    return rows


def _strings(name: str, strings: list[str]) -> dict[str, np.ndarray]:
    encoded = [string.encode("utf-8") for string in strings]
    content = np.frombuffer(b"".join(encoded), dtype=np.uint8)
    return {f"{name}_bytes": content, f"{name}_sizes": _int64(list(map(len, encoded)))}


def _int64(values: list[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)


def joined_rows(blocks: Sequence[Columns]) -> dict[str, np.ndarray]:
    """One block of several, at least one, with the same columns."""
    joined = {name: [block[name] for block in blocks] for name in blocks[0]}
    for row, parts in ROWS.items():
        for part in parts:
            sizes = [len(block[f"{part.removesuffix('s')}_key"]) for block in blocks]
            before = np.cumsum([0, *sizes[:-1]])  # places count from the block's own first string
            column = f"{row}_{part}"
            joined[column] = [places + base for places, base in zip(joined[column], before, strict=True)]
    return {name: np.concatenate(parts) for name, parts in joined.items()}


class TableWriter:
    """Takes clips by the block; what it holds in memory does not grow with the texts."""

    def __init__(self, folder: str | Path | None = None, *, packed: bool = False) -> None:
        """`folder`: of temporary files. `packed`: with the columns of packed clips."""
        self._texts = {field: StringSpool(folder) for field in TEXTS}
        per_clip = PER_CLIP | (PACKED if packed else {})
        self._per_clip = {field: Spool(kind, folder) for field, kind in per_clip.items()}
        self._vocabularies = {name: Vocabulary(folder) for name in WORDS}
        self._rows = {f"{row}_indptr": Spool(np.int64, folder) for row in ROWS}
        self._owners = {f"{row}_{part}": Spool(np.int64, folder) for row, parts in ROWS.items() for part in parts}
        self._spoken = {"indptr": Spool(np.int64, folder), "groups": Spool(np.int64, folder)} if packed else {}
        for spool in (*self._rows.values(), *(s for name, s in self._spoken.items() if name == "indptr")):
            spool.append(0)
        self.num_clips = 0

    def extend(self, rows: Columns) -> None:
        """The clips of a block, of `rows_of`; of packed ones also `sample_start`, `num_samples` and `audio_key`."""
        self.num_clips += len(rows["text_key"])
        for field, strings in self._texts.items():
            strings.extend(rows[f"{field}_bytes"], rows[f"{field}_sizes"])
        for field, spool in self._per_clip.items():
            spool.extend(rows[field])
        firsts = {name: vocabulary.extend(rows, name) for name, vocabulary in self._vocabularies.items()}
        for row, parts in ROWS.items():
            start = self._owners[f"{row}_terms"].num_values
            self._rows[f"{row}_indptr"].extend(start + np.cumsum(rows[f"{row}_sizes"]))
            for part in parts:
                column = f"{row}_{part}"
                self._owners[column].extend(rows[column] + firsts[part.removesuffix("s")])
        if self._spoken:
            start = self._spoken["groups"].num_values
            self._spoken["indptr"].extend(start + np.cumsum(rows["spoken_sizes"]))
            self._spoken["groups"].extend(rows["spoken_groups"])

    def write(self, file: BinaryIO) -> None:
        """The table as one safetensors file; the writer is used up."""
        columns: dict[str, Spool | np.ndarray] = {**self._per_clip, **self._rows}
        for field, strings in self._texts.items():
            columns |= strings.columns(field)
        terms = StringSpool()
        keys, groups = Spool(np.int64), Spool(np.int64)
        place_of: dict[str, np.ndarray] = {}
        for name, vocabulary in self._vocabularies.items():
            strings = terms if name == "term" else StringSpool()
            place_of[name] = vocabulary.settle(strings)
            columns |= strings.columns(name)
        for row, parts in ROWS.items():
            for part in parts:
                numbers = self._owners[f"{row}_{part}"].read()
                columns[f"{row}_{part}"] = place_of[part.removesuffix("s")][numbers].astype(np.int32)
        distinct = terms.settled()
        for row_number in range(len(distinct)):
            keys.append(key64(distinct[row_number]))
            groups.append(variant_group(distinct[row_number]))
        columns |= {"term_key": keys, "term_group": groups}
        columns |= {f"spoken_{name}": spool for name, spool in self._spoken.items()}
        write_columns(file, columns)


class Vocabulary:
    """Strings as they come, numbered; equal ones become one row at the end.

    A dictionary would take some 150 bytes a distinct string; 64-bit keys sorted at the end take 16.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self._strings, self._keys = StringSpool(folder), Spool(np.int64, folder)

    def extend(self, rows: Columns, name: str) -> int:
        """Take a block's strings; the number of the first, from which on they are counted."""
        first = self._keys.num_values
        self._strings.extend(rows[f"{name}_bytes"], rows[f"{name}_sizes"])
        self._keys.extend(rows[f"{name}_key"])
        return first

    def settle(self, out: StringSpool) -> np.ndarray:
        """Write the distinct strings to `out`, in order of appearance; int64, the row of each occurrence."""
        keys = self._keys.read()
        _, first, inverse = np.unique(keys, return_index=True, return_inverse=True)
        by_appearance = np.argsort(first, kind="stable")
        rank = np.empty_like(by_appearance)
        rank[by_appearance] = np.arange(len(by_appearance))
        strings = self._strings.settled()
        for number in first[by_appearance].tolist():
            out.append(strings[number])
        return rank[inverse]
