"""Mined negatives by training clip: a few of each clip's are embedded with every batch that it is in.

A line of the file is a clip's when its key is the clip's id, the path of its audio file, or that file's name where no
other clip has the same. What a clip speaks is never a negative of it: a positive, a variant of one, a term in its text
that is not labelled.
"""

from __future__ import annotations

import hashlib
import os
from array import array
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.batches import spoken_groups
from data.clip import Clip
from data.glossary import Glossary, group_of
from data.table import as_listed
from data.terms import normalise_term

STREAM = 0x6E65  # keeps these draws apart from other random numbers of the same seed


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


def match_negatives(
    clips: Sequence[Clip], found: Mapping[str, Sequence[str]], glossary: Glossary | None
) -> ClipNegatives:
    """Each clip's negatives, by its id, its audio's path or its audio's name, less those that it speaks.

    `found`: normal forms by key, hardest first.
    """
    places = {term: i for i, term in enumerate(dict.fromkeys(term for terms in found.values() for term in terms))}
    groups = [group_of(term, glossary) for term in places]
    maskable = frozenset(groups)
    names = _unique_names(clip.audio_path for clip in as_listed(clips))
    indptr, indices = array("q", [0]), array("i")
    num_matched = num_refused = 0
    for clip in as_listed(clips):
        name = os.path.basename(clip.audio_path)
        keys = (clip.clip_id, clip.audio_path, name if name in names else "")
        key = next((key for key in keys if key in found), None)
        if key is not None:
            num_matched += 1
            own = [places[term] for term in found[key]]
            spoken = {group_of(term, glossary) for term in (*clip.terms, *clip.ignored)}
            spoken.update(spoken_groups(normalise_term(clip.text), maskable, glossary))
            kept = [i for i in own if groups[i] not in spoken]
            num_refused += len(own) - len(kept)
            indices.extend(kept)
        indptr.append(len(indices))
    return ClipNegatives(
        list(places), np.array(indptr, dtype=np.int64), np.array(indices, dtype=np.int32), num_matched, num_refused
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
