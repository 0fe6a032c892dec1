"""In which order an epoch's items come, and which rank gets which: pure functions of (seed, epoch), never of the ranks.

`random`  a permutation.
`spread`  a term's clips at even distances over the epoch, so that a batch holds as many different terms as it can.
          A clip's place is (k + u) / m: the k-th of its term's m clips in a random order, u drawn for the term.
`gather`  blocks of up to 4 clips whose terms look alike (they share a min-hash of their letter triples, which happens
          as often as the triples overlap: Broder 1997) and differ, so that batches hold hard negatives; blocks in a
          random order, other hashes in each epoch.

Shapes: C clips of the table, N items of the epoch (clips, then random windows), V terms, G items of a global batch.
"""

from __future__ import annotations

import numpy as np

from data.table import ClipTable

BLOCK = 4
TOKENS_PER_S = 50  # of audio, as the towers read it
BYTES_PER_TOKEN = 4  # of text, about
MAX_EXCHANGES = 64  # a rank, when loads are evened out
GOOD_ENOUGH = 1.005  # maximum over mean


def epoch_order(kind: str, table: ClipTable, num_items: int, seed: int, epoch: int) -> np.ndarray:
    """int64 [N]: the items in order; items from len(table) on are windows, which have no fixed term."""
    rng = np.random.default_rng((seed, epoch))
    order_N = rng.permutation(num_items)
    if kind == "random":
        return order_N
    term_N = _first_terms(table, num_items)
    if kind == "spread":
        return _spread(order_N, term_N, len(table.terms), rng)
    assert kind == "gather", kind
    return _gather(order_N, term_N, table, rng)


def _first_terms(table: ClipTable, num_items: int) -> np.ndarray:
    """int64 [N]: place of an item's first term, -1 where it has none."""
    term_N = np.full(num_items, -1, dtype=np.int64)
    has_C = ~table.is_no_term_C
    term_N[: len(table)][has_C] = table.positive_terms[table.positive_indptr[:-1][has_C]]
    return term_N


def _spread(order_N: np.ndarray, term_N: np.ndarray, num_terms: int, rng: np.random.Generator) -> np.ndarray:
    # Items without a term are terms of their own, one item each: evenly drawn places.
    term_of_N = term_N[order_N]
    place_N = rng.random(len(order_N))
    with_term = np.flatnonzero(term_of_N >= 0)
    terms = term_of_N[with_term]
    counts_V = np.bincount(terms, minlength=num_terms)
    place_N[with_term] = (_occurrence(terms) + rng.random(num_terms)[terms]) / counts_V[terms]
    return order_N[np.argsort(place_N, kind="stable")]


def _occurrence(terms: np.ndarray) -> np.ndarray:
    """Of each entry, how many entries before it are the same."""
    by_term = np.argsort(terms, kind="stable")
    ordered = terms[by_term]
    is_first = np.r_[True, ordered[1:] != ordered[:-1]] if len(ordered) else np.zeros(0, dtype=bool)
    starts = np.maximum.accumulate(np.where(is_first, np.arange(len(ordered)), 0))
    found = np.empty(len(terms), dtype=np.int64)
    found[by_term] = np.arange(len(ordered)) - starts
    return found


def _gather(order_N: np.ndarray, term_N: np.ndarray, table: ClipTable, rng: np.random.Generator) -> np.ndarray:
    term_of_N = term_N[order_N]
    with_term = np.flatnonzero(term_of_N >= 0)
    if not len(with_term):
        return order_N
    terms = term_of_N[with_term]
    hash_N = triple_hashes(table, rng)[terms]
    # Within a hash: the first clips of all its terms, then the second ones, so that neighbours differ in their term.
    by_hash = np.lexsort((rng.random(len(table.terms))[terms], _occurrence(terms), hash_N))
    ordered = hash_N[by_hash]
    is_new = np.r_[True, ordered[1:] != ordered[:-1]]
    start = np.maximum.accumulate(np.where(is_new, np.arange(len(ordered)), 0))
    block = np.cumsum(is_new | ((np.arange(len(ordered)) - start) % BLOCK == 0)) - 1
    num_blocks, num_alone = int(block[-1]) + 1, len(order_N) - len(with_term)
    # Items without a term are blocks of one.
    place = rng.permutation(num_blocks + num_alone)
    without_term = np.flatnonzero(term_of_N < 0)
    items = np.concatenate([order_N[with_term][by_hash], order_N[without_term]])
    return items[np.argsort(np.concatenate([place[block], place[num_blocks:]]), kind="stable")]


