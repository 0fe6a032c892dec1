"""Mined negatives: for a clip, the terms that a model took for its own and that are not.

{"model_sha256": "9f2c...", "glossary_sha256": "51aa..."}                       optional first line: what mined them
{"audio_key": "POD02_S91", "hard_negs": ["Artesian", "Anesthesia"]}             hardest first
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.drops import DropLog
from data.records import iterate_records
from data.terms import normalise_term, unusable_reason

STAMP = ("model_sha256", "glossary", "glossary_sha256")


def load_hard_negatives(path: str | Path, drops: DropLog) -> dict[str, tuple[str, ...]]:
    """Normal forms by audio key, the hardest first, each once. A key that comes again adds to what it had.

    Bad lines are added to `drops`, unusable terms are noted. Raises ValueError for a file that is not JSON, or that
    has not one usable line.
    """
    found: dict[str, dict[str, None]] = {}
    for index, record in iterate_records(path):
        source = f"{path}:{index}"
        if index == 0 and _is_stamp(record):
            continue
        drops.seen()
        key = record.get("audio_key") if isinstance(record, dict) else None
        written = record.get("hard_negs") if isinstance(record, dict) else None
        if not isinstance(key, str) or not isinstance(written, list) or not all(isinstance(t, str) for t in written):
            drops.add("wrong_type", source, f"{record!r:.80}; allowed are a string audio_key and a list hard_negs")
            continue
        terms = found.setdefault(key, {})
        for surface in written:
            term = normalise_term(surface)
            reason = unusable_reason(term)
            if reason:
                drops.note(reason, source, f"{surface!r:.80}")
            else:
                terms[term] = None
    if not found:
        raise ValueError(f"{path}: no usable line; {drops.summary()}")
    return {key: tuple(terms) for key, terms in found.items()}


def read_stamp(path: str | Path) -> dict[str, str]:
    """What the first line says of the model and glossary that mined these negatives; empty when it says nothing."""
    first: Any = next(iterate_records(path), (0, None))[1]
    return {name: str(first[name]) for name in STAMP if name in first} if _is_stamp(first) else {}


def _is_stamp(record: Any) -> bool:
    return isinstance(record, dict) and "audio_key" not in record and any(name in record for name in STAMP)
