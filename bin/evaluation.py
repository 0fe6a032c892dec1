"""Measure a model on one sample file, spread over the ranks, with the result of one process.

Shapes: C clips, N terms of the glossary, R rows of one process, E embedding.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from bin.stopping import is_requested, stop_together
from data.audio import AudioError
from data.batches import spoken_groups
from data.clips import Clip
from data.drops import DropLog
from data.reader import AudioReader
from data.terms import normalise_term, variant_group
from distributed.collectives import gather_ints, gather_rows
from distributed.processes import World
from model.dual import DualEncoder
from model.packing import AudioPack, TextPack
from model.tokenizer import Tokenizer
from retrieval.distractors import gold_first, part_sizes
from retrieval.evaluate import encode_in_fixed_batches, measure
from retrieval.judgements import Judgements
from retrieval.measured import Measured
from retrieval.metrics import EvalResult
from retrieval.readout import EncodedClips, encode_clips, no_clips

logger = logging.getLogger(__name__)

NUM_TOP = 10  # terms kept of each clip: what a user is shown


def encode_terms(
    model: DualEncoder, tokenizer: Tokenizer, terms: Sequence[str], batch_size: int, world: World
) -> Tensor:
    """term_NE of all terms on every rank, fp32, the same bits at any number of ranks. A collective.

    Raises Preempted on all ranks when one was asked to stop.
    """

    def encode(start: int, stop: int) -> Tensor:
        if is_requested():  # nobody will see the result
            return torch.zeros(stop - start, model.audio_head.out_features, device=model.device)
        ids = tokenizer(list(terms[start:stop]))
        flat_P = torch.tensor([token for one in ids for token in one], dtype=torch.int64)
        return model.encode_text(TextPack(flat_P, [len(one) for one in ids]))

    term_NE = encode_in_fixed_batches(
        encode,
        len(terms),
        batch_size,
        world.rank,
        world.world_size,
        gather_rows,
        model.audio_head.out_features,
        model.device,
    )
    stop_together()
    return term_NE


@dataclass
class Evaluator:
    """A test or dev set against a glossary: call it with a model for the metrics, or `measure` for all facts."""

    clips: Sequence[Clip]
    terms: list[str]  # the glossary's normal forms
    seen_terms: frozenset[str]  # those that are a positive of any training clip
    reader: AudioReader
    drops: DropLog
    batch_size: int
    world: World
    term_batch_size: int | None = None  # by default batch_size
    distractors: tuple[str, ...] = ()  # in draw order
    distractor_sizes: tuple[int, ...] = ()  # ascending; the glossary is also measured with so many distractors

    def __post_init__(self) -> None:
        gold = {term for clip in self.clips for term in clip.terms}
        self.ranked_terms = [*gold_first(self.terms, gold), *self.distractors]
        self.sizes = part_sizes(len(gold), len(self.terms)) + [len(self.terms) + n for n in self.distractor_sizes]
        self.judgements = Judgements.from_terms(
            self.ranked_terms,
            [clip.terms for clip in self.clips],
            [[*clip.ignored, *spoken] for clip, spoken in zip(self.clips, self._spoken_distractors(), strict=True)],
            [clip.is_no_term for clip in self.clips],
            self.seen_terms,
        )

    def __call__(self, model: DualEncoder, tokenizer: Tokenizer) -> EvalResult:
        """A collective: all ranks call it, and all get the same result, or Preempted when one was asked to stop."""
        return self._measure(model, tokenizer, [len(self.terms)], 1).result()

    def measure(self, model: DualEncoder, tokenizer: Tokenizer, num_top: int = NUM_TOP) -> Measured:
        """All facts at all sizes, with the best `num_top` terms of each clip. A collective, as above."""
        return self._measure(model, tokenizer, self.sizes, num_top)

    def _measure(self, model: DualEncoder, tokenizer: Tokenizer, sizes: list[int], num_top: int) -> Measured:
        was_training = model.training
        model.eval()
        ranks = measure(
            lambda start, stop: self._encode_clips(model, range(start, stop)),
            lambda start, stop: encode_terms(
                model, tokenizer, self.ranked_terms[start:stop], self.term_batch_size or self.batch_size, self.world
            ),
            self.judgements,
            self.batch_size,
            sizes,
            num_top,
            self.world.rank,
            self.world.world_size,
            lambda values_S: gather_ints(values_S)[0],
            model.device,
        )
        stop_together()
        model.train(was_training)
        found = Measured(self.clips, self.ranked_terms, len(self.terms), dict(zip(sizes, ranks, strict=True)))
        if found.ranks.num_clips < len(self.clips):
            logger.warning("%d of %d clips could not be read", len(self.clips) - found.ranks.num_clips, len(self.clips))
        return found

    def _spoken_distractors(self) -> Iterator[list[str]]:
        """Of each clip, the distractors that its text speaks or that are a variant of an ignored term.

        Nobody labelled the clips for them, so that finding one is neither right nor wrong.
        """
        by_group: dict[int, list[str]] = {}
        for term in self.distractors:
            by_group.setdefault(variant_group(term), []).append(term)
        for clip in self.clips:
            groups = spoken_groups(normalise_term(clip.text), by_group.keys())
            groups += [variant_group(term) for term in clip.ignored]
            yield [term for group in groups for term in by_group.get(group, ())]

    def _encode_clips(self, model: DualEncoder, indices: Iterable[int]) -> tuple[list[int], EncodedClips]:
        """Those of the clips that can be read; the others are counted among the drops."""
        kept, waves = [], []
        for index in () if is_requested() else indices:
            clip = self.clips[index]
            try:
                waves.append(torch.from_numpy(self.reader.read(clip.audio_path, clip.start_s, clip.end_s).copy()))
                kept.append(index)
            except AudioError as error:
                self.drops.add(error.reason, clip.source, error.detail)
        if not kept:
            return kept, no_clips(model)
        return kept, encode_clips(model, AudioPack(torch.cat(waves), [len(wave) for wave in waves]))
