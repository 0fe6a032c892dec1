"""Pack loose audio and its samples file into a few large shards, or check a packed folder.

    python bin/pack.py --samples_path train.json --out packed/train
    python bin/pack.py --out packed/train --verify

Then train on it: bin/train.py --train_samples_path packed/train. A run that was stopped, in whatever way, goes on when
the same command is given again; a finished one finds that there is nothing to do.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field

import tyro
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bin.ending import run_program
from bin.runlog import configure_logging, console
from data.clips import iterate_clips
from data.drops import DropLog
from data.packing import pack_clips
from data.records import find_file
from data.settings import InputSettings
from data.shards import verify

logger = logging.getLogger("earmark")


@dataclass
class PackSettings:
    """Loose audio files and their samples file -> shards of int16 samples, 16 kHz mono, with an index."""

    out: str
    """Folder of the shards; an earlier, unfinished run in it is gone on with."""
    samples_path: str | None = None
    """Samples file or folder to pack, in any format that training reads; may be left out with --verify."""
    verify: bool = False
    """Read all files of the folder and compare them with the manifest; pack nothing."""
    num_workers: int = 0
    """Processes that decode; 0 = as many as there are cores."""
    shard_mb: int = 256
    """Size from which a new shard is begun, in megabytes."""
    audio_cache_mb: int = 512
    """Memory, shared out among the workers, for decoded files that several clips are cut from."""
    input: InputSettings = field(default_factory=InputSettings)

    def validate(self) -> None:
        """Raise ValueError for the first field whose value is not allowed."""
        if not self.verify and self.samples_path is None:
            raise ValueError("samples_path: give the samples file to pack, or --verify to check a packed folder")
        for name, lowest in {"num_workers": 0, "shard_mb": 1, "audio_cache_mb": 0}.items():
            if getattr(self, name) < lowest:
                raise ValueError(f"{name} is {getattr(self, name)}; allowed are {lowest} and above")
        self.input.validate_input()


def pack(settings: PackSettings) -> int:
    """Pack or verify. Returns the exit code: 1 when a file of the folder is not what was packed."""
    settings.validate()
    if settings.verify:
        with _Bar("verify", "bytes") as bar:
            faults = verify(settings.out, bar.show)
        for fault in faults:
            logger.error("%s", fault)
        logger.info("%s: %s", settings.out, f"{len(faults)} files are damaged" if faults else "all files are as packed")
        return 1 if faults else 0

    assert settings.samples_path is not None
    inputs, drops = settings.input, DropLog(settings.input.max_bad_fraction)
    path = find_file(settings.samples_path, inputs.data_root, "--samples_path", or_folder=True)
    logger.info("reading %s", path)
    with _Bar("pack", "clips") as bar:
        manifest = pack_clips(
            iterate_clips(path, inputs, drops),
            settings.out,
            drops,
            num_workers=settings.num_workers or os.cpu_count() or 1,
            shard_mb=settings.shard_mb,
            cache_mb=settings.audio_cache_mb,
            told=bar.show,
        )
    logger.info("%s", drops.summary())
    seconds, size = manifest.num_samples / 16_000, sum(entry.size for entry in manifest.files.values())
    logger.info(
        "%s: %d clips, %.2f h of audio stored, %d shards, %.2f GB",
        settings.out, manifest.num_clips, seconds / 3600, len(manifest.shards), size / 1e9,
    )  # fmt: skip
    return 0


class _Bar:
    """A bar with rate and time left; nothing at all when the output is no terminal."""

    def __init__(self, name: str, unit: str) -> None:
        columns = (BarColumn(), TextColumn("{task.fields[note]}"), TimeElapsedColumn(), TextColumn("left"))
        self.unit, self.started = unit, time.monotonic()
        self.progress = Progress(
            TextColumn(name), *columns, TimeRemainingColumn(), console=console, disable=not console.is_terminal
        )
        self.task = self.progress.add_task(name, total=None, note="")
        self.before: int | None = None  # done by an earlier run: no part of the rate

    def __enter__(self) -> "_Bar":
        self.progress.start()
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.progress.stop()

    def show(self, done: int, total: int) -> None:
        if self.before is None:
            self.before, self.started = done, time.monotonic()
        rate = (done - self.before) / max(1e-3, time.monotonic() - self.started)
        note = f"{done:,} of {total:,} {self.unit}  {rate:,.0f}/s"
        self.progress.update(self.task, completed=done, total=total, note=note)


def main(argv: Sequence[str] | None = None) -> int:
    """Settings from the command line; a user's error is one line."""
    settings = tyro.cli(tyro.conf.OmitArgPrefixes[PackSettings], args=argv, use_underscores=True, prog="bin/pack.py")
    configure_logging(0, None)
    return run_program("bin/pack.py", lambda: pack(settings))


if __name__ == "__main__":
    sys.exit(main())
