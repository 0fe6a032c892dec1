"""Training and test clips out of one set: no speaker or recording in both, and a set share of unseen test terms.

    recordings  A A A A  B B  C C C  D        test_share 0.2, by recording: whole recordings until a fifth is reached
    test        B B                           of its terms {star, hash, menu}, training has {star, menu}
    unseen      1 of 3 terms                  unseen_share 0.67: the clips of A that say "menu" are withheld

A term is *seen* when a training clip has it, or a variant of it (case, plural, hyphen), as a label, as a cut-off label
or in its text: whoever heard a word unlabelled has heard it. To raise the share of unseen terms, training clips are
withheld, those of the rarest terms first, since they cost least; to lower it, test clips. What is withheld is neither
trained on nor tested, and is handed back with its reason: nothing is lost silently.
"""

from __future__ import annotations

import heapq
import os
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Literal

from data.clip import Clip
from data.containers import real_path
from data.leaks import Kind, find_leaks
from data.phrases import words_of
from data.terms import key64, variant_form

RECORDING = r"^(.+?)_S\d+"  # POD0000000002_S0000091: what utterance ids of GigaSpeech begin with
SHARE_TOLERANCE = 0.25  # of the wanted share of test clips
By = Literal["recording", "speaker", "clip"]


@dataclass
class Split:
    """The parts, each in the order of the input."""

    train: list[Clip]
    test: list[Clip]
    withheld: list[tuple[Clip, str]] = field(default_factory=list)  # with the reason


class Heard:
    """Which labels, by variant form, a clip lets one hear."""

    def __init__(self, clips: Iterable[Clip]) -> None:
        self._labels = {variant_form(term) for clip in clips for term in clip.terms}
        self._longest = max(map(len, self._labels), default=0)

    def forms(self, clip: Clip) -> set[str]:
        """Variant forms that are labels of any clip: those of its terms, its cut-off terms, and words of its text."""
        found = {variant_form(term) for term in (*clip.terms, *clip.ignored)} & self._labels
        forms = [variant_form(word) for word in words_of(clip.text)]
        for first in range(len(forms)):
            run = ""
            for form in forms[first:]:
                run += form  # a variant form has no spaces: "touch tone" is "touchtone"
                if len(run) > self._longest:
                    break
                if run in self._labels:
                    found.add(run)
        return found


def recording_of(clip: Clip, pattern: str = RECORDING) -> str:
    """The recording as told, else the first group of `pattern` in the utterance's id, else the audio file."""
    if clip.recording:
        return clip.recording
    match = re.search(pattern, clip.segment_id)
    return match[1] if match else real_path(clip.audio_path)


def split_by(clips: list[Clip], by: By, test_share: float, seed: int = 0, pattern: str = RECORDING) -> Split:
    """Whole speakers or recordings (or single clips), drawn by `seed`, until the test has its share of the clips.

    Raises ValueError when clips tell no speaker, and when no choice comes near the share.
    """
    unit_of: dict[str, Callable[[Clip], str]] = {
        "recording": lambda clip: recording_of(clip, pattern),
        "speaker": lambda clip: clip.speaker,
        "clip": lambda clip: clip.clip_id,
    }
    units = [unit_of[by](clip) for clip in clips]
    if "" in units:
        raise ValueError(
            f"by is {by!r}, but {units.count('')} of {len(clips)} clips tell no {by}, for example "
            f"{clips[units.index('')].source}; give the samples a field `speaker`, or split by recording"
        )
    sizes, wanted = Counter(units), test_share * len(clips)
    chosen: set[str] = set()
    total = 0
    names = _without_place(sizes)
    for unit in sorted(sizes, key=lambda unit: (key64(f"{seed} {names[unit]}"), names[unit])):
        if abs(total + sizes[unit] - wanted) < abs(total - wanted):
            chosen.add(unit)
            total += sizes[unit]
    if not chosen or len(chosen) == len(sizes) or abs(total - wanted) > SHARE_TOLERANCE * wanted:
        largest, size = sizes.most_common(1)[0]
        raise ValueError(
            f"test_share is {test_share}, {wanted:.0f} clips, but whole {by}s come no nearer than {total}: there are "
            f"{len(sizes)}, the largest ({largest!r:.60}) has {size} of {len(clips)} clips; take another share or seed"
        )
    return Split(
        [clip for clip, unit in zip(clips, units, strict=True) if unit not in chosen],
        [clip for clip, unit in zip(clips, units, strict=True) if unit in chosen],
    )


def _without_place(units: Iterable[str]) -> dict[str, str]:
    """Audio files by their path from the folder that all lie in, other units as they are: the same data give the same
    split in whatever folder they lie."""
    files = [unit for unit in units if os.path.isabs(unit)]
    folder = os.path.commonpath([os.path.dirname(file) for file in files]) if files else ""
    return {unit: os.path.relpath(unit, folder) if os.path.isabs(unit) else unit for unit in units}


