"""Small batches described as Python lists, their embeddings, and the objective written as plain loops over them.

The oracle holds one column for every (clip, term) pair, duplicates and all, and shares no code with losses/.
"""

import math
import random
from dataclasses import dataclass, field

import torch
from torch import Tensor

from losses.relations import BatchIds, Relations
from losses.settings import LossSettings
from losses.total import Embeddings, total_loss

NUM_GROUPS = 4


def group_of(key: int) -> int:
    """Terms 10, 14, 18 are variants of one another, and so on."""
    return 1000 + key % NUM_GROUPS


@dataclass
class ClipCase:
    text_key: int
    positives: list[int]
    cut_groups: list[int] = field(default_factory=list)

    def concerns(self, key: int) -> bool:
        """Whether the term shares a variant group with a positive or a cut term."""
        return group_of(key) in {group_of(p) for p in self.positives} | set(self.cut_groups)

    def ignores(self, key: int) -> bool:
        return key not in self.positives and self.concerns(key)


def random_clips(seed: int, num_clips: int, num_keys: int = 9) -> list[ClipCase]:
    """About a quarter of the clips has no term, a fifth no text, a fifth a cut term; keys and texts repeat."""
    draw = random.Random(seed)
    return [
        ClipCase(
            text_key=0 if draw.random() < 0.2 else draw.randint(1, 4),
            positives=draw.sample(range(10, 10 + num_keys), draw.choice([0, 1, 1, 2])),
            cut_groups=[1000 + draw.randrange(NUM_GROUPS)] if draw.random() < 0.2 else [],
        )
        for _ in range(num_clips)
    ]


def batch_ids(clips: list[ClipCase], extra_terms: tuple[int, ...] = ()) -> BatchIds:
    keys = list(dict.fromkeys([key for clip in clips for key in clip.positives] + list(extra_terms)))
    return BatchIds(
        *(
            torch.tensor(values, dtype=torch.int64)
            for values in (
                [clip.text_key for clip in clips],
                [len(clip.positives) for clip in clips],
                [key for clip in clips for key in clip.positives],
                [len(clip.cut_groups) for clip in clips],
                [group for clip in clips for group in clip.cut_groups],
                keys,
                [group_of(key) for key in keys],
            )
        )
    )


