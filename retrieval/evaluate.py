"""Evaluate spread over processes, with the result of one process.

Clips and terms are encoded in fixed batches: batch b holds items b * batch_size up to (b + 1) * batch_size and is done
by process b % world_size. What is in a batch, and so what the kernels compute for it, does not depend on how many
processes there are. Example: 10 clips, batch_size 4, world_size 2.

    process 0: clips 0-3 and 8-9        process 1: clips 4-7

The scores of a batch come from one product with each chunk of terms, for the same reason. (With the same number of
CPU threads in each process; a different number may change the last bit of a product.) What crosses between processes is
passed in as callables, for this package knows nothing of collectives.

Shapes: C clips, N terms of the glossary, R rows of one process, K terms of a chunk or top terms, E embedding,
S packed values.
"""

import itertools
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.judgements import Judgements
from retrieval.metrics import SUBSETS, EvalResult
from retrieval.ranks import ClipRanks, Ranker
from retrieval.readout import EncodedClips, best_terms, score_clips

SHOWN_KS = (1, 5, 10)
CHUNK_TERMS = 1 << 14

EncodeRows = Callable[[int, int], torch.Tensor]
"""(start, stop) -> embeddings [stop - start, E] of these items."""

EncodeClips = Callable[[int, int], tuple[Sequence[int], EncodedClips]]
"""(start, stop) -> (clips that could be read, ascending; these clips, encoded)."""

GatherRows = Callable[[torch.Tensor, list[int]], torch.Tensor]
"""(this process's rows, number of rows of each process) -> all rows, process after process."""

GatherInts = Callable[[torch.Tensor], torch.Tensor]
"""This process's int64 vector (CPU, any length) -> the vectors of all processes one after another."""


def rank_share(num_items: int, batch_size: int, rank: int, world_size: int) -> list[tuple[int, int]]:
    """The (start, stop) batches of one process; the shares of all processes are the whole list, once.

    Raises:
        ValueError: batch_size below 1, or rank not in [0, world_size).
    """
    if batch_size < 1:
        raise ValueError(f"batch_size: {batch_size}; allowed: at least 1")
    if not 0 <= rank < world_size:
        raise ValueError(f"rank: {rank}; allowed: 0 to {world_size - 1}, below world_size")
    starts = range(rank * batch_size, num_items, world_size * batch_size)
    return [(start, min(start + batch_size, num_items)) for start in starts]