def withhold_leaks(split: Split, kinds: Iterable[Kind], min_text_words: int = 4) -> Split:
    """Test clips that share something with a training clip go to `withheld`."""
    test, withheld = split.test, list(split.withheld)
    for kind in kinds:
        leaking = {leak.test.clip_id: leak for leak in find_leaks(split.train, test, kind, min_text_words)}
        reason = f"same {kind} as a training clip"
        withheld += [
            (clip, f"{reason}, {leaking[clip.clip_id].train.source}") for clip in test if clip.clip_id in leaking
        ]
        test = [clip for clip in test if clip.clip_id not in leaking]
    if not test:
        raise ValueError(f"all {len(split.test)} test clips leak from training: {withheld[-1][1]}, for example")
    return Split(split.train, test, withheld)


def unseen_terms(train: Iterable[Clip], test: list[Clip]) -> tuple[set[str], set[str]]:
    """(unseen, all): variant forms of the test's labels; unseen are those that training lets nobody hear."""
    heard = Heard(test)
    labels = {variant_form(term) for clip in test for term in clip.terms}
    seen = {form for clip in train for form in heard.forms(clip)}
    return labels - seen, labels


def enforce_unseen(split: Split, share: float) -> Split:
    """Withhold clips until `share` of the test's distinct terms is unseen, to within half a term.

    Raises ValueError when that leaves nothing to train on or to test, with the share that was reached.
    """
    balance = _Balance(split)
    while balance.step(share * balance.num_terms - balance.num_unseen):
        pass
    train_kept, test_kept = balance.train.kept, balance.test.kept
    off = abs(balance.num_unseen - share * balance.num_terms)
    if off > 0.5 or not any(train_kept) or not any(test_kept):
        raise ValueError(
            f"unseen_share is {share}, but {balance.num_unseen} of {balance.num_terms} test terms are unseen at best, "
            f"with {sum(train_kept)} of {len(train_kept)} clips left to train on and {sum(test_kept)} of "
            f"{len(test_kept)} to test; take another share or seed, or a larger test_share"
        )
    withheld = [(c, "has a term that is to be unseen") for c in _where(split.train, train_kept, False)]
    withheld += [(c, "has an unseen term too many") for c in _where(split.test, test_kept, False)]
    return Split(
        _where(split.train, train_kept, True), _where(split.test, test_kept, True), [*split.withheld, *withheld]
    )


def _where(clips: list[Clip], kept: list[bool], wanted: bool) -> list[Clip]:
    return [clip for clip, one in zip(clips, kept, strict=True) if one is wanted]


class _Side:
    """The clips of one part that are not withheld: how many have each form."""

    def __init__(self, forms: list[set[str]]) -> None:
        self.forms = forms
        self.kept = [True] * len(forms)
        self.counts = Counter(form for some in forms for form in some)
        self.rows: dict[str, list[int]] = defaultdict(list)
        for row, some in enumerate(forms):
            for form in some:
                self.rows[form].append(row)

    def withhold(self, form: str) -> set[str]:
        """Withhold all clips that have the form; the forms that no clip has any longer."""
        gone: set[str] = set()
        for row in self.rows[form]:
            if self.kept[row]:
                self.kept[row] = False
                self.counts.subtract(self.forms[row])
                gone |= {one for one in self.forms[row] if self.counts[one] == 0}
        return gone


class _Balance:
    """Training and test as counts of terms, and the steps that change the share of unseen ones."""

    def __init__(self, split: Split) -> None:
        heard = Heard(split.test)
        self.train = _Side([heard.forms(clip) for clip in split.train])
        self.test = _Side([{variant_form(term) for term in clip.terms} for clip in split.test])
        terms = sorted(self.test.counts)
        # Heaps of (count, tie-breaker, term): the rarest first. Counts only fall, so an old entry is corrected late.
        self._seen = [(self.train.counts[t], key64(t), t) for t in terms if self.train.counts[t]]
        self._unseen = [(self.test.counts[t], key64(t), t) for t in terms if not self.train.counts[t]]
        self.num_terms, self.num_unseen = len(terms), len(self._unseen)
        heapq.heapify(self._seen)
        heapq.heapify(self._unseen)

    def step(self, missing: float) -> bool:
        """Make one more term unseen, or one unseen term vanish from the test; False when there is nothing to do."""
        if abs(missing) <= 0.5:
            return False
        if missing > 0:
            term = _rarest(self._seen, self.train.counts, self.test.counts)
            gone = set() if term is None else self.train.withhold(term)
            for one in gone:
                if self.test.counts[one]:
                    self.num_unseen += 1
                    heapq.heappush(self._unseen, (self.test.counts[one], key64(one), one))
        else:
            term = _rarest(self._unseen, self.test.counts, self.test.counts)
            gone = set() if term is None else self.test.withhold(term)
            self.num_terms -= len(gone)
            self.num_unseen -= sum(self.train.counts[one] == 0 for one in gone)
        return term is not None


def _rarest(heap: list[tuple[int, int, str]], counts: Counter[str], needed: Counter[str]) -> str | None:
    """Take the term of fewest clips off the heap, which still has to be `needed`."""
    while heap:
        count, key, term = heapq.heappop(heap)
        if not needed[term]:
            continue
        if count == counts[term]:
            return term
        if counts[term]:
            heapq.heappush(heap, (counts[term], key, term))
    return None