def unit_rows(num_rows: int, dim: int, seed: int, spread: float = 1.0) -> Tensor:
    """Random fp64 unit rows that need a gradient; a small spread makes them alike."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(num_rows, dim, dtype=torch.float64, generator=generator) * spread + (1.0 - spread)
    return (rows / rows.norm(dim=1, keepdim=True)).requires_grad_()


@dataclass
class Leaves:
    """Everything that receives a gradient: a row a clip, a row a term key, and 1/tau."""

    audio_GE: Tensor
    text_GE: Tensor
    table_VE: Tensor  # row `key - 10` is the embedding of term `key`
    inv_temperature: Tensor

    def grads(self) -> list[Tensor]:
        leaves = (self.audio_GE, self.text_GE, self.table_VE, self.inv_temperature)
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad.clone() for leaf in leaves]


def make_leaves(num_clips: int, seed: int = 0, num_keys: int = 9, dim: int = 5, tau: float = 0.2) -> Leaves:
    return Leaves(
        unit_rows(num_clips, dim, seed * 3),
        unit_rows(num_clips, dim, seed * 3 + 1),
        unit_rows(num_keys, dim, seed * 3 + 2),
        torch.tensor(1 / tau, dtype=torch.float64, requires_grad=True),
    )


def shares(
    clips: list[ClipCase],
    counts: list[int],
    leaves: Leaves,
    settings: LossSettings,
    extra: tuple[int, ...] = (),
    tiled: bool = False,
) -> list[tuple[Tensor, dict[str, Tensor]]]:
    """The loss of each rank when rank r holds the next counts[r] clips; one process is counts = [len(clips)]."""
    assert sum(counts) == len(clips)
    starts = [sum(counts[:rank]) for rank in range(len(counts))]
    parts = [batch_ids(clips[a : a + n], extra) for a, n in zip(starts, counts, strict=True)]
    own_rows = [leaves.table_VE[part.term_keys_N - 10] for part in parts]
    relations = Relations.build(parts)
    results = []
    for rank, (start, count) in enumerate(zip(starts, counts, strict=True)):
        local = relations.local_pairs(rank) if tiled else relations.local(rank)
        embeddings = Embeddings(
            audio_BE=leaves.audio_GE[start : start + count],
            text_BE=leaves.text_GE[start : start + count],
            term_UE=own_rows[rank][local.own_term_rows_U],
            audio_GE=leaves.audio_GE,
            text_GE=leaves.text_GE,
            term_NE=torch.cat(own_rows)[local.first_copy_N],
        )
        results.append(total_loss(embeddings, local, leaves.inv_temperature, settings))
    return results


# --- the oracle ---------------------------------------------------------------------------------------------------


def log_sum(values: list[Tensor]) -> Tensor:
    return torch.stack(values).exp().sum().log()


def mean(values: list[Tensor]) -> Tensor:
    return torch.stack(values).mean() if values else torch.zeros((), dtype=torch.float64)


def contrast(scores: list[Tensor], positive: list[bool]) -> Tensor:
    """Mean over the positives of -log softmax."""
    return mean([log_sum(scores) - score for score, is_positive in zip(scores, positive, strict=True) if is_positive])


def oracle(clips: list[ClipCase], leaves: Leaves, settings: LossSettings) -> dict[str, Tensor]:
    def cosine(row: Tensor, key: int) -> Tensor:
        return row @ leaves.table_VE[key - 10]

    def value(score: Tensor) -> float:
        return float(score.detach())

    inv_t, everyone = leaves.inv_temperature, range(len(clips))
    audio, text = leaves.audio_GE, leaves.text_GE

    with_text = [i for i in everyone if clips[i].text_key]
    same = {i: [clips[j].text_key == clips[i].text_key for j in with_text] for i in with_text}
    to_text = [contrast([inv_t * (audio[i] @ text[j]) for j in with_text], same[i]) for i in with_text]
    to_audio = [contrast([inv_t * (text[i] @ audio[j]) for j in with_text], same[i]) for i in with_text]

    pairs = [(i, key) for i in everyone for key in clips[i].positives]  # one column a pair: the duplicated view
    clip_rows = []
    for i in everyone:
        columns = [key for _, key in pairs if not clips[i].ignores(key)]
        if clips[i].positives:
            scores = [inv_t * cosine(audio[i], key) for key in columns]
            clip_rows.append(contrast(scores, [key in clips[i].positives for key in columns]))
    pair_rows = []
    for _, key in pairs:
        heard = [j for j in everyone if not clips[j].ignores(key)]
        scores = [inv_t * cosine(audio[j], key) for j in heard]
        pair_rows.append(contrast(scores, [key in clips[j].positives for j in heard]))

    keys = sorted({key for _, key in pairs})
    hard_rows, no_term_rows = [], []
    for i in everyone:
        if not clips[i].positives:
            kept = [key for key in keys if not clips[i].ignores(key)]
            total = sum(((cosine(audio[i], key) - settings.no_term_margin) * inv_t).exp() for key in kept)
            no_term_rows.append(torch.log(torch.as_tensor(1.0 + total, dtype=torch.float64)))
            continue
        best = max(value(cosine(audio[i], key)) for key in clips[i].positives)
        limit = best - abs(best) * settings.hard_neg_margin
        rivals = [cosine(audio[i], key) for key in keys if not clips[i].concerns(key)]
        rivals = sorted((c for c in rivals if value(c) <= limit), key=value, reverse=True)[: settings.hard_neg_k]
        per_positive = []
        for key in clips[i].positives:
            if rivals:
                gap = log_sum([inv_t * c for c in rivals]) - inv_t * cosine(audio[i], key)
                per_positive.append(torch.log1p(gap.exp()))
            else:
                per_positive.append(torch.zeros((), dtype=torch.float64))
        hard_rows.append(mean(per_positive))

    return {
        "audio_text": (mean(to_text) + mean(to_audio)) / 2,
        "audio_term": (mean(clip_rows) + mean(pair_rows)) / 2,
        "hard": mean(hard_rows),
        "no_term": mean(no_term_rows),
    }


def oracle_total(clips: list[ClipCase], leaves: Leaves, settings: LossSettings) -> Tensor:
    parts = oracle(clips, leaves, settings)
    return (
        settings.audio_text_loss_ratio * parts["audio_text"]
        + settings.audio_term_loss_ratio * parts["audio_term"]
        + settings.hard_neg_weight * parts["hard"]
        + settings.no_term_loss_ratio * parts["no_term"]
    )


def largest_gap(one: list[Tensor], other: list[Tensor]) -> float:
    gaps = [float((a - b).abs().max()) if a.numel() else 0.0 for a, b in zip(one, other, strict=True)]
    return math.nan if any(math.isnan(gap) for gap in gaps) else max(gaps)
