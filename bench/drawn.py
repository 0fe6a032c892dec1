"""Random clips as users have them, without a file: the batches on which we and the peers are timed.

    length            exp(N(log 1.5 s, 0.45)), kept within 0.3 and 4 s
    text              3.2 tokens a second, 2 to 16
    terms             one, for 30 % of the clips two, of 2 to 5 tokens each

Both sides draw from the same generator, so that they see the same clips. Texts and terms are all different: what makes
a step dear is their number.

Shapes: B clips, N terms, S samples of all clips, P tokens of all strings.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from bin.feed import FedBatch
from data.batches import Batch
from data.order import BYTES_PER_TOKEN, deal, loads

SAMPLE_RATE = 16_000
TEXT_VOCABULARY = 150_000
NUM_BATCHES = 4
"""That each side takes in turn."""


@dataclass(frozen=True)
class Drawn:
    """What one step works on."""

    waves: list[Tensor]  # fp32, 16 kHz, one a clip
    text_lengths_B: Tensor
    num_terms_B: Tensor
    term_lengths_N: Tensor

    @property
    def num_clips(self) -> int:
        return len(self.waves)

    @property
    def num_audio_tokens(self) -> int:
        """Frames after the second convolution that hold sound: what a packed tower works on."""
        return sum((len(wave) // 160 - 1) // 2 + 1 for wave in self.waves)

    @property
    def num_text_tokens(self) -> int:
        return int(self.text_lengths_B.sum() + self.term_lengths_N.sum())


def draw(num_clips: int, generator: torch.Generator) -> Drawn:
    """The next batch of a CPU generator."""
    spread = torch.randn(num_clips, generator=generator) * 0.45
    seconds_B = (spread + math.log(1.5)).exp().clamp(0.3, 4.0)
    waves = [0.1 * torch.randn(int(length * SAMPLE_RATE), generator=generator) for length in seconds_B.tolist()]
    text_lengths_B = (seconds_B * 3.2).round().clamp(2, 16).long()
    num_terms_B = 1 + (torch.rand(num_clips, generator=generator) < 0.3).long()
    term_lengths_N = torch.randint(2, 6, (int(num_terms_B.sum()),), generator=generator)
    return Drawn(waves, text_lengths_B, num_terms_B, term_lengths_N)


def as_batch(drawn: Drawn, seed: int, vocabulary: int = TEXT_VOCABULARY) -> Batch:
    """What our loader would hand over: int16 samples, token ids of texts then terms, keys and positives."""
    num_clips, num_terms = drawn.num_clips, len(drawn.term_lengths_N)
    rng = np.random.default_rng(seed)
    token_lengths = [*drawn.text_lengths_B.tolist(), *drawn.term_lengths_N.tolist()]
    starts_B1 = np.concatenate([[0], np.cumsum(drawn.num_terms_B.numpy())])
    samples = [(wave.clamp(-1, 1) * 32767).to(torch.int16).numpy() for wave in drawn.waves]
    groups_N = np.arange(num_terms, dtype=np.int64)
    # Keys are hashes to the trainer: any that are all different do.
    keys = rng.permutation(8 * (num_clips + num_terms))[: num_clips + num_terms].astype(np.int64) + 1
    return Batch(
        clip_ids=[f"{seed}-{i}" for i in range(num_clips)],
        clip_index_B=np.arange(num_clips, dtype=np.int64),
        is_no_term_B=np.zeros(num_clips, dtype=bool),
        pcm_S=np.concatenate(samples),
        num_samples=[len(one) for one in samples],
        token_ids_P=rng.integers(0, vocabulary, sum(token_lengths)).astype(np.int64),
        token_lengths=token_lengths,
        num_texts=num_clips,
        text_row_B=np.arange(num_clips, dtype=np.int64),
        text_keys_B=keys[:num_clips],
        terms=[f"term {i}" for i in range(num_terms)],
        term_keys_N=keys[num_clips:],
        term_groups_N=groups_N,
        pos_indptr_B1=starts_B1.astype(np.int64),
        pos_terms=groups_N.copy(),
        ign_indptr_B1=starts_B1.astype(np.int64),
        ign_groups=groups_N.copy(),
    )


def part_of(batch: Batch, clips: Sequence[int]) -> Batch:
    """Some clips of a drawn batch with their texts and terms, as a rank gets them: keys stay those of the whole."""
    pcm = np.split(batch.pcm_S, np.cumsum(batch.num_samples)[:-1])
    ids = np.split(batch.token_ids_P, np.cumsum(batch.token_lengths)[:-1])
    num_terms_B = np.diff(batch.pos_indptr_B1)[list(clips)]
    terms = np.concatenate([np.arange(*batch.pos_indptr_B1[clip : clip + 2]) for clip in clips])
    strings = [*clips, *(batch.num_texts + terms)]
    starts_B1 = np.concatenate([[0], np.cumsum(num_terms_B)])
    return replace(
        batch,
        clip_ids=[batch.clip_ids[clip] for clip in clips],
        clip_index_B=batch.clip_index_B[list(clips)],
        is_no_term_B=batch.is_no_term_B[list(clips)],
        pcm_S=np.concatenate([pcm[clip] for clip in clips]),
        num_samples=[batch.num_samples[clip] for clip in clips],
        token_ids_P=np.concatenate([ids[string] for string in strings]),
        token_lengths=[batch.token_lengths[string] for string in strings],
        num_texts=len(clips),
        text_row_B=np.arange(len(clips)),
        text_keys_B=batch.text_keys_B[list(clips)],
        terms=[batch.terms[term] for term in terms],
        term_keys_N=batch.term_keys_N[terms],
        term_groups_N=batch.term_groups_N[terms],
        pos_indptr_B1=starts_B1,
        pos_terms=np.arange(len(terms)),
        ign_indptr_B1=starts_B1,
        ign_groups=batch.ign_groups[terms],
    )


def dealt(batch: Batch, world_size: int) -> list[Batch]:
    """The parts of all ranks, dealt as the loader deals them: every rank gets about as many tokens."""
    seconds_G = np.asarray(batch.num_samples) / SAMPLE_RATE
    text_bytes_G = BYTES_PER_TOKEN * np.asarray(batch.token_lengths[: batch.num_texts])
    owner_G = deal(loads(seconds_G, text_bytes_G), world_size)
    return [part_of(batch, np.flatnonzero(owner_G == rank).tolist()) for rank in range(world_size)]


def on_device(batch: Batch, device: torch.device) -> FedBatch:
    """The batch with its two packs on the device, as bin/feed.py brings them there while the step before runs."""
    fed = FedBatch.of(batch)
    assert fed.audio is not None
    assert fed.text is not None
    return FedBatch(batch, fed.audio.to(device), fed.text.to(device))
