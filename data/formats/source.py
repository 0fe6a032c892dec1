"""What an importer is given: the file or folder, the settings, the account of drops, audio paths, the glossary."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from data.clip import Clip
from data.drops import DropLog
from data.fields import RecordError, as_object, strings_of
from data.glossary import load_glossary
from data.paths import PathResolver
from data.phrases import Phrases
from data.records import find_file, iterate_records
from data.settings import InputSettings

logger = logging.getLogger(__name__)

Item = TypeVar("Item")


@dataclass
class Source:
    """A samples file or folder and what is needed to read it."""

    path: Path
    settings: InputSettings
    drops: DropLog

    @functools.cached_property
    def resolver(self) -> PathResolver:
        """Audio paths as written -> on this machine."""
        return PathResolver(self.path, self.settings)

    @functools.cached_property
    def phrases(self) -> Phrases:
        """The glossary's terms, for samples that come without labels. Raises ValueError when no glossary is set."""
        if self.settings.glossary_path is None:
            raise ValueError(
                f"{self.path}: these samples have text but no terms; set --glossary_path to the terms to look for"
            )
        # An account of its own: the run reads the glossary too, and that counts what is unusable in it.
        account = DropLog(1.0)
        glossary = load_glossary(
            find_file(self.settings.glossary_path, self.settings.data_root, "--glossary_path"), account
        )
        if account.notes:
            logger.info("%s", account.summary())
        return Phrases({entry.key: entry.surface for entry in glossary.entries})

    def convert(self, items: Iterable[tuple[str, Item]], make: Callable[[str, Item], Iterable[Clip]]) -> Iterator[Clip]:
        """The clips of each (where, item) by `make(where, item)`; an item that raises RecordError is dropped."""
        for where, item in items:
            self.drops.seen()
            try:
                yield from make(where, item)
            except RecordError as error:
                self.drops.add(error.reason, where, error.detail)

    def convert_records(self, make: Callable[[str, dict[str, Any]], Iterable[Clip]]) -> Iterator[Clip]:
        """`convert` over the objects of the file, which is JSON: where is file:index."""

        def of_object(where: str, record: Any) -> Iterable[Clip]:
            return make(where, as_object(record))

        return self.convert(
            ((f"{self.path}:{index}", record) for index, record in iterate_records(self.path)), of_object
        )

    def labels(self, record: dict[str, Any], text: str) -> tuple[list[str], list[str]]:
        """(terms, ignored terms) as written: the lists `terms` and `ignored_terms`, else the glossary's in the text.

        Raises RecordError, and ValueError where there is neither list nor glossary.
        """
        if "terms" in record:
            return strings_of(record, "terms"), strings_of(record, "ignored_terms", default=[])
        return self.phrases.in_text(text)
