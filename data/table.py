"""Clips as columns: two million of them cost a process a memory map, not two million Python objects.

    row  clip_id  text                       positive_terms  ignored_terms  start_s end_s (or: sample_start num_samples)
    0    "s1"     "press the pound key"      0 1                            0.5     2.0
    1    "s2"     ""                                                        nan     nan
    2    "s3"     "the pound"                1               0              1.0     1.8
    terms: 0 "pound key", 1 "pound", with their 64-bit keys and variant groups

Variable-length fields are compressed rows: `positive_indptr` [C + 1] into `positive_terms`. A table comes from a list
of clips (loose files, for the workers of the loader) or from a packed folder's index. Shapes: C clips, V terms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import fields, replace
from typing import overload

import numpy as np

from data.clip import Clip
from data.columns import Columns, Strings
from data.containers import Place
from data.groups import GroupSet
from data.reader import SAMPLE_BYTES
from data.terms import key64

TEXTS = tuple(field.name for field in fields(Clip) if field.type == "str")
# Of each clip; those that a table may lack are marked below.
PER_CLIP = {"start_s": np.float64, "end_s": np.float64, "duration_s": np.float64, "text_key": np.int64}
# Only where the samples lie in shards. The keys find what a test set shares without reading two million rows.
PACKED = {
    "sample_start": np.int64,
    "num_samples": np.int32,
    "audio_key": np.int64,
    "path_key": np.int64,
    "segment_key": np.int64,
}
ROWS = {"positive": ("terms", "surfaces"), "ignored": ("terms",)}


class ClipTable(Sequence[Clip]):
    """Reads like a list of clips; `shard_paths` and `shard_starts` (samples; one more entry) say where packed ones lie.

    Raises ValueError when columns are missing or do not fit one another.
    """

    def __init__(
        self, columns: Columns, shard_paths: Sequence[str] = (), shard_starts: Sequence[int] = (0,), name: str = "table"
    ) -> None:
        self.columns, self.name = columns, name
        self.shard_paths, self.shard_starts = list(shard_paths), np.array(shard_starts, dtype=np.int64)
        try:
            self._texts = {field: Strings(columns, field) for field in TEXTS}
            self.terms, self._surfaces = Strings(columns, "term"), Strings(columns, "surface")
            self.term_keys_V, self.term_groups_V = columns["term_key"], columns["term_group"]
            self.start_s_C, self.end_s_C = columns["start_s"], columns["end_s"]
            self.text_keys_C = columns["text_key"]
            self.positive_indptr, self.positive_terms = columns["positive_indptr"], columns["positive_terms"]
            self._positive_surfaces = columns["positive_surfaces"]
            self._ignored_indptr, self._ignored_terms = columns["ignored_indptr"], columns["ignored_terms"]
            self.durations_s_C = columns["duration_s"]
        except KeyError as error:
            raise ValueError(f"{name}: no column {error.args[0]}") from None
        self.sample_start_C, self.num_samples_C = columns.get("sample_start"), columns.get("num_samples")
        self.spoken_indptr, self.spoken_groups = columns.get("spoken_indptr"), columns.get("spoken_groups")
        self._check()

    def _check(self) -> None:
        """What can be told without reading the rows; they are checked as they are read."""
        count = len(self)
        kinds = PER_CLIP | PACKED | {f"{row}_indptr": np.int64 for row in (*ROWS, "spoken")}
        kinds |= {f"{row}_{part}": np.int32 for row, parts in ROWS.items() for part in parts}
        kinds |= {"term_key": np.int64, "term_group": np.int64, "spoken_groups": np.int64}
        there = {name: self.columns[name] for name in kinds if name in self.columns}
        odd = [name for name, column in there.items() if (column.ndim, column.dtype) != (1, kinds[name])]
        if odd or sum(field in self.columns for field in PACKED) not in (0, len(PACKED)):
            raise ValueError(f"{self.name}: columns of another kind, or some are missing: {odd or list(PACKED)}")
        sized = {field: len(self._texts[field]) for field in TEXTS} | {
            field: len(self.columns[field]) for field in (*PER_CLIP, *PACKED) if field in self.columns
        }
        sized |= {field: len(self.columns[f"{field}_indptr"]) - 1 for field in ROWS}
        wrong = {field: size for field, size in sized.items() if size != count}
        if wrong or len(self.term_keys_V) != len(self.terms) or len(self.term_groups_V) != len(self.terms):
            raise ValueError(f"{self.name}: columns of {count} clips and {len(self.terms)} terms have sizes {wrong}")
        if self.sample_start_C is not None and self.num_samples_C is not None and count:
            ends_C = self.sample_start_C + self.num_samples_C
            # (The start alone too: what is added to it may be more than 64 bits hold.)
            reach = max(ends_C.max(), self.sample_start_C.max())
            if self.sample_start_C.min() < 0 or self.num_samples_C.min() < 1 or reach > self.shard_starts[-1]:
                raise ValueError(
                    f"{self.name}: clips reach to sample {reach}, the shards hold {self.shard_starts[-1]}: "
                    "index and shards are not of one packing; pack again"
                )

    # ------------------------------------------------------------------------------------------- as a list of clips

    def __len__(self) -> int:
        return len(self._texts["clip_id"])

    @overload
    def __getitem__(self, row: int) -> Clip: ...
    @overload
    def __getitem__(self, row: slice) -> list[Clip]: ...
    def __getitem__(self, row: int | slice) -> Clip | list[Clip]:
        if isinstance(row, slice):
            return [self[place] for place in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(row)
        row %= len(self)
        places = self.positives(row)
        surfaces = self._places(self._positive_surfaces, self.positive_indptr, row, len(self._surfaces))
        audio_path, start_s, end_s = self.audio(row)
        return Clip(
            **{field: texts[row] for field, texts in self._texts.items()} | {"audio_path": audio_path},
            start_s=start_s,
            end_s=end_s,
            terms=tuple(self.terms[place] for place in places),
            ignored=tuple(self.terms[place] for place in self.ignored(row)),
            surfaces=tuple(self._surfaces[place] for place in surfaces),
            is_no_term=not len(places),
            duration_s=_or_none(self.durations_s_C[row]),
        )

    def __iter__(self) -> Iterator[Clip]:
        return (self[row] for row in range(len(self)))

    # ------------------------------------------------------------------------------------------- one field at a time

    def clip_id(self, row: int) -> str:
        return self._texts["clip_id"][row]

    def text(self, row: int) -> str:
        return self._texts["text"][row]

    def source(self, row: int) -> str:
        return self._texts["source"][row]

    def positives(self, row: int) -> list[int]:
        """Places among the table's terms."""
        return self._places(self.positive_terms, self.positive_indptr, row, len(self.terms))

    def ignored(self, row: int) -> list[int]:
        return self._places(self._ignored_terms, self._ignored_indptr, row, len(self.terms))

    def _places(self, places: np.ndarray, indptr: np.ndarray, row: int, size: int) -> list[int]:
        """A row of places in a list of `size`. ValueError where the index is damaged."""
        start, stop = int(indptr[row]), int(indptr[row + 1])
        found: list[int] = places[start:stop].tolist()
        if not 0 <= start <= stop <= len(places) or (found and not 0 <= min(found) <= max(found) < size):
            raise ValueError(f"{self.name}: clip {row} has places {found[:3]} of {size}: the index is damaged")
        return found

    @property
    def is_packed(self) -> bool:
        """Whether the samples lie in shards."""
        return self.sample_start_C is not None

    def shard_of(self, row: int) -> tuple[str, int, int]:
        """(shard, first sample in it, number of samples) of a packed clip."""
        assert self.sample_start_C is not None
        assert self.num_samples_C is not None
        start = int(self.sample_start_C[row])
        shard = int(np.searchsorted(self.shard_starts, start, side="right")) - 1
        return self.shard_paths[shard], start - int(self.shard_starts[shard]), int(self.num_samples_C[row])

    def audio(self, row: int) -> tuple[str, float | None, float | None]:
        """(path, start, end in seconds) as `AudioReader.read` takes them; of a packed clip its place in a shard."""
        if not self.is_packed:
            return self._texts["audio_path"][row], _or_none(self.start_s_C[row]), _or_none(self.end_s_C[row])
        path, first, count = self.shard_of(row)
        return str(Place(path, first * SAMPLE_BYTES, count * SAMPLE_BYTES)), None, None

    def as_listed(self, row: int) -> Clip:
        """The clip with the file and span that its audio came from."""
        start_s, end_s = _or_none(self.start_s_C[row]), _or_none(self.end_s_C[row])
        return replace(self[row], audio_path=self._texts["audio_path"][row], start_s=start_s, end_s=end_s)

    @property
    def is_no_term_C(self) -> np.ndarray:
        return np.diff(self.positive_indptr) == 0

    @property
    def positive_term_places(self) -> np.ndarray:
        """int64: the terms that are a positive of any clip, each once, in the table's order."""
        size, places = len(self.terms), self.positive_terms
        if len(places) and not 0 <= places.min() <= places.max() < size:
            raise ValueError(f"{self.name}: a clip has a term that is none of the {size}: the index is damaged")
        return np.flatnonzero(np.bincount(places, minlength=size))


