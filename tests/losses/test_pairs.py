"""A rank's relations as pairs say what its masks say."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.pairs import Pairs, ship
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
