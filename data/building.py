"""Builds the batch of a step out of a table of clips: which items, their labels, their samples, all packed.

The same code runs in the trainer (num_workers 0) and in the loader's workers, and a batch depends on (seed, epoch,
step, rank, world_size) alone, so it does not matter who builds it.
"""

from __future__ import annotations

import functools
import logging

import numpy as np

from data import augment
from data.audio import AudioError
from data.batches import Allocate, Batch, Labels, Term, Tokenize, labels_of, pack, term_of
from data.clip import Clip
from data.drops import DropLog
from data.order import deal, epoch_order, loads
from data.reader import AudioReader
from data.recipe import Recipe, restore_recipe
from data.slots import Slot
from data.terms import normalise_term, run_groups
from data.worker import Job, Json, restore

logger = logging.getLogger(__name__)

MAX_SUBSTITUTES = 100
TERMS_KEPT = 1 << 14


class Builder:
    """Builds batches with a tokenizer and a reader of its own. Not safe between threads."""

    def __init__(self, recipe: Recipe, tokenize: Tokenize, reader: AudioReader, drops: DropLog) -> None:
        self.recipe, self.reader, self.drops = recipe, reader, drops
        self._tokenize = tokenize
        self._order: tuple[int, np.ndarray] | None = None
        self._term = functools.lru_cache(maxsize=TERMS_KEPT)(self._read_term)
        self._term_of = functools.lru_cache(maxsize=TERMS_KEPT)(lambda text: term_of(text, recipe.groups))
        self._text_indptr = recipe.table.columns["text_indptr"]

    def order(self, epoch: int) -> np.ndarray:
        """The epoch's order: int64 [num_items]; items from len(table) on are windows."""
        if self._order is None or self._order[0] != epoch:
            recipe = self.recipe
            kind = recipe.settings.batch_terms
            self._order = (epoch, epoch_order(kind, recipe.table, recipe.num_items, recipe.seed, epoch))
        return self._order[1]

    def window(self, epoch: int, item: int) -> Clip:
        """The random window that an item of the order stands for."""
        recipe = self.recipe
        assert recipe.windows is not None
        assert item >= len(recipe.table)
        return recipe.windows.draw(recipe.seed, epoch, item - len(recipe.table))

    def rank_items(self, epoch: int, step: int) -> list[tuple[int, Clip | None]]:
        """The items of this rank in a step, in the order's order; a window's clip comes with it."""
        recipe = self.recipe
        items = self.order(epoch)[step * recipe.batch_size : (step + 1) * recipe.batch_size]
        num_clips = len(recipe.table)
        windows = {item: self.window(epoch, item) for item in items.tolist() if item >= num_clips}
        if recipe.world_size > 1:
            rows = np.where(items < num_clips, items, 0)
            durations_s_G = recipe.table.durations_s_C[rows]
            bytes_G = self._text_indptr[rows + 1] - self._text_indptr[rows]
            for place in np.flatnonzero(items >= num_clips).tolist():
                clip = windows[int(items[place])]
                durations_s_G[place], bytes_G[place] = clip.duration_s, len(clip.text.encode())
            items = items[deal(loads(durations_s_G, bytes_G), recipe.world_size) == recipe.rank]
        return [(item, windows.get(item)) for item in items.tolist()]

    def build(self, epoch: int, step: int, allocate: Allocate | None = None) -> Batch:
        """The batch of a step. ValueError when neither its clips nor MAX_SUBSTITUTES others can be read."""
        labels, pcms = [], []
        for item, window in self.rank_items(epoch, step):
            pcm_S = self._read(epoch, item, window)
            if pcm_S is not None:
                labels.append(self._labels(epoch, item, window))
                pcms.append(pcm_S)
        if not labels:
            item, window, pcm_S = self._substitute(epoch, step)
            labels, pcms = [self._labels(epoch, item, window)], [pcm_S]
        recipe = self.recipe
        if allocate is None:
            return pack(labels, pcms, self._tokenize, recipe.groups, recipe.maskable)
        return pack(labels, pcms, self._tokenize, recipe.groups, recipe.maskable, allocate)

    def _labels(self, epoch: int, item: int, window: Clip | None) -> Labels:
        recipe, table = self.recipe, self.recipe.table
        with_runs = len(recipe.maskable) > 0
        if window is not None:
            return labels_of(window, -1, recipe.groups, with_runs)
        text = table.text(item)
        runs: list[int] | np.ndarray = []
        if with_runs and table.spoken_indptr is not None and table.spoken_groups is not None:
            runs = table.spoken_groups[table.spoken_indptr[item] : table.spoken_indptr[item + 1]]
        elif with_runs:
            runs = run_groups(normalise_term(text))
        return Labels(
            table.clip_id(item),
            item,
            text,
            int(table.text_keys_C[item]),
            [self._term(place) for place in table.positives(item)],
            [self._term(place).group for place in table.ignored(item)],
            runs,
            self._mined(epoch, item),
        )

    def _mined(self, epoch: int, item: int) -> list[Term]:
        """Mined negatives of a clip, drawn anew in each epoch."""
        recipe = self.recipe
        if recipe.negatives is None:
            return []
        drawn = recipe.negatives.draw(item, recipe.settings.hard_neg_mined, recipe.seed, epoch)
        return [self._term_of(text) for text in drawn]

    def _read_term(self, place: int) -> Term:
        table = self.recipe.table
        key, group = int(table.term_keys_V[place]), int(table.term_groups_V[place])
        return Term(table.terms[place], key, self.recipe.groups[group])

    def _read(self, epoch: int, item: int, window: Clip | None) -> np.ndarray | None:
        recipe = self.recipe
        try:
            if window is not None:
                pcm_S = self.reader.read(window.audio_path, window.start_s, window.end_s)
            elif recipe.table.is_packed:
                pcm_S = self.reader.read_shard(*recipe.table.shard_of(item))
            else:
                pcm_S = self.reader.read(*recipe.table.audio(item))
        except AudioError as error:
            path = recipe.table.audio(item)[0] if window is None else window.audio_path
            source = recipe.table.source(item) if window is None else window.source
            self.drops.add(error.reason, source, f"{path}: {error.detail}")
            return None
        if augment.is_on(recipe.settings):
            pcm_S = augment.augment(pcm_S, recipe.settings, augment.generator(recipe.seed, epoch, item))
        return pcm_S

    def _substitute(self, epoch: int, step: int) -> tuple[int, Clip | None, np.ndarray]:
        recipe, order = self.recipe, self.order(epoch)
        begin = (step + 1) * recipe.batch_size + recipe.rank
        for offset in range(MAX_SUBSTITUTES):
            item = int(order[(begin + offset * recipe.world_size) % len(order)])
            window = self.window(epoch, item) if item >= len(recipe.table) else None
            pcm_S = self._read(epoch, item, window)
            if pcm_S is not None:
                name = recipe.table.clip_id(item) if window is None else window.clip_id
                logger.warning("epoch %d step %d: no clip could be read, %s stands in", epoch, step, name)
                return item, window, pcm_S
        raise ValueError(
            f"epoch {epoch} step {step}: no clip of the batch and none of {MAX_SUBSTITUTES} others could be read; "
            f"{self.drops.summary()}"
        )


def batch_job(spec: Json, files: dict[str, int]) -> Job:
    """What a worker of the loader does: {"epoch", "step"} -> the batch in the slot, and what had to be dropped."""
    recipe = restore_recipe(spec, files)
    settings = recipe.settings
    drops = DropLog()
    entry, text = spec["tokenizer"]
    # The memory for decoded files is for the process that trains; its workers share it out.
    reader = AudioReader(settings.audio_cache_mb // settings.num_workers)
    builder = Builder(recipe, restore(entry)(text), reader, drops)
    num_told = 0

    def build(command: Json, slot: Slot) -> Json:
        nonlocal num_told
        batch = builder.build(command["epoch"], command["step"], slot.allocate)
        layout = slot.put(batch)
        lines = drops.lines()[num_told:]
        num_told += len(lines)
        return {"layout": layout, "drops": lines}

    return build
