"""Which glossary terms a text names: word sequences found in word sequences, the longest match first.

Terms:  "york", "new york", "pound key"      Text: "In New York, press the pound-key."
Words:  in new york press the pound key
Longest: new york, pound key                 Nested: york (spoken, yet not what is meant: neither positive nor negative)
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from data.terms import normalise_term

# Scripts that set no spaces are matched character by character.
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
# A word: letters, digits and marks, with apostrophes, ampersands and dots inside (it's, at&t, u.s), and c++, c#.
_WORD = re.compile(rf"[{_UNSPACED}]|[^\W_{_UNSPACED}]+(?:['’&.][^\W_{_UNSPACED}]+)*[+#]*")


class Found(NamedTuple):
    """A term and the words that it takes up, first and last."""

    term: str
    first: int
    last: int


def words_of(text: str) -> list[str]:
    """The words of a text in their normal form: no case, no punctuation around them, hyphens split."""
    return _WORD.findall(normalise_term(text))


class Phrases:
    """Terms to look for. `surfaces`: normal form -> as written, for display."""

    def __init__(self, surfaces: Mapping[str, str]) -> None:
        self.surfaces = surfaces
        self._terms: dict[tuple[str, ...], str] = {}
        lengths: dict[str, set[int]] = defaultdict(set)  # by first word: how many words such terms have
        for term in surfaces:
            words = tuple(words_of(term))
            if words:
                self._terms.setdefault(words, term)
                lengths[words[0]].add(len(words))
        self._lengths = {word: sorted(some) for word, some in lengths.items()}

    def all(self, words: Sequence[str]) -> list[Found]:
        """Every term in the words, nested and overlapping ones included, from left to right."""
        words = tuple(words)
        return [
            Found(self._terms[words[first : first + length]], first, first + length - 1)
            for first, word in enumerate(words)
            for length in self._lengths.get(word, ())
            if first + length <= len(words) and words[first : first + length] in self._terms
        ]

    def longest(self, words: Sequence[str]) -> tuple[list[Found], list[Found]]:
        """(terms from left to right, each the longest that starts there, none overlapping; all others found)."""
        taken, others, free = [], [], 0
        for found in sorted(self.all(words), key=lambda one: (one.first, -one.last)):
            if found.first >= free:
                taken.append(found)
                free = found.last + 1
            else:
                others.append(found)
        return taken, others

    def in_text(self, text: str) -> tuple[list[str], list[str]]:
        """(terms of a text as written in the glossary, longest match; the others in it), each once."""
        taken, others = self.longest(words_of(text))
        return _written(taken, self.surfaces), _written(others, self.surfaces)


def _written(found: Iterable[Found], surfaces: Mapping[str, str]) -> list[str]:
    return list(dict.fromkeys(surfaces[one.term] for one in found))
