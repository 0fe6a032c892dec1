"""Mined hard negatives: a JSON Lines file in, for each training clip a few terms to embed with its batches out.

    {"model_sha256": ..., "glossary_sha256": ..., "num_negatives": 20, ...}       optional first line: who mined it
    {"audio_key": "POD02_S91", "hard_negs": ["Artisan", "Modesto", ...]}          hardest first

`audio_key` is a clip's id, the path of its audio file, or that file's name where no other clip has the same. What a
clip speaks is never a negative of it: a positive, a variant of one, a term in its text that is not labelled.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from data.batches import spoken_groups
from data.clips import Clip
from data.drops import DropLog
from data.glossary import Glossary, group_of
from data.records import iterate_records
from data.terms import normalise_term, unusable_reason

STREAM = 0x6E65  # keeps these draws apart from other random numbers of the same seed


@dataclass
class HardNegatives:
    """The file: row r names the terms `terms[i] for i in indices[indptr[r]:indptr[r + 1]]`."""

    path: str
    stamp: dict[str, Any]
    """Empty when the file says nothing of who mined it."""
    rows: dict[str, int]
    """Row of each audio_key."""
    terms: list[str]
    """Distinct normal forms."""
    indptr: np.ndarray = field(repr=False)
    indices: np.ndarray = field(repr=False)

    def of(self, key: str) -> list[str] | None:
        """The terms of a key, hardest first; None when the file has no such line."""
        row = self.rows.get(key)
        if row is None:
            return None
        return [self.terms[i] for i in self.indices[self.indptr[row] : self.indptr[row + 1]]]


def load_hard_negatives(path: str | Path, drops: DropLog) -> HardNegatives:
    """Read the whole file. Lines that are no negatives of anything are noted in `drops`; a second line of the same key
    replaces the first. Raises ValueError for a file that is missing, not JSON, or holds no negative at all."""
    stamp: dict[str, Any] = {}
    rows: dict[str, int] = {}
    places: dict[str, int] = {}
    indptr, indices = array("q", [0]), array("i")
    for index, record in iterate_records(path):
        source = f"{path}:{index}"
        if index == 0 and isinstance(record, dict) and "audio_key" not in record:
            stamp = record
            continue
        key = record.get("audio_key") if isinstance(record, dict) else None
        terms = record.get("hard_negs") if isinstance(record, dict) else None
        if not isinstance(key, str) or not isinstance(terms, list) or not all(isinstance(t, str) for t in terms):
            drops.note("bad_hard_negatives", source, f"{record!r:.80}; allowed: a string audio_key, a list hard_negs")
            continue
        if key in rows:
            drops.note("repeated_hard_negatives", source, f"{key!r} again; the last line counts")
        normal = dict.fromkeys(normalise_term(term) for term in terms)
        usable = [term for term in normal if unusable_reason(term) is None]
        if len(usable) < len(normal):
            drops.note("unusable_hard_negative", source, f"{sorted(set(normal) - set(usable))!r:.80}")
        indices.extend(places.setdefault(term, len(places)) for term in usable)
        rows[key] = len(indptr) - 1
        indptr.append(len(indices))
    if not indices:
        raise ValueError(f"{path}: no hard negatives; expected lines such as {{'audio_key': ..., 'hard_negs': [...]}}")
    as_arrays = (np.frombuffer(values, dtype=dtype) for values, dtype in ((indptr, np.int64), (indices, np.int32)))
    return HardNegatives(str(path), stamp, rows, list(places), *as_arrays)


@dataclass
class ClipNegatives:
    """Negatives by position in the training clips."""

    terms: list[str]
    indptr: np.ndarray
    indices: np.ndarray
    num_matched: int
    """Clips that the file has a line for."""
    num_refused: int
    """Negatives left out because their clip speaks them."""

    def draw(self, clip: int, count: int, seed: int, epoch: int) -> list[str]:
        """`count` terms of a clip (fewer, where it has fewer): the same for the same seed and epoch on every rank."""
        own = self.indices[self.indptr[clip] : self.indptr[clip + 1]]
        if len(own) > count:
            chosen = np.random.default_rng((STREAM, seed, epoch, clip)).choice(len(own), count, replace=False)
            own = own[np.sort(chosen)]
        return [self.terms[i] for i in own]


def match_negatives(clips: Sequence[Clip], found: HardNegatives, glossary: Glossary | None) -> ClipNegatives:
    """Each clip's negatives, by its id, its audio's path or its audio's name, less those that it speaks."""
    groups = [group_of(term, glossary) for term in found.terms]
    maskable = frozenset(groups)
    names = _unique_names(clip.audio_path for clip in clips)
    indptr, indices = array("q", [0]), array("i")
    num_matched = num_refused = 0
    for clip in clips:
        name = os.path.basename(clip.audio_path)
        keys = (clip.clip_id, clip.audio_path, name if name in names else "")
        row = next((found.rows[key] for key in keys if key in found.rows), None)
        if row is not None:
            num_matched += 1
            own = found.indices[found.indptr[row] : found.indptr[row + 1]]
            spoken = {group_of(term, glossary) for term in (*clip.terms, *clip.ignored)}
            spoken.update(spoken_groups(normalise_term(clip.text), maskable, glossary))
            kept = [int(i) for i in own if groups[i] not in spoken]
            num_refused += len(own) - len(kept)
            indices.extend(kept)
        indptr.append(len(indices))
    return ClipNegatives(
        found.terms, np.array(indptr, dtype=np.int64), np.array(indices, dtype=np.int32), num_matched, num_refused
    )


def terms_sha256(terms: Iterable[str]) -> str:
    """SHA-256 of normal forms in their order: which glossary it is, whatever file it came in."""
    digest = hashlib.sha256()
    for term in terms:
        digest.update(f"{term}\n".encode())
    return digest.hexdigest()


def _unique_names(paths: Iterable[str]) -> set[str]:
    """File names that only one path has."""
    owner: dict[str, str] = {}
    shared: set[str] = set()
    for path in paths:
        if owner.setdefault(os.path.basename(path), path) != path:
            shared.add(os.path.basename(path))
    return owner.keys() - shared