def triple_hashes(table: ClipTable, rng: np.random.Generator) -> np.ndarray:
    """uint64 [V]: each term's smallest hash over its triples of bytes, edges marked; hashes are drawn from `rng`."""
    indptr, text = table.terms.indptr, np.asarray(table.terms.bytes_)
    if not len(table.terms):
        return np.zeros(0, dtype=np.uint64)
    # Each term with an edge byte before and after it, so that every term has a triple.
    padded = np.zeros(len(text) + 2 * len(table.terms), dtype=np.uint64)
    owner = np.repeat(np.arange(len(table.terms)), np.diff(indptr))
    padded[np.arange(len(text)) + 2 * owner + 1] = text
    triples = padded[:-2] | padded[1:-1] << np.uint64(8) | padded[2:] << np.uint64(16)
    odd, shift = rng.integers(1 << 62, dtype=np.uint64) | np.uint64(1), np.uint64(29)
    mixed = (triples + np.uint64(1)) * odd
    mixed = (mixed ^ mixed >> shift) * odd
    starts = indptr[:-1] + 2 * np.arange(len(table.terms))
    sizes = np.maximum(np.diff(indptr), 1)
    # Triples from each term's start up to its last letter; the two between terms are left out by the next start.
    lasts = starts + sizes
    edges = np.stack([starts, lasts], axis=1).ravel()
    edges = np.minimum(edges, len(mixed) - 1)
    return np.minimum.reduceat(mixed, edges)[::2]


def loads(durations_s_G: np.ndarray, text_bytes_G: np.ndarray) -> np.ndarray:
    """int64 [G]: about how many tokens each item gives the towers, in 1/4 tokens: whole, so that all ranks agree."""
    audio = np.rint(np.nan_to_num(durations_s_G) * TOKENS_PER_S * BYTES_PER_TOKEN)
    return audio.astype(np.int64) + text_bytes_G.astype(np.int64) + 1


def deal(loads_G: np.ndarray, world_size: int) -> np.ndarray:
    """int64 [G]: the rank of each item. Ranks differ by one item at most, and in their sums as little as may be.

    Dealt to and fro by load, heaviest first; then the heaviest rank exchanges an item with the lightest one for as long
    as that brings the two closer together.
    """
    owner_G = np.zeros(len(loads_G), dtype=np.int64)
    if world_size == 1:
        return owner_G
    heaviest_first = np.argsort(-loads_G, kind="stable")
    turn, within = np.divmod(np.arange(len(loads_G)), world_size)
    owner_G[heaviest_first] = np.where(turn % 2 == 0, within, world_size - 1 - within)
    sums_R = np.bincount(owner_G, weights=loads_G, minlength=world_size).astype(np.int64)
    mean = loads_G.sum() / world_size
    for _ in range(MAX_EXCHANGES * world_size):
        heavy, light = int(np.argmax(sums_R)), int(np.argmin(sums_R))
        if sums_R[heavy] <= GOOD_ENOUGH * mean:
            break
        mine, theirs = np.flatnonzero(owner_G == heavy), np.flatnonzero(owner_G == light)
        if not len(theirs):
            break
        gap = int(sums_R[heavy] - sums_R[light])
        change = loads_G[mine][:, None] - loads_G[theirs][None, :]
        best = int(np.argmin(np.abs(2 * change - gap)))
        give, take = mine[best // len(theirs)], theirs[best % len(theirs)]
        moved = int(loads_G[give] - loads_G[take])
        if not 0 < moved < gap:
            break
        owner_G[give], owner_G[take] = light, heavy
        sums_R[heavy] -= moved
        sums_R[light] += moved
    return owner_G
