"""A batch as numpy arrays and host integers: what a rank's clips and their strings become before the device sees them.

    clips  0 "press the pound key"  {pound key, pound}     1 ""  {}        2 "pound"  {pound}  cut: key
    text_row_B   [0, -1, 1]                      strings: "press the pound key", "pound" | "pound key", "pound"
    term_keys_N  keys of "pound key", "pound"    (num_texts = 2, then N = 2)
    pos_indptr_B1 [0, 2, 2, 3]   pos_terms [0, 1, 1]        positives, compressed by clip (CSR)
    ign_indptr_B1 [0, 2, 2, 4]   ign_groups  variant groups that are no negatives of the clip: of its positives, of its
                                            cut terms, of terms that its text holds without being labelled

Shape letters: B clips of this rank, N unique terms of this rank, S samples of all clips one after another,
P tokens of all strings one after another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass

import numpy as np

from data.audio import SAMPLE_RATE
from data.clips import Clip
from data.glossary import Glossary, group_of
from data.terms import key64, normalise_term

MAX_SPOKEN_WORDS = 6  # of a term that is looked for in a chunk's text

Tokenize = Callable[[list[str]], list[list[int]]]


@dataclass
class Batch:
    """The clips of one rank and step. Lists hold host integers, so that layouts need no device synchronisation."""

    clip_ids: list[str]
    clip_index_B: np.ndarray  # int64: position in the loader's clips; -1 for a random window
    is_no_term_B: np.ndarray  # bool
    pcm_S: np.ndarray  # int16, 16 kHz mono
    num_samples: list[int]  # of each clip
    token_ids_P: np.ndarray  # int64: first the chunk texts, then the N terms
    token_lengths: list[int]  # of each string; num_texts + N of them
    num_texts: int  # distinct chunk texts
    text_row_B: np.ndarray  # int64: row of the clip's text among the strings; -1 where it has none
    text_keys_B: np.ndarray  # int64: equal for equal texts; 0 where there is none
    terms: list[str]  # the N terms as encoded (normal forms)
    term_keys_N: np.ndarray  # int64
    term_groups_N: np.ndarray  # int64 variant groups
    pos_indptr_B1: np.ndarray  # int64, B + 1
    pos_terms: np.ndarray  # int64 indices into N
    ign_indptr_B1: np.ndarray  # int64, B + 1
    ign_groups: np.ndarray  # int64 variant groups

    @property
    def num_clips(self) -> int:
        return len(self.clip_ids)

    @property
    def num_terms(self) -> int:
        return len(self.terms)

    @property
    def duration_s(self) -> float:
        """Seconds of audio."""
        return len(self.pcm_S) / SAMPLE_RATE


def collate(
    clips: Sequence[Clip],
    pcms: Sequence[np.ndarray],
    tokenize: Tokenize,
    glossary: Glossary | None = None,
    clip_indices: Sequence[int] | None = None,
    maskable: Set[int] = frozenset(),
    extra_terms: Sequence[Sequence[str]] | None = None,
) -> Batch:
    """Clips with their samples (int16 [S] each) -> Batch. Equal texts share a row, terms are unique.

    `extra_terms`: for each clip, terms (normal forms) to embed with the batch that are no positives of it.
    `maskable`: variant groups of the terms that any batch may hold; those that a clip's text speaks are ignored for it.

    Terms are encoded in their normal form, so that every rank's copy of a term is the same string. ValueError when the
    tokenizer gives no token for a string.
    """
    assert len(clips) == len(pcms), (len(clips), len(pcms))
    text_rows: dict[str, int] = {}
    text_row_B, text_keys_B = [], []
    term_rows: dict[str, int] = {}
    positives: list[list[int]] = []
    ignored: list[list[int]] = []
    for clip in clips:
        key = normalise_term(clip.text)
        text_row_B.append(text_rows.setdefault(clip.text, len(text_rows)) if key else -1)
        text_keys_B.append(key64(key) if key else 0)
        positives.append([term_rows.setdefault(term, len(term_rows)) for term in clip.terms])
        named = [group_of(term, glossary) for term in (*clip.terms, *clip.ignored)]
        ignored.append(list(dict.fromkeys([*named, *spoken_groups(key, maskable, glossary)])))

    for terms in extra_terms or ():
        for term in terms:
            term_rows.setdefault(term, len(term_rows))

    strings = [*text_rows, *term_rows]
    tokens = tokenize(strings) if strings else []
    for string, ids in zip(strings, tokens, strict=True):
        if not len(ids):
            raise ValueError(f"the tokenizer gives no token for {string!r}")
    pos_indptr_B1, pos_terms = _csr(positives)
    ign_indptr_B1, ign_groups = _csr(ignored)
    return Batch(
        clip_ids=[clip.clip_id for clip in clips],
        clip_index_B=_int64(range(len(clips)) if clip_indices is None else clip_indices),
        is_no_term_B=np.array([clip.is_no_term for clip in clips], dtype=bool),
        pcm_S=np.concatenate(pcms) if pcms else np.zeros(0, dtype=np.int16),
        num_samples=[len(pcm_S) for pcm_S in pcms],
        token_ids_P=np.concatenate([_int64(ids) for ids in tokens]) if tokens else _int64([]),
        token_lengths=[len(ids) for ids in tokens],
        num_texts=len(text_rows),
        text_row_B=_int64(text_row_B),
        text_keys_B=_int64(text_keys_B),
        terms=list(term_rows),
        term_keys_N=_int64([key64(term) for term in term_rows]),
        term_groups_N=_int64([group_of(term, glossary) for term in term_rows]),
        pos_indptr_B1=pos_indptr_B1,
        pos_terms=pos_terms,
        ign_indptr_B1=ign_indptr_B1,
        ign_groups=ign_groups,
    )


def spoken_groups(text: str, maskable: Set[int], glossary: Glossary | None = None) -> list[int]:
    """The groups of `maskable` that a run of words of the text (normal form) spells, in order."""
    if not maskable:
        return []
    words = text.split()
    runs = (
        " ".join(words[first:stop])
        for first in range(len(words))
        for stop in range(first + 1, min(first + MAX_SPOKEN_WORDS, len(words)) + 1)
    )
    return [group for run in runs if (group := group_of(run, glossary)) in maskable]


def _csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Row lists -> (indptr with one more entry than rows, all values)."""
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return indptr, _int64([value for row in rows for value in row])


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.array(list(values), dtype=np.int64)
