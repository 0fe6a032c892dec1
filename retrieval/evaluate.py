"""Evaluate spread over processes, with the result of one process.

Clips and terms are encoded in fixed batches: batch b holds items b * batch_size up to (b + 1) * batch_size and is done
by process b % world_size. What is in a batch, and so what the kernels compute for it, does not depend on how many
processes there are. Example: 10 clips, batch_size 4, world_size 2.

    process 0: clips 0-3 and 8-9        process 1: clips 4-7

The scores of a batch come from one product with the whole term matrix, for the same reason. (With the same number of
CPU threads in each process; a different number may change the last bit of a product.) What crosses between processes is
passed in as callables, for this package knows nothing of collectives.

Shapes: C clips, N terms of the glossary, R rows of one process, E embedding, K top terms, S packed values.
"""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from retrieval.metrics import KS, SUBSETS, ClipRanks, EvalResult, Judgements, rank_positives, summarise
from retrieval.readout import EncodedClips, best_terms, score_clips

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
            part_RE = encode(start, stop).float()
            assert part_RE.shape == (stop - start, embedding_dim), (part_RE.shape, start, stop, embedding_dim)
            parts.append(part_RE)
        rows_RE = torch.cat(parts)
        gathered_NE = gather_rows(rows_RE, counts)
    place_N = torch.tensor([i for share in shares for start, stop in share for i in range(start, stop)], device=device)
    ordered_NE = torch.empty_like(gathered_NE)
    ordered_NE[place_N.long()] = gathered_NE
    return ordered_NE


def evaluate(
    encode_clips: EncodeClips,
    term_NE: torch.Tensor,
    judgements: Judgements,
    batch_size: int,
    rank: int = 0,
    world_size: int = 1,
    gather_ints: GatherInts = lambda values_S: values_S,
    ks: Sequence[int] = KS,
) -> EvalResult:
    """Rank the glossary for every clip and measure. Every process must call this and gets the same result.

    Args:
        encode_clips: clips that it leaves out (unreadable audio) are not measured: `num_clips` then counts fewer.
        term_NE: L2-normalised, fp32, the same on every process (see `encode_in_fixed_batches`).
        batch_size: clips a batch; the same number at any world size gives the same bits.
    """
    parts = []
    with torch.no_grad():
        for start, stop in rank_share(judgements.num_clips, batch_size, rank, world_size):
            clips, encoded = encode_clips(start, stop)
            assert all(start <= clip < stop for clip in clips), (clips, start, stop)
            scores_RN = score_clips(encoded, term_NE)
            parts.append(rank_positives(scores_RN, clips, judgements))
    packed_S = gather_ints(torch.from_numpy(ClipRanks.join(parts).pack()))
    return summarise(ClipRanks.unpack(packed_S.cpu().numpy()), judgements.num_terms, ks)


def top_terms(
    clips: EncodedClips, term_NE: torch.Tensor, k: int, order_N: NDArray[np.int64]
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """The best k terms of each clip (all terms when there are fewer), in the order that `retrieval.metrics` ranks by.

    Args:
        order_N: `Judgements.order_N`, what breaks ties.

    Returns:
        Scores (cosine) and places in the glossary, each [C, K], best first.
    """
    return best_terms(clips, term_NE, k, order_N)


def recall_table(before: EvalResult, after: EvalResult, ks: Sequence[int] = KS) -> tuple[list[str], list[list[str]]]:
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
