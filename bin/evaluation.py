"""Measure a model on one sample file, spread over the ranks, with the result of one process.

Shapes: C clips, N terms of the glossary, R rows of one process, E embedding.
"""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.audio import AudioError
from data.clips import Clip
from data.drops import DropLog
from data.reader import AudioReader
from distributed.collectives import gather_ints, gather_rows
from distributed.processes import World
from model.dual import DualEncoder
from model.packing import AudioPack, TextPack
from model.tokenizer import Tokenizer
from retrieval.evaluate import encode_in_fixed_batches, evaluate, top_terms
from retrieval.metrics import EvalResult, Judgements
from retrieval.readout import EncodedClips, encode_clips, no_clips

logger = logging.getLogger(__name__)


def encode_terms(
    model: DualEncoder, tokenizer: Tokenizer, terms: Sequence[str], batch_size: int, world: World
) -> Tensor:
    """term_NE of all terms on every rank, fp32, the same bits at any number of ranks. A collective."""

    def encode(start: int, stop: int) -> Tensor:
        ids = tokenizer(list(terms[start:stop]))
        flat_P = torch.tensor([token for one in ids for token in one], dtype=torch.int64)
        return model.encode_text(TextPack(flat_P, [len(one) for one in ids]))

    return encode_in_fixed_batches(
        encode,
        len(terms),
        batch_size,
        world.rank,
        world.world_size,
        gather_rows,
        model.audio_head.out_features,
        model.device,
    )


@dataclass
class Evaluator:
    """A test or dev set against a glossary: call it with a model."""

    clips: list[Clip]
    terms: list[str]  # the glossary's normal forms
    seen_terms: frozenset[str]  # those that are a positive of any training clip
    reader: AudioReader
    drops: DropLog
    batch_size: int
    world: World

    def __post_init__(self) -> None:
        self.judgements = Judgements.from_terms(
            self.terms,
            [clip.terms for clip in self.clips],
            [clip.ignored for clip in self.clips],
            [clip.is_no_term for clip in self.clips],
            self.seen_terms,
        )

    def __call__(self, model: DualEncoder, tokenizer: Tokenizer) -> EvalResult:
        """A collective: all ranks call it, and all get the same result."""
        was_training = model.training
        model.eval()
        term_NE = encode_terms(model, tokenizer, self.terms, self.batch_size, self.world)
        result = evaluate(
            lambda start, stop: self._encode_clips(model, range(start, stop)),
            term_NE,
            self.judgements,
            self.batch_size,
            self.world.rank,
            self.world.world_size,
            lambda values_S: gather_ints(values_S)[0],
        )
        model.train(was_training)
        if result.num_clips < len(self.clips):
            logger.warning("%d of %d clips could not be read", len(self.clips) - result.num_clips, len(self.clips))
        return result

    @torch.no_grad()
    def examples(
        self, model: DualEncoder, tokenizer: Tokenizer, count: int, k: int = 5
    ) -> list[tuple[Clip, list[str]]]:
        """`count` clips at even distances, each with its top k terms. A collective; every rank does the same work."""
        was_training = model.training
        model.eval()
        term_NE = encode_terms(model, tokenizer, self.terms, self.batch_size, self.world)
        wanted = list(range(0, len(self.clips), max(1, len(self.clips) // max(1, count))))[:count]
        found: list[tuple[Clip, list[str]]] = []
        for index in wanted:
            kept, encoded = self._encode_clips(model, [index])
            if kept:
                _, places = top_terms(encoded, term_NE, k, self.judgements.order_N)
                found.append((self.clips[index], [self.terms[place] for place in places[0]]))
        model.train(was_training)
        return found

    def _encode_clips(self, model: DualEncoder, indices: Iterable[int]) -> tuple[list[int], EncodedClips]:
        """Those of the clips that can be read; the others are counted among the drops."""
        kept, waves = [], []
        for index in indices:
            clip = self.clips[index]
            try:
                waves.append(torch.from_numpy(self.reader.read(clip.audio_path, clip.start_s, clip.end_s).copy()))
                kept.append(index)
            except AudioError as error:
                self.drops.add(error.reason, clip.source, error.detail)
        if not kept:
            return kept, no_clips(model)
        return kept, encode_clips(model, AudioPack(torch.cat(waves), [len(wave) for wave in waves]))
