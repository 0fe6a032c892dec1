"""Which format a samples file or folder has.

folder                    *.TextGrid in it (at any depth): textgrids; *.tar: webdataset
*.TextGrid, *.tar         the same, one file
JSON, JSON Lines (.gz)    by the keys of its first objects, below; else term_chunks, whose messages name the keys
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from pathlib import Path

from data.clip import Clip
from data.formats import chunk_rows, gigaspeech, lhotse_cuts, nemo_manifest, term_chunks, textgrids, webdataset_tars
from data.formats.source import Source
from data.records import keys_at_start
from data.settings import InputSettings

logger = logging.getLogger(__name__)

Importer = Callable[[Source], Iterator[Clip]]

IMPORTERS: dict[str, Importer] = {
    "term_chunks": term_chunks.clips,
    "chunk_rows": chunk_rows.clips,
    "gigaspeech": gigaspeech.clips,
    "lhotse_cuts": lhotse_cuts.clips,
    "nemo_manifest": nemo_manifest.clips,
    "textgrids": textgrids.clips,
    "webdataset": webdataset_tars.clips,
}
USED_BY = {
    "gigaspeech_subset": ("gigaspeech",),
    "term_margin_s": ("lhotse_cuts", "textgrids"),
    "no_term_ratio": ("lhotse_cuts", "textgrids"),
}
BY_SUFFIX = {".textgrid": "textgrids", ".tar": "webdataset"}
BY_KEYS = {
    "term_chunk_audio": "term_chunks",
    "chunk_audio_path": "chunk_rows",
    "audios": "gigaspeech",
    "supervisions": "lhotse_cuts",
    "tracks": "lhotse_cuts",
    "audio_filepath": "nemo_manifest",
}


def importer_for(path: Path, settings: InputSettings) -> Importer:
    """The importer of `samples_format`, or of the format that the path turns out to have. Raises ValueError.

    Warns of settings that this format has no use for.
    """
    name = format_of(path) if settings.samples_format == "auto" else settings.samples_format
    if name not in IMPORTERS:
        raise ValueError(f"samples_format is {name!r}; allowed are auto, {', '.join(IMPORTERS)}")
    for setting, formats in USED_BY.items():
        value = getattr(settings, setting)
        if name not in formats and value != getattr(InputSettings, setting):
            logger.warning(
                "%s is %s, which is ignored: %s is of format %s, and only %s use it",
                *(setting, value, path, name, " and ".join(formats)),
            )
    return IMPORTERS[name]


def format_of(path: Path) -> str:
    """The format's name. Raises ValueError for a folder that holds none, and a file that cannot be read."""
    if path.is_dir():
        for suffix in (".TextGrid", ".tar"):
            if next(path.rglob(f"*{suffix}"), None) is not None:
                return BY_SUFFIX[suffix.lower()]
        raise ValueError(f"{path}: a folder of samples holds *.TextGrid or *.tar files; this one has none")
    if path.suffix.lower() in BY_SUFFIX:
        return BY_SUFFIX[path.suffix.lower()]
    for keys in keys_at_start(path):
        for key, name in BY_KEYS.items():
            if key in keys:
                return name
    return "term_chunks"
