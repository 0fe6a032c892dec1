"""Layouts: lengths, neighbours, and errors that name the clip."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from model.packing import AudioLayout, AudioPack, SequenceLayout, TextPack


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.integers(1, 2000), st.integers(479_000, 480_000)), min_size=1, max_size=6))
def test_audio_layout(num_samples):
    layout = AudioLayout.build(num_samples, 2, 3000, "cpu")
    assert layout.num_frames == [-(-samples // 160) for samples in num_samples]
    assert layout.tokens.lengths == [(frames - 1) // 2 + 1 for frames in layout.num_frames]
    assert layout.pooled.lengths == [max(1, tokens // 2) for tokens in layout.tokens.lengths]
    slots = torch.bincount(layout.owner_T)
    kept = torch.bincount(layout.owner_T[layout.is_kept_T])
    assert kept.tolist() == [min(frames + 2, 3000) for frames in layout.num_frames]
    assert not (slots % 2).any(), "a clip must start at an even slot"
    assert (slots - kept >= 2).all(), "a window of a kept frame must not reach the next clip"
    # The convolution's stride: token t of a clip sits on its frame 2 t.
    assert torch.equal(layout.place_T[layout.token_slot_P * 2], layout.tokens.place_P * 2)
    assert torch.equal(layout.owner_T[layout.token_slot_P * 2], layout.tokens.owner_P)
    # Pooled tokens average neighbours of one clip.
    assert torch.equal(layout.tokens.owner_P[layout.pool_first_Q], layout.pooled.owner_P)
    assert torch.equal(layout.tokens.owner_P[layout.pool_second_Q], layout.pooled.owner_P)
    assert torch.equal(layout.tokens.place_P[layout.pool_first_Q], layout.pooled.place_P * 2)


def test_without_pooling_the_tokens_are_returned_as_they_are():
    layout = AudioLayout.build([1600, 170], 1, 3000, "cpu")
    assert layout.pooled.lengths == layout.tokens.lengths == [5, 1]
    assert torch.equal(layout.pool_first_Q, layout.pool_second_Q)


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=8))
def test_sequence_layout(lengths):
    layout = SequenceLayout.build(lengths, "cpu")
    assert layout.cu_seqlens.dtype == torch.int32
    assert layout.cu_seqlens.diff().tolist() == lengths
    x_PD = torch.randn(sum(lengths), 3, dtype=torch.float64)
    means = torch.stack([part.mean(0) for part in x_PD.split(lengths)])
    torch.testing.assert_close(layout.mean(x_PD), means)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.integers(1, 200), min_size=1, max_size=12))
def test_dense_groups_hold_every_token_once_and_little_padding(lengths):
    layout = SequenceLayout.build(lengths, "cpu")
    seen = []
    for group in layout.dense_groups:
        tokens = torch.arange(sum(lengths)) if group.tokens_P is None else group.tokens_P
        rows = torch.arange(len(tokens)) if group.rows_P is None else group.rows_P
        assert torch.equal(rows % group.max_len, layout.place_P[tokens])
        if group.key_mask_BL is None:
            assert len(tokens) == group.batch * group.max_len
        else:
            assert torch.equal(group.key_mask_BL.flatten().nonzero()[:, 0], rows)
        seen.append(tokens)
    assert torch.equal(torch.cat(seen).sort().values, torch.arange(sum(lengths)))
    padded = sum(group.batch * group.max_len**2 for group in layout.dense_groups)
    assert padded <= 4 * sum(length**2 for length in lengths)


def test_one_long_clip_does_not_pad_the_short_ones():
    groups = SequenceLayout.build([1500, *[75] * 63], "cpu").dense_groups
    assert [(group.batch, group.max_len) for group in groups] == [(1, 1500), (63, 75)]


def test_mean_of_half_precision_is_taken_in_fp32():
    layout = SequenceLayout.build([3000], "cpu")
    x_PD = torch.full((3000, 2), 1.0, dtype=torch.bfloat16)
    assert torch.equal(layout.mean(x_PD), torch.ones(1, 2))


@pytest.mark.parametrize("num_samples", [[1600, 0], [1600, 480_001]])
def test_a_clip_that_is_empty_or_too_long_is_named(num_samples):
    with pytest.raises(ValueError, match=r"num_samples\[1\]: got (0|480001), allowed are 1 to 480000 \(30 s"):
        AudioLayout.build(num_samples, 2, 3000, "cpu")


def test_lengths_that_do_not_fit_the_data_are_refused():
    with pytest.raises(ValueError, match="num_samples: they sum to 5, but pcm_S holds 4"):
        AudioPack(torch.zeros(4, dtype=torch.int16), [2, 3])
    with pytest.raises(ValueError, match="lengths: they sum to 5, but ids_P holds 4"):
        TextPack(torch.zeros(4, dtype=torch.int64), [2, 3])
    with pytest.raises(ValueError, match="need at least one clip"):
        AudioLayout.build([], 2, 3000, "cpu")
    with pytest.raises(ValueError, match="at least one sequence"):
        SequenceLayout.build([], "cpu")
    with pytest.raises(ValueError, match="one token in each"):
        SequenceLayout.build([2, 0], "cpu")
