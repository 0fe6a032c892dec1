"""A rank's relations as pairs say what its masks say."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.pairs import Pairs, apart, joined, ship, ship_together
from losses.relations import Relations


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 4), min_size=1, max_size=3))
def test_shares_and_texts_follow_from_the_masks(cases, seed, counts):
    clips = cases.random_clips(seed, sum(counts))
    starts = [sum(counts[:i]) for i in range(len(counts))]
    relations = Relations.build([cases.batch_ids(clips[a : a + n]) for a, n in zip(starts, counts, strict=True)])
    for rank in range(len(counts)):
        pairs = relations.local_pairs(rank)
        masks = pairs.dense()
        count_N = pairs.term_log_count_N.exp()
        row_P, col_P = pairs.positives_BN
        weighted_BN = masks.positives_BN * count_N
        expected_P = (weighted_BN / weighted_BN.sum(dim=1, keepdim=True))[row_P, col_P]
        assert torch.allclose(pairs.positive_share_P, expected_P, rtol=0, atol=1e-12)
        assert pairs.is_whole == (len(counts) == 1)
        same_B = pairs.num_same_text_G[pairs.first_clip : pairs.first_clip + counts[rank]]
        assert masks.same_text_BG.sum(dim=1).tolist() == same_B.tolist()
        assert all(-1 <= i < len(clips) for i in pairs.text_id_G.tolist())


def test_ship_and_to_leave_values_alone():
    pairs = Pairs(torch.tensor([2, 0]), torch.tensor([1, 3]))
    assert all(torch.equal(a, b) for a, b in zip(pairs.to("cpu"), pairs, strict=True))
    assert ship(pairs.row_P, "cpu").tolist() == [2, 0]


def test_tables_of_any_kind_travel_in_one_piece():
    tables = [
        torch.arange(5, dtype=torch.int32),
        torch.tensor([True, False, True]),
        torch.zeros(0, dtype=torch.int64),
        torch.rand(2, 3, dtype=torch.float64).T,
        torch.tensor(7.0),
    ]
    together = joined(tables)
    assert together.dtype == torch.uint8
    for own, expected in zip(apart(together, tables), tables, strict=True):
        assert own.dtype == expected.dtype
        assert torch.equal(own, expected)
        assert own.untyped_storage().data_ptr() == together.untyped_storage().data_ptr()
    assert all(a is b for a, b in zip(ship_together(tables, "cpu"), tables, strict=True))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_relations_on_the_device_are_those_of_the_host(cases):
    relations = Relations.build([cases.batch_ids(cases.random_clips(3, 12))])
    there, here = relations.local_pairs(0, "cuda"), relations.local_pairs(0)
    for name, own in vars(there.dense()).items():
        assert own.is_cuda
        assert torch.equal(own.cpu(), getattr(here.dense(), name)), name
    assert torch.equal(there.positive_share_P.cpu(), here.positive_share_P)
