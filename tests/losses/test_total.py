"""The whole objective against plain loops, and split over simulated ranks against itself in one piece."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.relations import Relations
from losses.settings import LossSettings
from losses.total import Embeddings, align_texts, total_loss

ALL_PARTS = LossSettings(no_term_loss_ratio=0.4, hard_neg_k=2)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), num_clips=st.integers(1, 7))
def test_equals_loops_over_duplicated_columns(cases, seed, num_clips):
    clips, leaves, expected = (
        cases.random_clips(seed, num_clips),
        cases.make_leaves(num_clips, seed),
        cases.make_leaves(num_clips, seed),
    )
    ((loss, parts),) = cases.shares(clips, [num_clips], leaves, ALL_PARTS)
    loss.backward()
    reference = cases.oracle_total(clips, expected, ALL_PARTS)
    if reference.requires_grad:
        reference.backward()
    assert abs(float((loss - reference).detach())) < 1e-12
    assert cases.largest_gap(leaves.grads(), expected.grads()) < 1e-11
    for name, value in cases.oracle(clips, expected, ALL_PARTS).items():
        assert abs(float((parts[name] - value).detach())) < 1e-12, name


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), counts=st.lists(st.integers(0, 4), min_size=2, max_size=5))
def test_shares_of_ranks_sum_to_the_one_process_loss(cases, seed, counts):
    """Value and gradients, temperature included; ranks may hold unequal batches, or nothing."""
    counts = [*counts, 1]
    clips, num_clips = cases.random_clips(seed, sum(counts)), sum(counts)
    whole, split = cases.make_leaves(num_clips, seed), cases.make_leaves(num_clips, seed)
    ((loss, parts),) = cases.shares(clips, [num_clips], whole, ALL_PARTS)
    loss.backward()
    results = cases.shares(clips, counts, split, ALL_PARTS)
    torch.stack([share for share, _ in results]).sum().backward()
    assert abs(float((sum(share for share, _ in results) - loss).detach())) < 1e-12
    assert cases.largest_gap(split.grads(), whole.grads()) < 1e-12
    for name, value in parts.items():
        assert abs(float(sum(part[name] for _, part in results) - value)) < 1e-12, name


def test_every_share_hangs_on_every_gathered_tensor(cases):
    """A rank without clips or terms must still enter the backward pass of each gather, or the others wait for ever."""
    clips, leaves = cases.random_clips(3, 4), cases.make_leaves(4, 3)
    parts = [cases.batch_ids(clips), cases.batch_ids([])]
    local = Relations.build(parts).local(1)
    gathered = [leaves.audio_GE, leaves.text_GE, leaves.table_VE[parts[0].term_keys_N - 10]]
    embeddings = Embeddings(*(rows[:0] for rows in gathered), *gathered)
    loss, _ = total_loss(embeddings, local, leaves.inv_temperature, ALL_PARTS)
    grads = torch.autograd.grad(loss, [*gathered, leaves.inv_temperature])  # raises if one is not reached
    assert loss.item() == 0.0
    assert all(grad.abs().max() == 0 for grad in grads)


def test_batch_of_no_term_clips_is_finite(cases):
    clips = [cases.ClipCase(1, []), cases.ClipCase(0, [], [1001]), cases.ClipCase(2, [])]
    for extra in ((), (11, 12)):  # without a single term, and with mined terms that no clip carries
        leaves = cases.make_leaves(3, 1)
        ((loss, parts),) = cases.shares(clips, [3], leaves, ALL_PARTS, extra)
        loss.backward()
        assert all(torch.isfinite(grad).all() for grad in leaves.grads())
        assert float(parts["audio_term"]) == float(parts["hard"]) == 0.0
        assert (float(parts["no_term"]) > 0) == bool(extra)


def test_batch_without_texts_is_finite(cases):
    leaves = cases.make_leaves(2, 1)
    ((loss, parts),) = cases.shares([cases.ClipCase(0, [10]), cases.ClipCase(0, [11])], [2], leaves, ALL_PARTS)
    loss.backward()
    assert float(parts["audio_text"]) == 0.0
    assert leaves.text_GE.grad.abs().max() == 0


def test_clip_without_text_takes_no_part_in_audio_text(cases):
    settings = LossSettings(audio_term_loss_ratio=0.0, enable_hard_neg=False, audio_text_loss_ratio=1.0)
    clips = [cases.ClipCase(1, [10]), cases.ClipCase(0, [11]), cases.ClipCase(2, [12])]
    leaves, fewer = cases.make_leaves(3, 5), cases.make_leaves(3, 5)
    ((loss, _),) = cases.shares(clips, [3], leaves, settings)
    loss.backward()
    fewer.audio_GE, fewer.text_GE = fewer.audio_GE[[0, 2]], fewer.text_GE[[0, 2]]
    ((without, _),) = cases.shares([clips[0], clips[2]], [2], fewer, settings)
    assert loss.item() == pytest.approx(without.item(), abs=1e-14)
    assert leaves.audio_GE.grad[1].abs().max() == leaves.text_GE.grad[1].abs().max() == 0


def test_gradcheck_of_the_total(cases):
    clips = cases.random_clips(11, 4)

    def objective(audio_GE, text_GE, table_VE, inv_temperature):
        return cases.shares(clips, [4], cases.Leaves(audio_GE, text_GE, table_VE, inv_temperature), ALL_PARTS)[0][0]

    leaves = cases.make_leaves(4, 11, dim=3)
    inputs = (leaves.audio_GE, leaves.text_GE, leaves.table_VE, leaves.inv_temperature)
    assert torch.autograd.gradcheck(objective, inputs)


def test_parts_of_weight_zero_are_left_out(cases):
    settings = LossSettings(audio_text_loss_ratio=0.0, enable_hard_neg=False)
    ((loss, parts),) = cases.shares(cases.random_clips(2, 4), [4], cases.make_leaves(4, 2), settings)
    assert list(parts) == ["audio_term"]
    assert loss.item() == pytest.approx(0.7 * float(parts["audio_term"]))


def test_statistics_stay_fp32_under_autocast(cases):
    clips = cases.random_clips(4, 6)
    leaves = cases.make_leaves(6, 4)
    for name in ("audio_GE", "text_GE", "table_VE", "inv_temperature"):
        setattr(leaves, name, getattr(leaves, name).detach().float().requires_grad_())
    ((plain, _),) = cases.shares(clips, [6], leaves, ALL_PARTS)
    with torch.autocast("cpu", torch.bfloat16):
        ((autocast, _),) = cases.shares(clips, [6], leaves, ALL_PARTS)
    assert autocast.dtype == torch.float32
    assert autocast.item() == plain.item()


def test_align_texts_puts_zeros_where_a_clip_has_no_text():
    text_TE = torch.tensor([[1.0, 2.0], [3.0, 4.0]], requires_grad=True)
    text_BE = align_texts(text_TE, torch.tensor([1, -1, 0]))
    assert text_BE.tolist() == [[3.0, 4.0], [0.0, 0.0], [1.0, 2.0]]
    text_BE.sum().backward()
    assert text_TE.grad.tolist() == [[1.0, 1.0], [1.0, 1.0]]
    assert align_texts(torch.zeros(0, 2), torch.tensor([-1])).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 0.0),
        ("audio_term_loss_ratio", -0.1),
        ("hard_neg_k", 0),
        ("hard_neg_margin", 1.0),
        ("no_term_margin", 2.0),
        ("no_term_loss_ratio", float("nan")),
    ],
)
def test_settings_out_of_range_name_field_and_value(field, value):
    with pytest.raises(ValueError, match=rf"{field} is {value}"):
        LossSettings(**{field: value})


def test_settings_that_train_nothing_are_refused():
    with pytest.raises(ValueError, match="nothing would be trained"):
        LossSettings(audio_text_loss_ratio=0, audio_term_loss_ratio=0, hard_neg_weight=0)
