import itertools

import numpy as np
import pytest

from data.order import deal, epoch_order, loads, triple_hashes
from data.recipe import shared_table

LIKE = ("parking lot", "parking lots", "barking lot", "parking slot")
OTHERS = ("voicemail", "conference", "extension", "keypad", "operator", "weather", "billing", "queue")


@pytest.fixture
def table(clip):
    """60 clips: each of the LIKE terms three times, each of the OTHERS five times, and eight without a term."""
    terms = [term for term in LIKE for _ in range(3)] + [term for term in OTHERS for _ in range(5)] + [None] * 8
    return shared_table([clip(f"c{n}", terms=(term,) if term else ()) for n, term in enumerate(terms)])[1]


@pytest.mark.parametrize("kind", ["random", "spread", "gather"])
def test_every_item_once_windows_included_and_a_pure_function_of_seed_and_epoch(table, kind):
    order = epoch_order(kind, table, 70, seed=3, epoch=1)
    assert sorted(order.tolist()) == list(range(70))
    np.testing.assert_array_equal(epoch_order(kind, table, 70, seed=3, epoch=1), order)
    assert not np.array_equal(epoch_order(kind, table, 70, seed=3, epoch=2), order)
    assert not np.array_equal(epoch_order(kind, table, 70, seed=4, epoch=1), order)


def repeats(table, order, size=12):
    """How often a batch holds a term once more."""
    names = [table[int(item)].terms for item in order]
    batches = [list(itertools.chain.from_iterable(names[at : at + size])) for at in range(0, len(names), size)]
    return sum(len(batch) - len(set(batch)) for batch in batches)


def test_spread_keeps_a_terms_clips_apart(table):
    counted = {
        kind: sum(repeats(table, epoch_order(kind, table, 60, 0, epoch)) for epoch in range(20))
        for kind in ("random", "spread")
    }
    assert counted["spread"] < 0.4 * counted["random"], counted


def test_gather_brings_terms_that_look_alike_together(table):
    def met(kind):
        """How often two different LIKE terms are neighbours."""
        found = 0
        for epoch in range(20):
            names = [table[int(item)].terms for item in epoch_order(kind, table, 60, 0, epoch)]
            pairs = itertools.pairwise(name[0] if name else "" for name in names)
            found += sum(one != other and one in LIKE and other in LIKE for one, other in pairs)
        return found

    assert met("gather") > 2 * met("random")


def test_terms_share_a_hash_as_often_as_their_triples_overlap(clip):
    terms = ("parking lot", "parking lots", "voicemail", "ab")
    table = shared_table([clip(str(n), terms=(term,)) for n, term in enumerate(terms)])[1]
    hashes = np.array([triple_hashes(table, np.random.default_rng(seed)) for seed in range(400)])

    def triples(term):
        marked = f"\0{term}\0"
        return {marked[at : at + 3] for at in range(len(marked) - 2)}

    for one, other in itertools.combinations(range(4), 2):
        union, common = triples(terms[one]) | triples(terms[other]), triples(terms[one]) & triples(terms[other])
        share = (hashes[:, one] == hashes[:, other]).mean()
        assert share == pytest.approx(len(common) / len(union), abs=0.09), (terms[one], terms[other])


@pytest.mark.parametrize("world_size", [1, 2, 8, 64])
def test_ranks_get_the_same_load_within_two_percent(world_size):
    rng = np.random.default_rng(world_size)
    for _ in range(10):
        durations_s = rng.uniform(0.5, 3.0, 16 * world_size)
        loads_G = loads(durations_s, rng.integers(10, 80, len(durations_s)))
        owner_G = deal(loads_G, world_size)
        sums = np.bincount(owner_G, weights=loads_G, minlength=world_size)
        assert sums.max() <= 1.02 * sums.mean()
        counts = np.bincount(owner_G, minlength=world_size)
        assert counts.max() - counts.min() == 0


def test_one_load_above_the_mean_is_a_bound_that_no_dealing_beats():
    loads_G = np.array([3000, 10, 10, 10, 10])
    owner_G = deal(loads_G, 2)
    assert np.bincount(owner_G).tolist() in ([2, 3], [3, 2])
    assert deal(np.array([5]), 3).tolist() == [0], "fewer items than ranks"


def test_an_unknown_duration_counts_as_none():
    assert loads(np.array([np.nan, 1.0]), np.array([4, 0])).tolist() == [5, 201]
