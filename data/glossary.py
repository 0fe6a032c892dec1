"""Glossaries: the terms that a run may use as hard negatives, with their translations and aliases.

    .json   {"surface": {"term": ..., "short_description": ..., "target_translations": {"zh": ...}}, ...}
            ["term", ...] or [{"term": ..., "translations": {...}}, ...]
    .jsonl  {"term": ..., ...} a line
    .csv .tsv   with a header that has a `term` column (other columns: translations by language), or the term first
    .txt    one term a line

In the dict form the surface is what is spoken and `term` its canonical form: they become aliases of each other.
"""

from __future__ import annotations

import csv
import json
import logging
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from data.drops import DropLog
from data.records import iterate_records
from data.terms import normalise_term, unusable_reason, variant_group

logger = logging.getLogger(__name__)

NOT_LANGUAGES = {"term", "short_description", "description", "confused", "aliases", "key"}


@dataclass
class Entry:
    """A term: its normal form, as written, translations by language, other names (normal forms)."""

    key: str
    surface: str
    translations: dict[str, list[str]] = field(default_factory=dict)
    aliases: list[str] = field(default_factory=list)
    description: str = ""


@dataclass
class Glossary:
    """Entries in file order, one a normal form."""

    path: str
    entries: list[Entry]
    _parents: dict[int, int] = field(default_factory=dict, repr=False)  # union-find over variant groups

    def __post_init__(self) -> None:
        for entry in self.entries:
            for alias in entry.aliases:
                kept, merged = self.group(entry.key), self.group(alias)
                if kept != merged:
                    self._parents[merged] = kept

    @property
    def terms(self) -> list[str]:
        """Normal forms, in file order."""
        return [entry.key for entry in self.entries]

    def group(self, term: str) -> int:
        """The variant group of any term; shared with its aliases where the glossary names some."""
        return self.standing_for(variant_group(term))

    @property
    def replaced(self) -> dict[int, int]:
        """Each variant group that aliases have joined to another one, with the group that stands for both."""
        return {group: self.standing_for(group) for group in self._parents}

    def standing_for(self, group: int) -> int:
        """The group that stands for a group and all that aliases have joined to it."""
        while group in self._parents:
            group = self._parents[group]
        return group


def group_of(term: str, glossary: Glossary | None) -> int:
    """Variant group of a term (signed 64-bit), aliases included where there is a glossary."""
    return variant_group(term) if glossary is None else glossary.group(term)


def load_glossary(path: str | Path, drops: DropLog | None = None) -> Glossary:
    """Read a glossary. Unusable terms are noted in `drops`; raises ValueError for a file that is none of the above."""
    return _collect(str(path), _rows(Path(path)), drops or DropLog())


def glossary_of(terms: Iterable[str], drops: DropLog | None = None) -> Glossary:
    """A glossary of bare terms. Unusable ones are noted in `drops`; raises ValueError when none is usable."""
    rows: list[tuple[str, str, dict[str, Any]]] = []
    for i, term in enumerate(terms):
        if not isinstance(term, str):
            raise ValueError(f"terms[{i}]: {term!r:.60} ({type(term).__name__}); allowed is a string")
        rows.append((f"terms[{i}]", term, {}))
    return _collect("terms", rows, drops or DropLog())


def _collect(path: str, rows: Iterable[tuple[str, str, dict[str, Any]]], drops: DropLog) -> Glossary:
    entries: dict[str, Entry] = {}
    for source, surface, row in rows:
        _check_row(source, surface, row)
        term = str(row.get("term") or surface)
        key = normalise_term(surface)
        reason = unusable_reason(key)
        if reason:
            drops.note(reason, source, f"{surface!r:.80}")
            continue
        entry = entries.setdefault(key, Entry(key, surface, description=str(row.get("short_description") or "")))
        for language, words in _translations(row).items():
            known = entry.translations.setdefault(language, [])
            known.extend(word for word in words if word not in known)
        names = [normalise_term(name) for name in (term, *row.get("aliases", []))]
        entry.aliases.extend(name for name in names if name and name != key and name not in entry.aliases)
    if not entries:
        why = f" ({drops.summary()})" if drops.notes else ""
        raise ValueError(f"{path}: the glossary holds no usable term{why}; it needs one of 3 or more characters")
    logger.info("glossary %s: %d terms", path, len(entries))
    return Glossary(path, list(entries.values()))


