"""Praat TextGrids, long and short form: the intervals of each tier.

    File type = "ooTextFile"                      long form: a name before each value
    Object class = "TextGrid"
    xmin = 0
    xmax = 2.5
    tiers? <exists>
    size = 1
    item []:
        item [1]:
            class = "IntervalTier"
            name = "words"
            xmin = 0
            xmax = 2.5
            intervals: size = 2
            intervals [1]:
                xmin = 0
                xmax = 0.4
                text = "pound"
            ...
 -> Grid(0.0, 2.5, {"words": [Interval(0.0, 0.4, "pound"), ...]})

Both forms hold the same values in the same order, and all else is decoration: a value is a string in quotes (a quote
in it is doubled), a number, or <exists>; a word, a `name =` or an `[1]` is not. So one list of values is read, as
Praat itself does.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

MAX_BYTES = 1 << 27
# A string, or a word up to a space; words that are no number are decoration, and so is what stands in brackets. That is
# short: without a bound, a file of opening brackets would take the square of its length.
_VALUE = re.compile(r'"((?:[^"]|"")*)"|\[[^\]\n]{0,20}\]|([^\s"\[]+)')
_NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?\Z")


class Interval(NamedTuple):
    """A labelled stretch, in seconds."""

    start_s: float
    end_s: float
    text: str


class Grid(NamedTuple):
    """Begin and end in seconds, and the interval tiers by name, in file order; point tiers are left out."""

    start_s: float
    end_s: float
    tiers: dict[str, list[Interval]]


def read_textgrid(path: Path) -> Grid:
    """Read a TextGrid of UTF-8, or of UTF-16 with its mark. Raises ValueError with what is wrong."""
    try:
        if path.stat().st_size > MAX_BYTES:
            raise ValueError(f"the file is larger than {MAX_BYTES} bytes")
        content = path.read_bytes()
        text = content.decode("utf-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"cannot be read ({error})") from error
    values = _values(text)
    try:
        if next(values) != "ooTextFile" or next(values) != "TextGrid":
            raise ValueError("the file is no TextGrid in text form (it starts with neither ooTextFile nor TextGrid)")
        start_s, end_s = _number(values), _number(values)
        tiers: dict[str, list[Interval]] = {}
        for _ in range(_count(values)):
            kind, name = _string(values), _string(values)
            _number(values), _number(values)
            num_items = _count(values)
            if kind == "IntervalTier":
                items = [Interval(_number(values), _number(values), _string(values)) for _ in range(num_items)]
                tiers[name if name not in tiers else f"{name} {len(tiers)}"] = items
            elif kind == "TextTier":
                for _ in range(num_items):
                    _number(values), _string(values)
            else:
                raise ValueError(f"a tier of class {kind!r:.40}; allowed are IntervalTier and TextTier")
    except StopIteration:
        raise ValueError("the file ends in the middle (cut off?)") from None
    return Grid(start_s, end_s, tiers)


def _values(text: str) -> Iterator[str | float]:
    for match in _VALUE.finditer(text):
        if match[1] is not None:
            yield match[1].replace('""', '"')
        elif match[2] is not None and _NUMBER.match(match[2]):
            yield float(match[2])


def _number(values: Iterator[str | float]) -> float:
    value = next(values)
    if not isinstance(value, float) or not math.isfinite(value):
        raise ValueError(f"{value!r:.40} stands where a number should")
    return value


def _count(values: Iterator[str | float]) -> int:
    value = _number(values)
    if value < 0 or value != int(value):
        raise ValueError(f"{value} stands where a count should")
    return int(value)


def _string(values: Iterator[str | float]) -> str:
    value = next(values)
    if not isinstance(value, str):
        raise ValueError(f"{value!r:.40} stands where a text in quotes should")
    return value