def as_listed(clips: Sequence[Clip]) -> Iterator[Clip]:
    """The clips with the files that they were made of, packed or not."""
    if isinstance(clips, ClipTable) and clips.is_packed:
        return (clips.as_listed(row) for row in range(len(clips)))
    return iter(clips)


def terms_of(clips: Sequence[Clip]) -> list[str]:
    """Every term that is a positive of a clip, each once, in order of appearance."""
    if isinstance(clips, ClipTable):
        return [clips.terms[place] for place in clips.positive_term_places]
    return list(dict.fromkeys(term for clip in clips for term in clip.terms))


def rows_shared_with(
    table: ClipTable, clips: Sequence[Clip], audio_keys: Sequence[int]
) -> tuple[list[Clip], list[int]]:
    """What a packed table may share with other clips, without reading all of it.

    (Clips of the table with an id or an original audio path of theirs, that path in place of the shard's; rows whose
    samples have one of the keys.)
    """
    columns = table.columns
    wanted = {
        "segment_key": [key64(clip.segment_id) for clip in clips],
        "path_key": [key64(clip.audio_path) for clip in clips],
        "audio_key": list(audio_keys),
    }
    rows = {name: np.flatnonzero(GroupSet(keys).holds(columns[name])).tolist() for name, keys in wanted.items()}
    alike = sorted({*rows["segment_key"], *rows["path_key"]})
    return [table.as_listed(row) for row in alike], rows["audio_key"]


def _or_none(value: float) -> float | None:
    return None if math.isnan(value) else float(value)