def _rows(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """(source, surface, fields) of each row."""
    suffix = path.suffix.lower()
    try:
        if suffix in (".json", ".jsonl"):
            yield from _json_rows(path)
        elif suffix in (".csv", ".tsv"):
            yield from _table_rows(path, "," if suffix == ".csv" else "\t")
        elif suffix == ".txt":
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), start=1):
                if line.strip():
                    yield f"{path}:{number}", line.strip(), {}
        else:
            raise ValueError(f"{path}: a glossary ends in .json, .jsonl, .csv, .tsv or .txt")
    except OSError as error:
        raise ValueError(
            f"--glossary_path is {str(path)!r}, which cannot be read ({error.strerror or error})"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: the text is not UTF-8 ({error})") from error


def _json_rows(path: Path) -> Iterator[tuple[str, str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        is_table = path.suffix.lower() == ".json" and file.read(100).lstrip().startswith("{")
    if is_table:
        try:
            table = json.loads(path.read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{path}: not JSON: {error}") from error
        for surface, row in table.items():
            yield f"{path}: {surface!r}", surface, {} if row is None else row
        return
    for index, row in iterate_records(path):
        source = f"{path}:{index}"
        if isinstance(row, str):
            yield source, row, {}
        elif isinstance(row, dict) and isinstance(row.get("term"), str):
            yield source, row["term"], row
        else:
            raise ValueError(f"{source}: {row!r:.80}; allowed are a string or an object with a string `term`")


def _table_rows(path: Path, delimiter: str) -> Iterator[tuple[str, str, dict[str, Any]]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter=delimiter)
        header: list[str] | None = None
        for row in rows:
            if rows.line_num == 1 and "term" in [name.strip().lower() for name in row]:
                header = [name.strip() for name in row]
                continue
            if not any(cell.strip() for cell in row):
                continue
            source = f"{path}:{rows.line_num}"
            if header is None:
                yield source, row[0].strip(), {}
                continue
            cells = {name: cell.strip() for name, cell in zip(header, row, strict=False)}
            lower = {name.lower(): cell for name, cell in cells.items()}
            words = {
                name.removeprefix("target_translations."): cell
                for name, cell in cells.items()
                if cell and name.lower() not in NOT_LANGUAGES
            }
            fields = {"short_description": lower.get("short_description", ""), "target_translations": words}
            yield source, lower["term"], fields


def _check_row(source: str, surface: str, row: Any) -> None:
    if not isinstance(row, dict):
        raise ValueError(f"{source}: {type(row).__name__} {row!r:.60}; allowed is an object with `term` and others")
    if not isinstance(row.get("term", surface), str):
        raise ValueError(f"{source}: term is {row['term']!r:.60}; allowed is a string")
    aliases = row.get("aliases", [])
    if not isinstance(aliases, list) or not all(isinstance(name, str) for name in aliases):
        raise ValueError(f"{source}: aliases is {aliases!r:.60}; allowed is a list of strings")


def _translations(row: dict[str, Any]) -> dict[str, list[str]]:
    """By language; a translation may be written as a string or a list of strings."""
    table = row.get("target_translations") or row.get("translations") or {}
    if not isinstance(table, dict):
        raise ValueError(f"target_translations is {table!r:.60}; allowed is an object of language to translation")
    return {
        language: [word for word in (words if isinstance(words, list) else [words]) if isinstance(word, str) and word]
        for language, words in table.items()
    }
