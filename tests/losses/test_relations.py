"""Positives, ignored pairs, multiplicities and ownership from ids."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.pairs import equal_pairs
from losses.relations import BatchIds, Relations


@settings(max_examples=50, deadline=None)
@given(queries=st.lists(st.integers(-3, 3), max_size=8), keys=st.lists(st.integers(-3, 3), max_size=8))
def test_equal_pairs_is_a_join(queries, keys):
    rows, columns = equal_pairs(torch.tensor(queries, dtype=torch.int64), torch.tensor(keys, dtype=torch.int64))
    expected = [(i, j) for i, query in enumerate(queries) for j, key in enumerate(keys) if key == query]
    assert list(zip(rows.tolist(), columns.tolist(), strict=True)) == expected


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 4), min_size=1, max_size=4))
def test_masks_counts_and_ownership(cases, seed, counts):
    clips = cases.random_clips(seed, sum(counts))
    parts, left = [], list(clips)
    for count in counts:
        parts.append(cases.batch_ids(left[:count]))
        left = left[count:]
    relations = Relations.build(parts)
    keys = relations.term_keys_N.tolist()
    assert len(set(keys)) == len(keys)
    assert keys == list(dict.fromkeys(key for clip in clips for key in clip.positives))
    assert relations.positives_GN.tolist() == [[key in clip.positives for key in keys] for clip in clips]
    assert relations.ignored_GN.tolist() == [[clip.ignores(key) for key in keys] for clip in clips]
    assert relations.counts_N.tolist() == [sum(key in clip.positives for clip in clips) for key in keys]

    owned = [key for rank in range(len(counts)) for key in keys[slice(*_bounds(relations.terms_of(rank)))]]
    assert owned == keys  # every term is owned once, in order
    for rank, part in enumerate(parts):
        local, clip_range, term_range = relations.local(rank), relations.clips_of(rank), relations.terms_of(rank)
        own_keys = part.term_keys_N[local.own_term_rows_U].tolist()
        assert own_keys == keys[term_range.start : term_range.stop]
        assert torch.equal(local.positives_BN, relations.positives_GN[clip_range.start : clip_range.stop])
        assert torch.equal(local.ignored_BN, relations.ignored_GN[clip_range.start : clip_range.stop])
        assert torch.equal(local.positives_UG, relations.positives_GN.T[term_range.start : term_range.stop])
        assert torch.equal(local.ignored_UG, relations.ignored_GN.T[term_range.start : term_range.stop])


def _bounds(span):
    return span.start, span.stop


def test_the_example_of_the_module():
    paris, lyon, nice = 1, 2, 3

    def part(num_positives, positives, terms):
        none = torch.zeros(0, dtype=torch.int64)
        num_clips = len(num_positives)
        return BatchIds(
            torch.zeros(num_clips, dtype=torch.int64),
            torch.tensor(num_positives),
            torch.tensor(positives),
            torch.zeros(num_clips, dtype=torch.int64),
            none,
            torch.tensor(terms),
            torch.tensor(terms) + 100,
        )

    relations = Relations.build([part([1, 2], [paris, paris, lyon], [paris, lyon]), part([2, 0], [lyon, nice], [2, 3])])
    assert relations.term_keys_N.tolist() == [paris, lyon, nice]
    assert relations.first_copy_N.tolist() == [0, 1, 3]
    assert relations.counts_N.tolist() == [2, 2, 1]
    assert (relations.terms_of(0), relations.terms_of(1)) == (range(0, 2), range(2, 3))
    assert relations.local(1).own_term_rows_U.tolist() == [1]
    assert relations.local(0).audio_term_weight_B.tolist() == pytest.approx([1 / 3, 1 / 3])
    assert relations.local(1).audio_term_weight_B.tolist() == pytest.approx([1 / 3, 0])
    assert relations.local(1).no_term_weight_B.tolist() == [0, 1]
    assert relations.local(0).term_audio_weight_U.tolist() == pytest.approx([2 / 5, 2 / 5])


def test_equal_texts_are_positives_and_textless_clips_are_nobodys(cases):
    clips = [cases.ClipCase(7, []), cases.ClipCase(0, []), cases.ClipCase(7, []), cases.ClipCase(0, [])]
    local = Relations.build([cases.batch_ids(clips)]).local()
    assert local.same_text_BG.int().tolist() == [[1, 0, 1, 0], [0, 0, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]]
    assert local.textless_G.tolist() == [False, True, False, True]
    assert local.audio_text_weight_B.tolist() == [0.5, 0.0, 0.5, 0.0]


def test_mined_term_that_no_clip_carries_stands_as_one_column(cases):
    local = Relations.build([cases.batch_ids([cases.ClipCase(0, [10])], extra_terms=(11,))]).local()
    assert local.term_log_count_N.tolist() == [0.0, 0.0]
    assert local.term_audio_weight_U.tolist() == [1.0, 0.0]
    assert local.positives_BN.tolist() == [[True, False]]


def test_pack_and_unpack(cases):
    ids = cases.batch_ids(cases.random_clips(1, 6))
    again = BatchIds.unpack(ids.pack())
    assert all(torch.equal(getattr(again, name), value) for name, value in vars(ids).items())
    empty = BatchIds.unpack(cases.batch_ids([]).pack())
    assert empty.text_keys_B.numel() == empty.term_keys_N.numel() == 0


def test_csr_rows_of_a_loader(cases):
    expected = cases.batch_ids([cases.ClipCase(1, [12, 10]), cases.ClipCase(2, []), cases.ClipCase(0, [10], [1001])])
    as_int32 = [torch.tensor(values, dtype=torch.int32) for values in ([0, 2, 2, 3], [0, 1, 1])]
    ids = BatchIds.from_csr(
        expected.text_keys_B,
        expected.term_keys_N,
        expected.term_groups_N,
        *as_int32,
        torch.tensor([0, 0, 0, 1]),
        torch.tensor([1001]),
    )
    assert all(torch.equal(getattr(ids, name), value) for name, value in vars(expected).items())


def test_term_named_twice_by_a_clip_counts_once(cases):
    relations = Relations.build([cases.batch_ids([cases.ClipCase(0, [10, 10])])])
    assert relations.counts_N.tolist() == [1]


def test_positive_that_is_not_embedded_is_refused(cases):
    ids = cases.batch_ids([cases.ClipCase(0, []), cases.ClipCase(0, [10])])
    short = BatchIds(**{**vars(ids), "term_keys_N": torch.tensor([11]), "term_groups_N": torch.tensor([1])})
    with pytest.raises(ValueError, match=r"1 keys, the first of clip 1 .* not in term_keys_N"):
        Relations.build([short])


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_keys_B", torch.zeros(1, dtype=torch.int32)),
        ("num_cut_groups_B", torch.zeros(3, dtype=torch.int64)),
        ("positive_keys_P", torch.zeros(5, dtype=torch.int64)),
        ("term_groups_N", torch.zeros(5, dtype=torch.int64)),
    ],
)
def test_ids_that_do_not_fit_together_are_refused(cases, field, value):
    ids = cases.batch_ids([cases.ClipCase(0, [10])])
    with pytest.raises(ValueError, match=field):
        BatchIds(**{**vars(ids), field: value})
