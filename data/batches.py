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

from collections.abc import Callable, Iterable, Sequence, Set
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from data.audio import SAMPLE_RATE
from data.clip import Clip
from data.glossary import Glossary
from data.groups import GroupMap, GroupSet
from data.terms import key64, normalise_term, run_groups, variant_group

Tokenize = Callable[[list[str]], list[list[int]]]
Allocate = Callable[[int], np.ndarray]  # number of int16 samples -> array to fill


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


class Term(NamedTuple):
    text: str  # normal form
    key: int
    group: int  # of variants, aliases included


@dataclass(slots=True)
class Labels:
    """What a batch needs to know of a clip beside its samples."""

    clip_id: str
    index: int  # position in the loader's clips; -1 for a random window
    text: str
    text_key: int  # 0 where there is no text
    terms: list[Term]
    ignored: list[int]  # groups of the clip's terms that are neither positive nor negative
    runs: Sequence[int] | np.ndarray = field(default=())  # variant groups of the runs of words of the text
    others: Sequence[Term] = ()  # to be embedded with the batch, no positives of the clip


def term_of(text: str, groups: GroupMap) -> Term:
    return Term(text, key64(text), groups[variant_group(text)])


def labels_of(clip: Clip, index: int, groups: GroupMap, with_runs: bool) -> Labels:
    """The labels of a clip that no table holds. `with_runs`: also look for terms that its text speaks."""
    key = normalise_term(clip.text)
    return Labels(
        clip.clip_id,
        index,
        clip.text,
        key64(key) if key else 0,
        [term_of(term, groups) for term in clip.terms],
        [groups[variant_group(term)] for term in clip.ignored],
        run_groups(key) if with_runs else (),
    )


def collate(
    clips: Sequence[Clip],
    pcms: Sequence[np.ndarray],
    tokenize: Tokenize,
    glossary: Glossary | None = None,
    clip_indices: Sequence[int] | None = None,
    maskable: Iterable[int] = (),
    extra_terms: Sequence[Sequence[str]] | None = None,
) -> Batch:
    """Clips with their samples (int16 [S] each) -> Batch; see `pack`.

    `extra_terms`: for each clip, terms (normal forms) to embed with the batch that are no positives of it.
    `maskable`: variant groups of the terms that any batch may hold; those that a clip's text speaks are ignored for it.
    """
    groups, masked = GroupMap(glossary.replaced if glossary else None), GroupSet(maskable)
    indices = range(len(clips)) if clip_indices is None else clip_indices
    labels = [labels_of(clip, index, groups, len(masked) > 0) for clip, index in zip(clips, indices, strict=True)]
    for label, terms in zip(labels, extra_terms or [()] * len(labels), strict=True):
        label.others = [term_of(term, groups) for term in terms]
    return pack(labels, pcms, tokenize, groups, masked)


def pack(
    labels: Sequence[Labels],
    pcms: Sequence[np.ndarray],
    tokenize: Tokenize,
    groups: GroupMap,
    maskable: GroupSet,
    allocate: Allocate = lambda num_samples: np.empty(num_samples, dtype=np.int16),
) -> Batch:
    """Equal texts share a row, terms are unique. `allocate` says where the samples are written to, once.

    Terms are encoded in their normal form, so that every rank's copy of a term is the same string. ValueError when the
    tokenizer gives no token for a string.
    """
    assert len(labels) == len(pcms), (len(labels), len(pcms))
    text_rows: dict[str, int] = {}
    text_row_B: list[int] = []
    term_rows: dict[Term, int] = {}
    positives: list[list[int]] = []
    ignored: list[list[int]] = []
    for label, spoken in zip(labels, _spoken(labels, groups, maskable), strict=True):
        text_row_B.append(text_rows.setdefault(label.text, len(text_rows)) if label.text_key else -1)
        positives.append([term_rows.setdefault(term, len(term_rows)) for term in label.terms])
        ignored.append(list(dict.fromkeys([*(term.group for term in label.terms), *label.ignored, *spoken])))

    for label in labels:
        for term in label.others:
            term_rows.setdefault(term, len(term_rows))

    strings = [*text_rows, *(term.text for term in term_rows)]
    tokens = tokenize(strings) if strings else []
    token_lengths = [len(ids) for ids in tokens]
    if not all(token_lengths):
        raise ValueError(f"the tokenizer gives no token for {strings[token_lengths.index(0)]!r}")
    num_samples = [len(pcm_S) for pcm_S in pcms]
    pcm_S = allocate(sum(num_samples))
    if pcms:
        np.concatenate(pcms, out=pcm_S)
    pos_indptr_B1, pos_terms = _csr(positives)
    ign_indptr_B1, ign_groups = _csr(ignored)
    return Batch(
        clip_ids=[label.clip_id for label in labels],
        clip_index_B=_int64([label.index for label in labels]),
        is_no_term_B=np.array([not label.terms for label in labels], dtype=bool),
        pcm_S=pcm_S,
        num_samples=num_samples,
        token_ids_P=_int64([token for ids in tokens for token in ids]),
        token_lengths=token_lengths,
        num_texts=len(text_rows),
        text_row_B=_int64(text_row_B),
        text_keys_B=_int64([label.text_key for label in labels]),
        terms=[term.text for term in term_rows],
        term_keys_N=_int64([term.key for term in term_rows]),
        term_groups_N=_int64([term.group for term in term_rows]),
        pos_indptr_B1=pos_indptr_B1,
        pos_terms=pos_terms,
        ign_indptr_B1=ign_indptr_B1,
        ign_groups=ign_groups,
    )


def spoken_groups(text: str, maskable: Set[int], glossary: Glossary | None = None) -> list[int]:
    """The groups of `maskable` that a run of words of the text (normal form) spells, in order."""
    if not maskable:
        return []
    groups = (run if glossary is None else glossary.standing_for(run) for run in run_groups(text))
    return [group for group in groups if group in maskable]


def _spoken(labels: Sequence[Labels], groups: GroupMap, maskable: GroupSet) -> list[list[int]]:
    """Of each clip the groups of `maskable` that a run of words of its text spells, in order."""
    spoken: list[list[int]] = [[] for _ in labels]
    if len(maskable) and labels:
        runs_R = groups.apply(np.concatenate([np.asarray(label.runs, dtype=np.int64) for label in labels]))
        owner_R = np.repeat(np.arange(len(labels)), [len(label.runs) for label in labels])
        hits = maskable.holds(runs_R)
        for owner, group in zip(owner_R[hits].tolist(), runs_R[hits].tolist(), strict=True):
            spoken[owner].append(group)
    return spoken


def _csr(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Row lists -> (indptr with one more entry than rows, all values)."""
    indptr = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
    return indptr, _int64([value for row in rows for value in row])


def _int64(values: Sequence[int]) -> np.ndarray:
    return np.array(values, dtype=np.int64)
