"""Packs clips into shards: decoded by worker processes, written by one, so that the order never depends on the workers.

    listing.jsonl   the clips, in order          blocks of 64 clips go to the workers in turn, and come back in turn
    shard-00000.pcm, block-00000.safetensors     a finished shard, and what became of the clips of its blocks
    index.safetensors, drops.jsonl, manifest     made of the shards' rows, at the end

A shard gets its name when it is whole and on disk, after its rows. A run that is killed at whatever byte goes on behind
the last such shard; all before it is as it would have been. Rows and listing lie in `.packing` until the manifest is
written.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from data.audio import MAX_CLIP_S, SAMPLE_RATE, AudioError, check_span, probe
from data.clip import Clip
from data.drops import DropLog
from data.listing import ListedBlock, blocks_of, clips_at, read_listing, write_listing
from data.pool import WorkerPool
from data.reader import SAMPLE_BYTES, AudioReader
from data.shards import (
    DROPS,
    INDEX,
    Manifest,
    audio_key,
    file_entry,
    is_packed,
    read_manifest,
    replaced_file,
    shard_name,
    write_manifest,
)
from data.slots import Slot
from data.stored import OpenShard, Stored
from data.table_writer import TableWriter, rows_of
from data.worker import Job, Json

logger = logging.getLogger(__name__)

WORK, LISTING, LISTED = ".packing", "listing.jsonl", "listing.sha256"
BLOCK = 64  # clips a command; part of the format, as shards end with blocks
PROBES = 200  # headers read to estimate the space that is needed
INDEX_BYTES = 1200  # a clip, about
BYTES_PER_MB = 1_000_000

Told = Callable[[int, int], None]  # clips done, clips in all


def pack_clips(
    clips: Iterable[Clip],
    folder: str | Path,
    drops: DropLog,
    *,
    num_workers: int = 1,
    shard_mb: int = 256,
    cache_mb: int = 512,
    told: Told = lambda done, total: None,
) -> Manifest:
    """Pack into `folder`, or go on with what an earlier run has left there, or find it done.

    Audio that fails is added to `drops`, whose limit is checked before the manifest is written. Raises ValueError when
    the folder holds another packing, when the disk is too small, or when there is nothing to pack.
    """
    folder = Path(folder)
    work = folder / WORK
    work.mkdir(parents=True, exist_ok=True)
    try:
        return _pack(clips, folder, work, drops, num_workers, shard_mb, cache_mb, told)
    except OSError as error:
        raise ValueError(
            f"{folder}: packing stopped, {error.strerror or error} ({error.filename or 'while writing'}). Make room or "
            "repair the disk and run the same command: it goes on behind the last finished shard"
        ) from error


def _pack(
    clips: Iterable[Clip],
    folder: Path,
    work: Path,
    drops: DropLog,
    num_workers: int,
    shard_mb: int,
    cache_mb: int,
    told: Told,
) -> Manifest:
    num_clips, digest = write_listing(clips, work / LISTING, drops)
    listing = hashlib.sha256(f"{digest} {shard_mb} {BLOCK}".encode()).hexdigest()
    if not num_clips:
        raise ValueError(f"no clip to pack; {drops.summary()}")
    if is_packed(folder):
        manifest = read_manifest(folder)
        _same_or_refuse(folder, manifest.listing, listing)
        shutil.rmtree(work)
        told(num_clips, num_clips)
        return manifest
    if (work / LISTED).is_file():
        _same_or_refuse(folder, (work / LISTED).read_text().strip(), listing)
    else:
        with replaced_file(work / LISTED) as file:
            file.write(listing.encode())
    stored = Stored(folder, work)
    _check_space(folder, work / LISTING, num_clips, stored.num_samples)
    told(stored.num_clips, num_clips)
    if stored.num_clips < num_clips:
        _store(stored, work / LISTING, num_clips, num_workers, shard_mb * BYTES_PER_MB, cache_mb, told)
    return _finish(folder, work, stored, drops, listing)


def _same_or_refuse(folder: Path, found: str, wanted: str) -> None:
    if found != wanted:
        raise ValueError(
            f"{folder} holds a packing of other clips, or with another shard_mb; give an empty folder, or remove it"
        )


def _check_space(folder: Path, listing: Path, num_clips: int, stored_samples: int) -> None:
    """Compare what a sample of the headers says will be needed with what is free, before anything is decoded."""
    durations_s = []
    for clip in read_listing(listing, every=max(1, num_clips // PROBES)):
        try:
            durations_s.append(min(check_span(probe(clip.audio_path), clip.start_s, clip.end_s), MAX_CLIP_S))
        except AudioError:
            continue  # takes no space; counted when its turn comes
    mean_s = float(np.mean(durations_s)) if durations_s else 0.0
    needed = num_clips * (mean_s * SAMPLE_RATE * SAMPLE_BYTES + INDEX_BYTES) - stored_samples * SAMPLE_BYTES
    free = shutil.disk_usage(folder).free
    logger.info("%d clips of about %.2f s: some %.2f GB, %.2f GB are free", num_clips, mean_s, needed / 1e9, free / 1e9)
    if needed > free:
        raise ValueError(
            f"{folder}: about {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free; make room, or pack to "
            "another disk"
        )


# ----------------------------------------------------------------------------------------------------- decode and store


def _store(
    stored: Stored, listing: Path, num_clips: int, num_workers: int, shard_bytes: int, cache_mb: int, told: Told
) -> None:
    spec = {"cache_mb": cache_mb // num_workers, "listing": str(listing.absolute())}
    pool = WorkerPool(num_workers, "data.packing:decode_job", spec, {})
    try:
        shard = OpenShard(stored)
        for block, answer, memory in _decoded(pool, num_workers, blocks_of(listing, BLOCK, stored.num_clips)):
            shard.add(answer, memory)
            del memory
            told(stored.num_clips + shard.num_clips, num_clips)
            if shard.num_bytes >= shard_bytes or stored.num_clips + shard.num_clips == num_clips:
                shard.finish()
                if stored.num_clips < num_clips:
                    shard = OpenShard(stored)
            logger.debug("packed a block of %d", block)
    finally:
        pool.close()


def _decoded(
    pool: WorkerPool, num_workers: int, blocks: Iterator[ListedBlock]
) -> Iterator[tuple[int, dict[str, Any], memoryview]]:
    """Blocks in the order of the clips, decoded ahead in all workers."""
    asked: deque[tuple[int, int, int]] = deque()  # (worker, ticket, clips)
    turns = itertools.cycle(range(num_workers))
    turn = next(turns)
    while True:
        while pool.has_room(turn) and (block := next(blocks, None)) is not None:
            asked.append((turn, pool.submit(turn, block._asdict()), block.num_clips))
            turn = next(turns)
        if not asked:
            return
        worker, ticket, count = asked.popleft()
        answer, memory, _ = pool.result(worker, ticket)
        yield count, answer, memory


def decode_job(spec: Json, files: dict[str, int]) -> Job:
    """What a worker of the packer does: a block of the listing -> samples in the slot, then the clips' rows.

    Rows of the table are made here as well, since the one process that writes is what the others wait for.
    """
    # A file that is a clip as a whole is read once; only what several clips are cut from is worth remembering.
    whole, parts = AudioReader(cache_mb=0), AudioReader(spec["cache_mb"])
    listing = open(spec["listing"], "rb", buffering=0)  # noqa: SIM115 - as long as the worker lives

    def decode(command: Json, slot: Slot) -> Json:
        block = ListedBlock(command["offset"], command["num_bytes"], command["num_clips"])
        pcms, kept, complaints = [], [], []
        for place, clip in enumerate(clips_at(listing.fileno(), block)):
            reader = whole if clip.start_s is None and clip.end_s is None else parts
            try:
                pcms.append(reader.read(clip.audio_path, clip.start_s, clip.end_s))
                kept.append(clip)
            except AudioError as error:
                complaints.append([place, error.reason, clip.source, f"{clip.audio_path}: {error.detail}"])
        num_samples = np.array([len(pcm_S) for pcm_S in pcms], dtype=np.int64)
        np.concatenate([*pcms, _NONE], out=slot.allocate(int(num_samples.sum())))
        rows = rows_of(kept, packed=True) | {
            "duration_s": num_samples / SAMPLE_RATE,
            "num_samples": num_samples,
            "audio_key": np.array([audio_key(pcm_S) for pcm_S in pcms], dtype=np.int64),
        }
        placed = {name: [*slot.store(column), column.dtype.name] for name, column in rows.items()}
        return {"columns": placed, "complaints": complaints, "num_listed": block.num_clips}

    return decode


_NONE = np.zeros(0, dtype=np.int16)


# --------------------------------------------------------------------------------------------------- index and manifest


def _finish(folder: Path, work: Path, stored: Stored, drops: DropLog, listing: str) -> Manifest:
    writer = TableWriter(work, packed=True)
    for rows, complaints in stored.rows():
        for reason, source, detail in complaints:
            drops.add(reason, source, detail)
        writer.extend(rows)
    drops.write(folder / DROPS)
    drops.check()
    if not writer.num_clips:
        raise ValueError(f"no clip could be packed; {drops.summary()}")
    with replaced_file(folder / INDEX) as file:
        writer.write(file)
    files = {shard_name(number): entry for number, entry in enumerate(stored.files)}
    files |= {name: file_entry(folder / name) for name in (INDEX, DROPS)}
    manifest = Manifest(writer.num_clips, stored.num_samples, listing, files)
    write_manifest(folder, manifest)
    shutil.rmtree(work)
    return manifest
