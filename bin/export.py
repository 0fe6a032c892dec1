"""Write a trained model in another form, with a model card of what was measured.

    python bin/export.py runs/a --to merged --output exports/a            plain transformers loads it
    python bin/export.py runs/a --to peft --keys v4 --output exports/a-adapter
    python bin/export.py runs/a --to audio --output exports/a-audio       for machines that only listen

The folder is there wholly or not at all, and has a MANIFEST.json with the SHA-256 of each file.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import tyro

from bin.ending import run_program
from bin.opening import log_to_standard_error
from distributed.atomic import write_folder_atomically
from retrieval.export import Dtype, export_audio, export_merged, export_peft
from retrieval.model_card import model_card
from retrieval.retriever import find_model

logger = logging.getLogger("earmark")


@dataclass
class ExportSettings:
    """Write a trained model as a merged checkpoint, a PEFT adapter or an audio-only bundle."""

    model: tyro.conf.Positional[str]
    """A run's folder, or a model folder within one (model_best, model_final, a checkpoint)."""
    to: Literal["merged", "peft", "audio"]
    """merged: full checkpoint for plain transformers; peft: adapter alone; audio: audio tower and head alone."""
    output: str
    """Folder to write; it must not exist."""
    keys: Literal["base", "v4", "v5"] = "base"
    """Key names of transformers 4 or 5; base: merged keeps the base model's own, peft takes v5."""
    dtype: Dtype = "auto"
    """Of merged and audio: each tensor's own dtype, or all in one. Folding into bf16 weights rounds once."""
    max_shard_gb: float = 4.0
    """Largest weight file, in GB; also what is held in memory."""
    model_name: str | None = None
    """Where the base model lies now, if not where it lay in training."""

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        if not 0 < self.max_shard_gb < float("inf"):
            raise ValueError(f"max_shard_gb: got {self.max_shard_gb}; allowed: a finite number above 0")
        if Path(self.output).exists():
            raise ValueError(f"output: {self.output} exists already; give another folder or remove it")
        if self.to == "audio" and self.keys != "base":
            raise ValueError(f"keys: got {self.keys!r}; allowed: base, as an audio tower alone has one scheme")
        if self.to == "peft" and self.dtype != "auto":
            raise ValueError(f"dtype: got {self.dtype!r}; allowed: auto, as an adapter keeps its fp32 masters")


def export(settings: ExportSettings) -> None:
    """Write the folder. Raises ValueError for a model or settings that do not fit."""
    settings.validate()
    model, output, started = find_model(settings.model), Path(settings.output), time.perf_counter()
    max_bytes = int(settings.max_shard_gb * 1e9)

    def write(folder: Path) -> None:
        if settings.to == "merged":
            export_merged(model, folder, settings.keys, settings.dtype, max_bytes, settings.model_name)
        elif settings.to == "audio":
            export_audio(model, folder, settings.dtype, max_bytes, settings.model_name)
        else:
            export_peft(model, folder, "v4" if settings.keys == "v4" else "v5")
        (folder / "README.md").write_text(model_card(model, settings.to), encoding="utf-8")

    output.parent.mkdir(parents=True, exist_ok=True)
    write_folder_atomically(output, write)
    size = sum(path.stat().st_size for path in output.rglob("*") if path.is_file())
    seconds = time.perf_counter() - started
    logger.info("%s: %s form of %s, %.1f MB in %.1f s", output, settings.to, model, size / 1e6, seconds)


def main(argv: Sequence[str] | None = None) -> int:
    """Settings from the command line; a user's error is one line."""
    settings = tyro.cli(ExportSettings, args=argv, use_underscores=True, prog="bin/export.py")
    log_to_standard_error()
    return run_program("bin/export.py", lambda: export(settings))


if __name__ == "__main__":
    sys.exit(main())
