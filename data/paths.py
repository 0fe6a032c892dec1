"""Audio paths as samples files write them -> paths on this machine."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from pathlib import Path

from data.containers import place_of
from data.fields import RecordError
from data.legacy_shards import LegacyShards
from data.settings import InputSettings

logger = logging.getLogger(__name__)


class PathResolver:
    """Audio paths as written -> paths on this machine.

    `path_remap` is applied first. What `legacy_shards` hold is taken from there. An absolute path is taken as it is.
    A relative one is looked for under `audio_root` where that is set, else in the folder of the samples file, then
    under `data_root`; it may not climb out of them.
    """

    def __init__(
        self, samples_path: Path, settings: InputSettings, exists: Callable[[str], bool] = os.path.lexists
    ) -> None:
        beside = samples_path if samples_path.is_dir() else samples_path.parent
        roots = [settings.audio_root] if settings.audio_root else [str(beside), settings.data_root]
        self.roots = [os.path.abspath(os.path.expanduser(root)) for root in roots]
        self.remaps = [tuple(pair.split("=", 1)) for pair in settings.path_remap]
        self.unused = {old for old, _ in self.remaps}
        self.exists = exists
        if settings.audio_root and not os.path.isdir(self.roots[0]):
            raise ValueError(f"audio_root is {settings.audio_root!r}, which is not a folder")
        self.legacy = LegacyShards(settings.legacy_shards) if settings.legacy_shards else None
        self.legacy_used = False
        self._last: tuple[str | None, str] = (None, "")

    def resolve(self, written: str) -> str:
        """An absolute path to something that exists; RecordError "missing" (says where it looked) or another."""
        # Segments of one recording follow one another: one look at the file system will do for them.
        if written != self._last[0]:
            self._last = (written, self._resolve(written))
        return self._last[1]

    def _resolve(self, written: str) -> str:
        if "\0" in written:
            raise RecordError("bad_path", f"{written!r:.60} holds a NUL")
        path = written
        for old, new in self.remaps:
            if path == old or path.startswith(old if old.endswith("/") else old + "/"):
                path = new + path[len(old) :]
                self.unused.discard(old)
                break
        if self.legacy is not None and (kept := self.legacy.find(path)) is not None:
            self.legacy_used = True
            return kept
        place = place_of(path)
        candidates = (
            [place.path] if os.path.isabs(place.path) else [os.path.join(root, place.path) for root in self.roots]
        )
        for candidate, root in zip(candidates, self.roots, strict=False):
            inside = os.path.normpath(candidate)
            if not os.path.isabs(path) and not inside.startswith(root.rstrip("/") + "/"):
                raise RecordError("outside_root", f"{written!r} leaves {root}")
            if self.exists(inside):
                return str(place._replace(path=inside))
        looked = ", ".join(map(os.path.normpath, candidates))
        if self.legacy is not None:
            looked += f", and among the {len(self.legacy)} clips of {self.legacy.folder}"
        raise RecordError("missing", f"{written!r}: looked for {looked}")

    def warn_of_unused(self) -> None:
        """Log a warning for each remap and for old shards that no path has needed."""
        for old in sorted(self.unused):
            logger.warning("path_remap %s=...: no audio path starts with it", old)
        if self.legacy is not None and not self.legacy_used:
            logger.warning("legacy_shards %s: they hold none of the audio that the samples name", self.legacy.folder)
