"""Terms as keys: the normal form that is matched, what makes a term usable, and which terms are variants.

written       normalise_term   variant_group of
"Touch-Tones" "touch-tones"    "touchtone"       ... the same group as "touch tone", "TouchTone's"
"""

from __future__ import annotations

import functools
import hashlib
import re
import unicodedata

MIN_TERM_CHARS = 3
MAX_TERM_CHARS = 300
MAX_DIGIT_SHARE = 0.5
_EMPTY = hashlib.blake2b(digest_size=8)
MAX_SPOKEN_WORDS = 6  # of a term that is looked for in a chunk's text


def normalise_term(text: str) -> str:
    """NFKC, lower case, single spaces: the form under which terms and texts are compared. Idempotent."""
    text = unicodedata.normalize("NFKC", text).lower()
    return " ".join(unicodedata.normalize("NFKC", text).split())


def unusable_reason(term: str) -> str | None:
    """Why a normalised term cannot be learned, as a short machine reason; None when it can."""
    if len(term) < MIN_TERM_CHARS:
        return "term_too_short"
    if len(term) > MAX_TERM_CHARS:
        return "term_too_long"
    if sum(char.isdigit() for char in term) > MAX_DIGIT_SHARE * len(term):
        return "term_mostly_digits"
    if not any(char.isalnum() for char in term):
        return "term_without_letters"
    return None


def is_usable_term(term: str) -> bool:
    """Whether a term has 3 to 300 characters, at most half of them digits, and any letter or digit at all."""
    return unusable_reason(normalise_term(term)) is None


def key64(text: str) -> int:
    """A signed 64-bit key of the exact string (BLAKE2b), the same on every machine; never 0, which means "none"."""
    digest = _EMPTY.copy()  # half the time of a new one
    digest.update(text.encode("utf-8"))
    return int.from_bytes(digest.digest(), "little", signed=True) or 1


def term_key(term: str) -> int:
    """Key of a term or chunk text: equal for strings with the same normal form."""
    return key64(normalise_term(term))


def variant_form(term: str) -> str:
    """The form that a term shares with its variants: no case, punctuation, hyphens, spaces, possessive or plural."""
    normal = normalise_term(term)
    return "".join(map(_stem, normal.split(" "))) or normal


@functools.lru_cache(maxsize=1 << 16)
def _stem(word: str) -> str:
    """A word's part of the variant form; one that is written with hyphens or slashes counts as several."""
    words = re.split(r"[\s\-‐-―/_]+", word.casefold())
    stems = (_singular(re.sub(r"['’]s?$", "", part)) for part in words)
    return "".join(char for stem in stems for char in stem if char.isalnum())


@functools.lru_cache(maxsize=1 << 17)  # the words of chunk texts are asked for again and again
def variant_group(term: str) -> int:
    """Key shared by spelling variants of a term. Within a group a column is masked, never a negative."""
    return key64(variant_form(term))


def run_groups(text: str) -> list[int]:
    """The variant group of each run of up to MAX_SPOKEN_WORDS words of a text in normal form, in order."""
    words = text.split()
    stems = [_stem(word) for word in words]
    groups = []
    for first in range(len(words)):
        form = ""
        for last in range(first, min(first + MAX_SPOKEN_WORDS, len(words))):
            form += stems[last]
            groups.append(key64(form or " ".join(words[first : last + 1])))
    return groups


def _singular(word: str) -> str:
    """A plain English stem, good enough to tell variants: menus = menu, entries = entry, boxes = box."""
    word = re.sub(r"\W+$", "", word)
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search(r"(ch|sh|x|z|ss)es$", word):
        return word[:-2]
    if len(word) > 3 and word.endswith("s") and not word.endswith("ss"):
        word = word[:-1]
    # "movies" became "movy" above: the singular has to follow.
    return word[:-2] + "y" if len(word) > 3 and word.endswith("ie") else word