def encode_in_fixed_batches(
    encode: EncodeRows,
    num_items: int,
    batch_size: int,
    rank: int,
    world_size: int,
    gather_rows: GatherRows,
    embedding_dim: int,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Embeddings [num_items, E] fp32 of all items, the same bits on every process and at any world size.

    Every process must call this, also one without a batch: it takes part in the gather with no rows.
    """
    shares = [rank_share(num_items, batch_size, r, world_size) for r in range(world_size)]
    counts = [sum(stop - start for start, stop in share) for share in shares]
    parts = [torch.empty(0, embedding_dim, device=device)]
    with torch.no_grad():
        for start, stop in shares[rank]:
            parts.append(encode(start, stop).float())
            assert parts[-1].shape == (stop - start, embedding_dim), (parts[-1].shape, start, stop, embedding_dim)
        gathered_NE = gather_rows(torch.cat(parts), counts)
    place_N = torch.tensor([i for share in shares for start, stop in share for i in range(start, stop)], device=device)
    ordered_NE = torch.empty_like(gathered_NE)
    ordered_NE[place_N.long()] = gathered_NE
    return ordered_NE


def measure(
    encode_clips: EncodeClips,
    encode_terms: EncodeRows,
    judgements: Judgements,
    batch_size: int,
    sizes: Sequence[int] | None = None,
    num_top: int = 1,
    rank: int = 0,
    world_size: int = 1,
    gather_ints: GatherInts = lambda values_S: values_S,
    device: torch.device | str = "cpu",
) -> list[ClipRanks]:
    """Rank the glossary for every clip. Every process must call this and gets the same facts of all clips.

    The glossary is gone through once, CHUNK_TERMS at a time, so that a million terms need no memory of their own; only
    the embeddings of chunks with positives are kept, since a positive's score must be known before terms are counted.

    Args:
        encode_clips: clips that it leaves out (unreadable audio) are not measured.
        encode_terms: a collective: the same L2-normalised rows on every process (see `encode_in_fixed_batches`). All
            processes call it with the same spans.
        batch_size: clips a batch; the same number at any world size gives the same bits.
        sizes: ascending; the facts are asked for among the first so many terms, each size giving one entry of the
            result. By default the whole glossary. All positives lie below the first size.
        num_top: how many of the best terms of each clip are kept.
        device: where clips and terms are encoded, and ranked.

    Raises:
        ValueError: sizes that do not ascend, go beyond the glossary, or leave a positive out.
    """
    sizes = [judgements.num_terms] if sizes is None else list(sizes)
    num_gold = 1 + max((place for places in judgements.positives for place in places), default=-1)
    least = max(1, num_gold)
    if sizes != sorted(set(sizes)) or not sizes or sizes[0] < least or sizes[-1] > judgements.num_terms:
        raise ValueError(f"sizes: {sizes}; allowed: ascending, {least} (all positives) to {judgements.num_terms}")
    with torch.no_grad():
        batches, rankers = [], []
        for start, stop in rank_share(judgements.num_clips, batch_size, rank, world_size):
            clips, encoded = encode_clips(start, stop)
            assert all(start <= clip < stop for clip in clips), (clips, start, stop)
            batches.append(encoded)
            rankers.append(Ranker(clips, judgements, num_top, device))

        spans = [
            (start, min(start + CHUNK_TERMS, stop))
            for first, stop in itertools.pairwise([0, *sizes])
            for start in range(first, stop, CHUNK_TERMS)
        ]
        kept: dict[int, torch.Tensor] = {}
        for start, stop in spans:
            if start < num_gold:
                kept[start] = encode_terms(start, stop)
                for encoded, ranker in zip(batches, rankers, strict=True):
                    ranker.note_positives(score_clips(encoded, kept[start]), start)
        parts: list[list[ClipRanks]] = []
        for start, stop in spans:
            term_KE = kept.pop(start) if start in kept else encode_terms(start, stop)
            for encoded, ranker in zip(batches, rankers, strict=True):
                ranker.add(score_clips(encoded, term_KE), start)
            if stop in sizes:
                parts.append([ranker.ranks() for ranker in rankers])
    joined = (ClipRanks.join(some or [ClipRanks.empty(num_top)]) for some in parts)
    return [ClipRanks.unpack(gather_ints(torch.from_numpy(ranks.pack())).cpu().numpy()) for ranks in joined]


def top_terms(
    clips: EncodedClips, term_NE: torch.Tensor, k: int, order_N: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best k terms of each clip (all terms when there are fewer), in the order that `retrieval.ranks` ranks by.

    Args:
        order_N: `Judgements.order_N`, what breaks ties.

    Returns:
        Scores (cosine) and places in the glossary, each [C, K], best first.
    """
    return best_terms(clips, term_NE, k, order_N)


def recall_table(
    before: EvalResult, after: EvalResult, ks: Sequence[int] = SHOWN_KS
) -> tuple[list[str], list[list[str]]]:
    """Header and rows of the closing table: recall before -> after for all, seen and unseen terms.

    A subset that no clip belongs to has a row of dashes: absent is not zero.
    """
    header = ["terms", *(f"R@{k}" for k in ks), "clips", "glossary"]
    rows = []
    for name in SUBSETS:
        old, new = before.subsets.get(name), after.subsets.get(name)
        cells = [f"{old.recall[k]:.3f} -> {new.recall[k]:.3f}" if old and new else "-" for k in ks]
        rows.append([name, *cells, str(new.num_clips if new else 0), str(after.num_terms)])
    return header, rows


def plain_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Aligned columns for a log file: first column to the left, the others to the right, two blanks between."""
    widths = [max(len(line[i]) for line in (header, *rows)) for i in range(len(header))]
    lines = [
        "  ".join([line[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(line[1:], widths[1:], strict=True))])
        for line in (header, *rows)
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])
