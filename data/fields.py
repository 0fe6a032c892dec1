"""Fields out of one record, checked: the value, or a `RecordError` with a reason to count and a detail to read.

Records come from anywhere: a field may be missing, of another type, a number too large for a float, text that UTF-8
cannot hold, or a list nested ten thousand deep, which `repr` alone would stumble over.
"""

from __future__ import annotations

import math
import reprlib
from typing import Any


class _Short(reprlib.Repr):
    """Bounded in depth and length, whatever it is given."""

    def repr_int(self, value: int, _level: int) -> str:
        """Python writes out no integer of more than 4300 digits."""
        return repr(value) if value.bit_length() < 200 else f"a number of {value.bit_length()} bits"


_SHORT = _Short()
_SHORT.maxlevel, _SHORT.maxlist, _SHORT.maxdict, _SHORT.maxstring, _SHORT.maxother = 2, 4, 4, 60, 60


class RecordError(Exception):
    """A record that cannot be used."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason
        self.detail = detail


def shown(value: Any) -> str:
    """The value and its type, short, for a message."""
    return f"{_SHORT.repr(value)} ({type(value).__name__})"


def as_object(value: Any, name: str = "the record") -> dict[str, Any]:
    """A JSON object, or RecordError "not_an_object"."""
    if not isinstance(value, dict):
        raise RecordError("not_an_object", f"{name} is {shown(value)}; allowed is an object")
    return value


def text_of(record: dict[str, Any], name: str, may_be_empty: bool = True, default: str | None = None) -> str:
    """A string without spaces around it. A missing or null field is `default` where one is given."""
    if record.get(name) is None and default is not None:
        return default
    if name not in record:
        raise _missing(record, name)
    value = record[name]
    if not isinstance(value, str):
        raise RecordError("wrong_type", f"{name} is {shown(value)}; allowed is a string")
    if not may_be_empty and not value.strip():
        raise RecordError("empty_field", f"{name} is empty")
    return _encodable(value, name).strip()


def strings_of(record: dict[str, Any], name: str, default: list[str] | None = None) -> list[str]:
    """A list of strings; a missing field is `default` where one is given."""
    if name not in record:
        if default is None:
            raise _missing(record, name)
        return default
    value = record[name]
    if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
        raise RecordError("wrong_type", f"{name} is {shown(value)}; allowed is a list of strings")
    return [_encodable(item, name) for item in value]


def label_of(record: dict[str, Any], name: str, default: str | None = None) -> str:
    """An id: a string, or a whole number taken as one."""
    if name not in record and default is None:
        raise _missing(record, name)
    value = record.get(name, default)
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise RecordError("wrong_type", f"{name} is {shown(value)}; allowed is a string")
    try:
        return _encodable(str(value), name)
    except ValueError as error:  # Python writes out no integer of more than 4300 digits
        raise RecordError("wrong_type", f"{name} is a number of thousands of digits; allowed is a string") from error


def flag_of(record: dict[str, Any], name: str) -> bool:
    """true or false; a missing field is false."""
    value = record.get(name, False)
    if not isinstance(value, bool):
        raise RecordError("wrong_type", f"{name} is {shown(value)}; allowed are true and false")
    return value


def seconds_of(record: dict[str, Any], name: str, required: bool = False) -> float | None:
    """A time in seconds, 0 or more; None when it is missing or null and not required."""
    value = record.get(name)
    if value is None and not required:
        return None
    if value is None and name not in record:
        raise _missing(record, name)
    return as_seconds(value, name)


def as_seconds(value: Any, name: str) -> float:
    """A time in seconds, finite and 0 or more."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecordError("wrong_type", f"{name} is {shown(value)}; allowed is a number of seconds")
    try:
        seconds = float(value)
    except OverflowError as error:  # a JSON integer may have any number of digits
        raise RecordError("bad_span", f"{name} is a number of hundreds of digits; allowed are seconds") from error
    if not math.isfinite(seconds) or seconds < 0:
        raise RecordError("bad_span", f"{name} is {seconds}; allowed are 0 and above")
    return seconds


def check_order(start_s: float | None, end_s: float | None, start_name: str, end_name: str) -> None:
    """RecordError "bad_span" unless the start (None: 0) is before the end (None: that of the file)."""
    if end_s is not None and (start_s or 0.0) >= end_s:
        raise RecordError("bad_span", f"{start_name} {start_s or 0.0} is not before {end_name} {end_s}")


def _missing(record: dict[str, Any], name: str) -> RecordError:
    known = ", ".join(_SHORT.repr(key).strip("'") for key in sorted(record)[:8])
    return RecordError("missing_field", f"no {name}; there are {known}")


def _encodable(value: str, name: str) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise RecordError("bad_text", f"{name} is {value!a:.60}, which holds half a surrogate pair") from error
    return value
