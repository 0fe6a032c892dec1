"""Batches of an epoch in a fixed order, whatever the number of ranks, workers and restarts.

Worked example: 10 clips and no windows, batch_size 4, 2 ranks.

    permutation of (seed, epoch):  7 2 9 0 | 4 1 8 3 | 6 5
    step 0  global batch 7 2 9 0   rank 0: 7 0    rank 1: 2 9     dealt so that both get as many tokens
    step 1  global batch 4 1 8 3   rank 0: 4 3    rank 1: 1 8
    step 2  2 clips are fewer than 2 a rank: dropped in this epoch, and the log says so (kept from 4 clips on)

The order depends on (seed, epoch) alone, so a run that resumes at (epoch, step), even with another number of ranks,
sees the global batches that it would have seen.

A clip whose audio fails on read is dropped, counted, and the rank's batch is smaller; a rank left with none takes the
next clip of the permutation that can be read, since every rank needs one for the collectives of the step.

Workers are processes of their own (data/pool.py). They build whole batches into shared memory, step s in worker
s mod num_workers, and the trainer reads them there: nothing is decoded, tokenised or copied in the training process.
"""

from __future__ import annotations

import hashlib
import logging
import os
import weakref
from collections.abc import Iterator, Sequence
from typing import Protocol, runtime_checkable

from data.audio import AudioError
from data.batches import Batch, Tokenize, collate
from data.building import Builder
from data.clip import Clip
from data.drops import DropLog
from data.glossary import Glossary
from data.groups import GroupMap, GroupSet
from data.mined import ClipNegatives
from data.pool import WorkerPool
from data.reader import AudioReader
from data.recipe import Recipe, maskable_groups, recipe_file, recipe_spec, shared_table
from data.settings import DataSettings
from data.slots import Pin, private_copy, read_batch
from data.table import ClipTable
from data.windows import Windows

logger = logging.getLogger(__name__)

MIN_CLIPS_A_RANK = 2  # of a last, smaller batch: with one clip a rank has no negative of its own


@runtime_checkable
class PortableTokenizer(Protocol):
    """A tokenizer that can be rebuilt in another process."""

    def __call__(self, texts: list[str]) -> list[list[int]]: ...

    def recipe(self) -> tuple[str, str]:
        """("module:function", text): the function, called with the text, makes an equal tokenizer."""
        ...


