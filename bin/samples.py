"""Samples in and out of the programs that work on them without training: read and checked, written as JSON Lines."""

import gzip
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from data.checks import check_clips
from data.clips import Clip, load_clips
from data.drops import DropLog
from data.records import find_file
from data.settings import InputSettings
from distributed.atomic import write_file_atomically

logger = logging.getLogger(__name__)


def read_samples(path: str, flag: str, settings: InputSettings, drops: DropLog, check_audio: bool = True) -> list[Clip]:
    """The usable clips of a samples file or folder, each with its duration when `check_audio`.

    The caller checks the limit of `drops`, when nothing more can be dropped. Raises ValueError.
    """
    settings.validate_input()
    clips = load_clips(find_file(path, settings.data_root, flag, or_folder=True), settings, drops)
    return check_clips(clips, drops) if check_audio else clips


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    """Strict JSON Lines, atomically, packed when the name ends in .gz; the same records give the same bytes."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as raw:
            # No time and no name in the gzip header.
            file = gzip.GzipFile("", "wb", fileobj=raw, mtime=0) if path.suffix == ".gz" else raw
            for record in records:
                file.write((json.dumps(record, ensure_ascii=False, allow_nan=False) + "\n").encode())
            if file is not raw:
                file.close()

    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, write)
