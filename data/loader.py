"""Batches of an epoch in a fixed order, whatever the number of ranks, threads and restarts.

Worked example: 10 clips and no windows, batch_size 4, 2 ranks.

    permutation of (seed, epoch):  7 2 9 0 | 4 1 8 3 | 6 5
    step 0  global batch 7 2 9 0   rank 0: 7 0    rank 1: 2 9     dealt by duration, longest first, to and fro
    step 1  global batch 4 1 8 3   rank 0: 4 3    rank 1: 1 8
    step 2  2 clips are fewer than 2 a rank: dropped in this epoch, and the log says so (kept from 4 clips on)

The order depends on (seed, epoch) alone, so a run that resumes at (epoch, step), even with another number of ranks,
sees the global batches that it would have seen.

A clip whose audio fails on read is dropped, counted, and the rank's batch is smaller; a rank left with none takes the
next clip of the permutation that can be read, since every rank needs one for the collectives of the step.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from data import augment
from data.audio import AudioError
from data.batches import Batch, Tokenize, collate
from data.clips import Clip
from data.drops import DropLog
from data.glossary import Glossary, group_of
from data.mined import ClipNegatives
from data.reader import AudioReader
from data.settings import DataSettings
from data.windows import Windows

logger = logging.getLogger(__name__)

MIN_CLIPS_A_RANK = 2  # of a last, smaller batch: with one clip a rank has no negative of its own
MAX_SUBSTITUTES = 100
BATCHES_AHEAD = 2  # a thread


class Loader:
    """Training batches of one rank.

    clips       of the whole training set, the same list on each rank
    batch_size  clips of a step over all ranks (with gradient accumulation: of a micro-batch over all ranks)
    negatives   mined hard negatives of these clips; settings.hard_neg_mined of a clip's join each of its batches
    windows     random windows, mixed in as settings.window_fraction says
    drops       where audio that fails on read is counted; the caller checks the limit, agreed between ranks
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
    ) -> None:
        if batch_size < world_size:
            raise ValueError(f"batch_size is {batch_size}; allowed are {world_size} (one clip a process) and above")
        if not clips:
            raise ValueError("no training clip is left")
        if seed < 0:
            raise ValueError(f"seed is {seed}; allowed are 0 and above")
        assert 0 <= rank < world_size, (rank, world_size)
        self.clips = clips
        self.batch_size = batch_size
        self.settings = settings
        self.seed, self.rank, self.world_size = seed, rank, world_size
        self.glossary = glossary
        self.windows = windows
        self.negatives = negatives
        self.num_windows = round(settings.window_fraction * len(clips)) if windows else 0
        self.drops = drops or DropLog(settings.max_bad_fraction)
        self.reader = reader or AudioReader(settings.audio_cache_mb)
        self._tokenize = tokenize
        self._tokenize_lock = threading.Lock()  # fast tokenizers refuse to be called from two threads at once
        self._maskable = self._terms_groups() if settings.mask_spoken_terms else frozenset()
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
    def num_items(self) -> int:
        """Clips and windows of an epoch."""
        return len(self.clips) + self.num_windows

    @property
    def steps_per_epoch(self) -> int:
        """The same for every epoch and rank."""
        return self.num_items // self.batch_size + int(self._keeps_last)

    @property
    def fingerprint(self) -> str:
        """Changes when the order of batches would: to be kept in a checkpoint and compared on resume."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(repr((self.seed, self.batch_size, self.num_windows)).encode())
        for clip in self.clips:
            digest.update(f"{clip.clip_id}\n".encode())
        return digest.hexdigest()

    def epoch(self, epoch: int, start_step: int = 0) -> Iterator[Batch]:
        """Batches of steps start_step, start_step + 1, ... of the epoch, built ahead by num_workers threads."""
        order = self.order(epoch)
        steps = range(start_step, self.steps_per_epoch)
        if self.settings.num_workers == 0:
            for step in steps:
                yield self._build(epoch, step, order)
            return
        with ThreadPoolExecutor(self.settings.num_workers, thread_name_prefix="loader") as pool:
            ahead: deque[Future[Batch]] = deque()
            try:
                for step in steps:
                    ahead.append(pool.submit(self._build, epoch, step, order))
                    if len(ahead) > BATCHES_AHEAD * self.settings.num_workers:
                        yield ahead.popleft().result()
                while ahead:
                    yield ahead.popleft().result()
            finally:  # the consumer may stop early, or a batch may fail
                for future in ahead:
                    future.cancel()

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's permutation: int64 [num_items]; items from len(clips) on are windows."""
        return np.random.default_rng((self.seed, epoch)).permutation(self.num_items)

    def item(self, epoch: int, item: int) -> Clip:
        """The clip of an item of the order."""
        if item < len(self.clips):
            return self.clips[item]
        assert self.windows is not None
        return self.windows.draw(self.seed, epoch, item - len(self.clips))

    def rank_items(self, epoch: int, step: int, order: np.ndarray) -> list[int]:
        """The items of this rank in a step, in the permutation's order."""
        items = [int(item) for item in order[step * self.batch_size : (step + 1) * self.batch_size]]
        if self.world_size == 1:
            return items
        durations = [self.item(epoch, item).duration_s or 0.0 for item in items]
        longest_first = sorted(range(len(items)), key=lambda position: (-durations[position], position))
        mine = []
        for place, position in enumerate(longest_first):
            turn, within = divmod(place, self.world_size)
            owner = within if turn % 2 == 0 else self.world_size - 1 - within
            if owner == self.rank:
                mine.append(position)
        return [items[position] for position in sorted(mine)]

    def _terms_groups(self) -> frozenset[int]:
        """Variant groups of all terms that a batch, or the glossary's bank of negatives, may hold."""
        terms = {term for clip in self.clips for term in clip.terms}
        terms |= self.windows.possible_terms() if self.windows else set()
        terms |= set(self.glossary.terms) if self.glossary else set()
        terms |= set(self.negatives.terms) if self.negatives else set()
        return frozenset(group_of(term, self.glossary) for term in terms)

    def _build(self, epoch: int, step: int, order: np.ndarray) -> Batch:
        items, clips, pcms = [], [], []
        for item in self.rank_items(epoch, step, order):
            clip = self.item(epoch, item)
            pcm_S = self._read(clip, epoch, item)
            if pcm_S is not None:
                items.append(item)
                clips.append(clip)
                pcms.append(pcm_S)
        if not clips:
            item, clip, pcm_S = self._substitute(epoch, step, order)
            items, clips, pcms = [item], [clip], [pcm_S]
        return collate(
            clips,
            pcms,
            self._tokenize_alone,
            self.glossary,
            [item if item < len(self.clips) else -1 for item in items],
            self._maskable,
            [self._mined(item, epoch) for item in items] if self.negatives else None,
        )

    def _mined(self, item: int, epoch: int) -> list[str]:
        """Mined negatives of an item; random windows have none."""
        if self.negatives is None or item >= len(self.clips):
            return []
        return self.negatives.draw(item, self.settings.hard_neg_mined, self.seed, epoch)

    def _read(self, clip: Clip, epoch: int, item: int) -> np.ndarray | None:
        try:
            pcm_S = self.reader.read(clip.audio_path, clip.start_s, clip.end_s)
        except AudioError as error:
            self.drops.add(error.reason, clip.source, f"{clip.audio_path}: {error.detail}")
            return None
        if augment.is_on(self.settings):
            pcm_S = augment.augment(pcm_S, self.settings, augment.generator(self.seed, epoch, item))
        return pcm_S

    def _substitute(self, epoch: int, step: int, order: np.ndarray) -> tuple[int, Clip, np.ndarray]:
        begin = (step + 1) * self.batch_size + self.rank
        for offset in range(MAX_SUBSTITUTES):
            item = int(order[(begin + offset * self.world_size) % len(order)])
            clip = self.item(epoch, item)
            pcm_S = self._read(clip, epoch, item)
            if pcm_S is not None:
                logger.warning("epoch %d step %d: no clip could be read, %s stands in", epoch, step, clip.clip_id)
                return item, clip, pcm_S
        raise ValueError(
            f"epoch {epoch} step {step}: no clip of the batch and none of {MAX_SUBSTITUTES} others could be read; "
            f"{self.drops.summary()}"
        )

    def _tokenize_alone(self, strings: list[str]) -> list[list[int]]:
        with self._tokenize_lock:
            return self._tokenize(strings)


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
