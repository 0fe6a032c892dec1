"""Mine hard negatives: for every clip, the glossary terms that a model takes for it and that are wrong.

    python bin/mine.py runs/a --samples_path train.json --glossary_path glossary.json --output hard.jsonl
    torchrun --nproc_per_node=8 bin/mine.py runs/a/model_best --samples_path train.json ...
    torchrun ... bin/train.py ... --hard_neg_jsonl hard.jsonl

Work is cut into parts, of terms to embed and then of clips to search; process r does parts r, r + W, r + 2 W, ..., and
each part is a file that is there wholly or not at all. A run that was killed goes on where it stopped, at any number of
processes, and the result has the same bytes as that of one that was not.

    hard.jsonl.parts/job.json  terms-00000.safetensors ...  clips-00000.jsonl ...       removed at the end
    hard.jsonl                 a stamp, then {"audio_key": clip id, "hard_negs": [terms, hardest first]} a line
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import json
import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro
from torch import Tensor

from bin.ending import run_program
from bin.evaluation import encode_terms
from bin.runlog import configure_logging
from bin.search_clips import ClipSearch
from data.checks import check_clips
from data.clips import Clip, load_clips
from data.drops import DropLog
from data.glossary import Glossary, load_glossary
from data.mined import terms_sha256
from data.reader import AudioReader
from data.records import find_file
from data.settings import DataSettings
from distributed import processes
from distributed.atomic import json_bytes, read_tensors, remove_strays, write_file_atomically, write_tensors
from distributed.collectives import barrier, on_rank_0
from distributed.processes import World
from retrieval.model_files import OpenedModel, open_model
from retrieval.retriever import find_model

logger = logging.getLogger("earmark")

FORMAT = "earmark-hard-negatives-1"
TERMS_A_PART, CLIPS_A_PART = 16_384, 1_024  # a minute of work or so on a GPU
ALONE = World(0, 1, 0, torch.device("cpu"), "none", 0)  # a part is done by one process by itself


@dataclass
class MineSettings:
    """Hard negatives for every clip, as JSON Lines that bin/train.py --hard_neg_jsonl reads."""

    model: tyro.conf.Positional[str]
    """A run's folder, or a model folder within one (model_best, a checkpoint, an export)."""
    samples_path: str = "data/xl_term_level_chunks_merged.json"
    """Clips to mine for: the training samples."""
    glossary_path: str = "data/terms/glossary_filtered.json"
    """Terms to choose negatives from."""
    output: str = "hard_negatives.jsonl"
    """File to write; a folder <output>.parts beside it holds what is done so far."""
    num_negatives: int = 20
    """Terms a clip, at most."""
    margin: float = 0.05
    """Terms with a cosine above pos - |pos| * margin, pos being the clip's best positive, may be right: left out."""
    batch_size: int = 32
    """Clips a batch."""
    term_batch_size: int = 256
    """Terms a batch."""
    data_root: str = "."
    """Folder under which the files and relative audio paths are looked for."""
    audio_root: str | None = None
    """Folder of relative audio paths."""
    path_remap: tuple[str, ...] = ()
    """OLD=NEW pairs: audio paths that start with OLD start with NEW instead."""
    max_bad_fraction: float = 0.02
    """Fail when more than this share of the clips cannot be used."""
    check_cache_path: str | None = None
    """File that remembers the audio header checks; by default ~/.cache/earmark/audio_checks.jsonl."""
    model_name: str | None = None
    """Where the base model of an adapter lies now, if not where it lay in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute: auto takes CUDA when there is a GPU, one GPU a process."""
    restart: bool = False
    """Throw away the parts of another mining instead of refusing to go on from them."""

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        for name in ("num_negatives", "batch_size", "term_batch_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 1 or more")
        if not 0.0 <= self.margin < 1.0:
            raise ValueError(f"margin: got {self.margin}; allowed: from 0 up to, not including, 1")


def mine(settings: MineSettings) -> int:
    """Run to the end. Returns the exit code: 0 unless it raises."""
    settings.validate()
    world = processes.start(settings.device)
    configure_logging(world.rank, None)
    try:
        drops = DropLog(settings.max_bad_fraction)
        clips, glossary = _load(settings, world, drops)
        opened = open_model(find_model(settings.model), world.device, model_name=settings.model_name)
        stamp = _stamp(settings, opened, clips, glossary)
        output = Path(settings.output)
        parts = output.with_name(f"{output.name}.parts")
        on_rank_0(lambda: _claim(parts, stamp, settings.restart))
        started = time.perf_counter()

        # Terms: the glossary, and labels that it lacks, since a clip's own terms say what is too close.
        labels = dict.fromkeys(term for clip in clips for term in clip.terms)
        known = set(glossary.terms)
        terms = [*glossary.terms, *(term for term in labels if term not in known)]
        for path, start, stop in _own(parts, "terms", "safetensors", len(terms), TERMS_A_PART, world):
            part_NE = encode_terms(
                opened.built.model, opened.built.tokenizer, terms[start:stop], settings.term_batch_size, ALONE
            )
            _write_part(path, {"term_NE": part_NE})
        barrier()
        term_NE = _all_terms(parts, len(terms), opened.built.model.device)
        logger.info("%d terms embedded in %.1f s", len(terms), time.perf_counter() - started)

        started = time.perf_counter()
        reader = AudioReader(cache_mb=512)
        search = ClipSearch(opened.built.model, terms, term_NE, glossary, settings.num_negatives, settings.margin)
        for path, start, stop in _own(parts, "clips", "jsonl", len(clips), CLIPS_A_PART, world):
            lines = []
            for at in range(start, stop, settings.batch_size):
                batch = clips[at : min(at + settings.batch_size, stop)]
                for clip, found in search(batch, reader, drops):
                    lines.append(json.dumps({"audio_key": clip.clip_id, "hard_negs": found}, ensure_ascii=False) + "\n")
            write_file_atomically(path, "".join(lines).encode())
        barrier()
        logger.info("%d clips searched in %.1f s", len(clips), time.perf_counter() - started)
        num_lines = on_rank_0(lambda: _merge(output, parts, stamp, len(clips), settings.max_bad_fraction))
        logger.info("%s: hard negatives for %d of %d clips", output, num_lines, len(clips))
        return 0
    finally:
        processes.stop()