class Loader:
    """Training batches of one rank.

    clips       of the whole training set, the same on each rank: a list, or a table as packed folders have
    batch_size  clips of a step over all ranks (with gradient accumulation: of a micro-batch over all ranks)
    tokenize    with workers it must be a PortableTokenizer
    negatives   mined hard negatives of these clips; settings.hard_neg_mined of a clip's join each of its batches
    windows     random windows, mixed in as settings.window_fraction says
    drops       where audio that fails on read is counted; the caller checks the limit, agreed between ranks
    pin         locks memory for a device's copies, see WorkerPool

    Arrays of a batch lie in shared memory that is used again once nothing refers to them.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        batch_size: int,
        tokenize: Tokenize,
        settings: DataSettings,
        *,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        glossary: Glossary | None = None,
        windows: Windows | None = None,
        negatives: ClipNegatives | None = None,
        drops: DropLog | None = None,
        reader: AudioReader | None = None,
        pin: Pin | None = None,
    ) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size is {batch_size}; allowed are {world_size} (one clip a process) and above")
        if not len(clips):
            raise ValueError("no training clip is left")
        if seed < 0:
            raise ValueError(f"seed is {seed}; allowed are 0 and above")
        assert 0 <= rank < world_size, (rank, world_size)
        if settings.num_workers and not isinstance(tokenize, PortableTokenizer):
            raise ValueError(
                f"num_workers is {settings.num_workers}, but {type(tokenize).__name__} has no recipe() by which a "
                "worker could rebuild it; allowed with this tokenizer is 0"
            )
        self.settings, self.batch_size = settings, batch_size
        self.drops = drops or DropLog(settings.max_bad_fraction)
        self._table_file: int | None = None
        if isinstance(clips, ClipTable):
            table = clips
        else:
            self._table_file, table = shared_table(clips)
            weakref.finalize(self, os.close, self._table_file)
        groups = GroupMap(glossary.replaced if glossary else None)
        maskable = GroupSet()
        if settings.mask_spoken_terms:
            maskable = maskable_groups(table, groups, windows, glossary, negatives)
        num_windows = round(settings.window_fraction * len(table)) if windows else 0
        self.recipe = Recipe(
            table, settings, batch_size, seed, rank, world_size, num_windows, windows, negatives, groups, maskable
        )
        self._tokenize = tokenize
        self._builder = Builder(self.recipe, tokenize, reader or AudioReader(settings.audio_cache_mb), self.drops)
        self._pool: WorkerPool | None = None
        self._pin = pin
        self._next_worker: int | None = None  # whose answer comes next; None when all were handed out
        self._iteration = 0  # of `epoch`: only the newest may use the workers
        last = self.num_items % batch_size
        self._keeps_last = last >= MIN_CLIPS_A_RANK * world_size
        if last and not self._keeps_last:
            logger.info(
                "the last %d of %d clips of each epoch's order fill no batch and are left out", last, self.num_items
            )
        if self.steps_per_epoch == 0:
            raise ValueError(
                f"{self.num_items} clips make no batch: batch_size is {batch_size}, and a smaller batch needs "
                f"{MIN_CLIPS_A_RANK} clips for each of {world_size} processes"
            )

    @property
    def num_windows(self) -> int:
        """Random windows of an epoch."""
        return self.recipe.num_windows

    @property
    def num_items(self) -> int:
        """Clips and windows of an epoch."""
        return self.recipe.num_items

    @property
    def steps_per_epoch(self) -> int:
        """The same for every epoch and rank."""
        return self.num_items // self.batch_size + int(self._keeps_last)

    @property
    def fingerprint(self) -> str:
        """Changes when the order of batches would: to be kept in a checkpoint and compared on resume."""
        recipe = self.recipe
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((recipe.seed, self.batch_size, self.num_windows, self.settings.batch_terms)).encode())
        digest.update(recipe.table.columns["clip_id_indptr"].data)
        digest.update(recipe.table.columns["clip_id_bytes"].data)
        return digest.hexdigest()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of steps start_step, start_step + 1, ... of the epoch, built ahead by num_workers processes.

        Raises ValueError when nothing can be read, WorkerError for a worker that died. Only the newest of several
        iterators may go on.
        """
        if self.settings.num_workers == 0:
            for step in range(start_step, self.steps_per_epoch):
                yield self._builder.build(epoch, step)
            return
        self._iteration += 1
        mine, num_workers, stop = self._iteration, self.settings.num_workers, self.steps_per_epoch
        pool = self._workers()
        tickets: dict[int, int] = {}
        asked = start_step
        try:
            for step in range(start_step, stop):
                if asked == step:  # what an earlier iteration left behind may take up the worker's slots
                    pool.make_room(step % num_workers)
                while asked < stop and pool.has_room(asked % num_workers):
                    tickets[asked] = pool.submit(asked % num_workers, {"epoch": epoch, "step": asked})
                    asked += 1
                answer, memory, is_scarce = pool.result(step % num_workers, tickets.pop(step))
                for line in answer["drops"]:
                    self.drops.add(line["reason"], line["source"], line["detail"])
                batch = read_batch(memory, answer["layout"])
                del memory
                self._next_worker = (step + 1) % num_workers if step + 1 < stop else None
                if is_scarce:
                    batch = private_copy(batch)
                yield batch
                del batch
                if mine != self._iteration:
                    raise RuntimeError("another epoch of this loader was begun: this one cannot go on")
        except (ValueError, RuntimeError):
            self.close()
            raise

    def has_next(self) -> bool:
        """Whether the newest epoch's next batch can be had without waiting."""
        return self._pool is not None and self._next_worker is not None and self._pool.is_answered(self._next_worker)

    def close(self) -> None:
        """End the workers; the next epoch would start new ones. Without it they end with the loader, or the process."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    def _workers(self) -> WorkerPool:
        if self._pool is None:
            assert isinstance(self._tokenize, PortableTokenizer)
            files = {"recipe": recipe_file(self.recipe)}
            if self._table_file is not None:
                files["table"] = self._table_file
            spec = recipe_spec(self.recipe, self._tokenize.recipe())
            try:
                self._pool = WorkerPool(
                    self.settings.num_workers, "data.building:batch_job", spec, files, pin=self._pin
                )
            finally:
                os.close(files["recipe"])
        return self._pool


def iterate_in_order(
    clips: Sequence[Clip],
    batch_size: int,
    tokenize: Tokenize,
    *,
    glossary: Glossary | None = None,
    drops: DropLog | None = None,
    reader: AudioReader | None = None,
) -> Iterator[Batch]:
    """Every clip once, in order, for evaluation and encoding: batches of up to `batch_size` readable clips.

    `clip_index_B` counts in `clips`. Audio that fails is added to `drops`; the caller shards the clips over ranks.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size is {batch_size}; allowed are 1 and above")
    drops = drops or DropLog()
    reader = reader or AudioReader(cache_mb=0)
    for start in range(0, len(clips), batch_size):
        indices, pcms = [], []
        for index in range(start, min(start + batch_size, len(clips))):
            clip = clips[index]
            try:
                pcms.append(reader.read(clip.audio_path, clip.start_s, clip.end_s))
            except AudioError as error:
                drops.add(error.reason, clip.source, f"{clip.audio_path}: {error.detail}")
            else:
                indices.append(index)
        if indices:
            yield collate([clips[index] for index in indices], pcms, tokenize, glossary, indices)