def _load(settings: MineSettings, world: World, drops: DropLog) -> tuple[list[Clip], Glossary]:
    data = DataSettings(
        train_samples_path=settings.samples_path,
        data_root=settings.data_root,
        audio_root=settings.audio_root,
        path_remap=settings.path_remap,
        max_bad_fraction=settings.max_bad_fraction,
    )
    data.validate()
    clips = load_clips(find_file(settings.samples_path, settings.data_root, "--samples_path"), data, drops)
    if not world.is_main:
        barrier()
    clips = check_clips(clips, drops, settings.check_cache_path)  # rank 0 reads the headers, the others its cache
    if world.is_main:
        barrier()
    drops.check()
    return clips, load_glossary(find_file(settings.glossary_path, settings.data_root, "--glossary_path"), drops)


def _stamp(settings: MineSettings, opened: OpenedModel, clips: list[Clip], glossary: Glossary) -> dict[str, Any]:
    """Whose negatives these are, and of what: everything that decides the lines."""
    return {
        "format": FORMAT,
        "model_sha256": opened.fingerprint,
        "model": settings.model,
        "model_step": opened.config["info"].get("step"),
        "glossary_sha256": terms_sha256(glossary.terms),
        "glossary_terms": len(glossary.terms),
        "clips_sha256": terms_sha256(f"{clip.clip_id} {clip.audio_path} {clip.terms} {clip.ignored}" for clip in clips),
        "num_clips": len(clips),
        "num_negatives": settings.num_negatives,
        "margin": settings.margin,
        "batch_sizes": [settings.batch_size, settings.term_batch_size],
        "parts": [TERMS_A_PART, CLIPS_A_PART],
    }


def _claim(parts: Path, stamp: dict[str, Any], restart: bool) -> None:
    """Make the folder of parts, or check that the one there is of the same mining. ValueError if not."""
    job = parts / "job.json"
    if parts.is_dir() and restart:
        shutil.rmtree(parts)
    if job.is_file():
        theirs = json.loads(job.read_text(encoding="utf-8"))
        different = [name for name, value in stamp.items() if name != "model" and theirs.get(name) != value]
        if different:
            raise ValueError(
                f"output: {parts} holds parts of another mining ({', '.join(different)} differ); "
                "give another --output, or --restart to throw them away"
            )
        remove_strays(parts)
        num_done = sum(1 for kind in ("terms", "clips") for _ in parts.glob(f"{kind}-*"))
        logger.info("going on from %d parts in %s", num_done, parts)
        return
    parts.mkdir(parents=True, exist_ok=True)
    write_file_atomically(job, json_bytes(stamp))


def _own(
    parts: Path, kind: str, suffix: str, num_items: int, part_size: int, world: World
) -> list[tuple[Path, int, int]]:
    """(file, start, stop) of this process's parts that are not done yet."""
    starts = list(enumerate(range(0, num_items, part_size)))[world.rank :: world.world_size]
    todo = [(parts / f"{kind}-{i:05d}.{suffix}", start, min(start + part_size, num_items)) for i, start in starts]
    return [one for one in todo if not one[0].is_file()]


def _write_part(path: Path, tensors: dict[str, Tensor]) -> None:
    write_file_atomically(path, lambda temporary: write_tensors(temporary, tensors))


def _all_terms(parts: Path, num_terms: int, device: torch.device) -> Tensor:
    files = sorted(parts.glob("terms-*.safetensors"))
    term_NE = torch.cat([read_tensors(path)["term_NE"].to(device) for path in files])
    if len(term_NE) != num_terms:
        raise ValueError(
            f"output: {parts} holds {len(term_NE)} of {num_terms} embedded terms; "
            "all processes must share the file system that it is on"
        )
    return term_NE


def _merge(output: Path, parts: Path, stamp: dict[str, Any], num_clips: int, max_bad_fraction: float) -> int:
    """Stamp and parts become one file; its number of clips. ValueError when too many are missing."""
    files = sorted(parts.glob("clips-*.jsonl"))
    num_lines = sum(path.read_bytes().count(b"\n") for path in files)
    if num_clips - num_lines > max_bad_fraction * num_clips:
        raise ValueError(
            f"max_bad_fraction: the audio of {num_clips - num_lines} of {num_clips} clips could not be read, which is "
            f"more than {max_bad_fraction:.1%}; repair it and run with --restart, or raise --max_bad_fraction"
        )

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            file.write((json.dumps(stamp, ensure_ascii=False) + "\n").encode())
            for path in files:
                file.write(path.read_bytes())

    write_file_atomically(output, write)
    shutil.rmtree(parts)
    return num_lines


def main(argv: Sequence[str] | None = None) -> int:
    """Settings from the command line; a user's error is one line on rank 0."""
    settings = tyro.cli(MineSettings, args=argv, use_underscores=True, prog="bin/mine.py")
    return run_program("bin/mine.py", lambda: mine(settings))


if __name__ == "__main__":
    sys.exit(main())
