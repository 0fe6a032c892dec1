"""Hard negatives, the term bank, and clips without a term."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.infonce import multi_positive_cross_entropy
from losses.pairs import Pairs
from losses.relations import Relations
from losses.sweep import LeftOut
from losses.terms import BankNegatives, TermBank, hard_negative_loss, no_term_loss

F64 = torch.float64
INV_T = torch.tensor(5.0, dtype=F64)


def at_angle(*cosines):
    """Unit rows in the plane with these cosines to the x axis."""
    cosine = torch.tensor(cosines, dtype=F64)
    return torch.stack([cosine, (1 - cosine**2).sqrt()], dim=1)


def hard(audio_BE, term_NE, positives_BN, ignored_BN=None, k=10, margin=0.05, weight_B=None, **bank):
    ignored_BN = torch.zeros_like(positives_BN) if ignored_BN is None else ignored_BN
    weight_B = torch.ones(audio_BE.shape[0], dtype=F64) if weight_B is None else weight_B
    cosine_BN = audio_BE @ term_NE.T
    return hard_negative_loss(audio_BE, cosine_BN, positives_BN, ignored_BN, weight_B, INV_T, k, margin, **bank)


def left_out(*pairs, entries=()):
    row_Q, entry_Q = torch.tensor(pairs, dtype=torch.int64).reshape(-1, 2).T
    return LeftOut(Pairs(row_Q, entry_Q), torch.tensor(entries, dtype=torch.int64))


X_AXIS = torch.tensor([[1.0, 0.0]], dtype=F64)
FIRST_OF_FOUR = torch.tensor([[True, False, False, False]])


def test_false_negatives_above_the_margin_are_left_out():
    """pos = 0.8, margin 0.25: the limit is 0.6. A cosine of 0.61 is taken for a false negative, 0.59 is not."""
    term_NE = at_angle(0.8, 0.61, 0.59, 0.1).requires_grad_()
    loss = hard(X_AXIS, term_NE, FIRST_OF_FOUR, margin=0.25)
    loss.backward()
    assert term_NE.grad[1].abs().max() == 0
    assert (term_NE.grad[2:, 0] > 0).all()
    expected = torch.nn.functional.softplus((INV_T * torch.tensor([0.59, 0.1], dtype=F64)).logsumexp(0) - INV_T * 0.8)
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-12)


def test_margin_of_a_negative_positive_score_still_lowers_the_limit():
    """pos = -0.4, margin 0.5: pos - |pos| * m = -0.6. pos * (1 - m) would be -0.2, above the positive itself."""
    term_NE = at_angle(-0.4, -0.5, -0.7, -0.9).requires_grad_()
    hard(X_AXIS, term_NE, FIRST_OF_FOUR, margin=0.5).backward()
    assert term_NE.grad[1].abs().max() == 0
    assert (term_NE.grad[2:].abs().amax(dim=1) > 0).all()


def test_the_best_positive_sets_the_limit():
    term_NE = at_angle(0.2, 0.9, 0.5, 0.1).requires_grad_()
    hard(X_AXIS, term_NE, torch.tensor([[True, True, False, False]])).backward()
    assert term_NE.grad[2, 0] > 0  # far above the weaker positive, yet a negative


def test_only_the_k_hardest_count():
    term_NE = at_angle(0.9, 0.1, 0.5, 0.4).requires_grad_()
    hard(X_AXIS, term_NE, FIRST_OF_FOUR, k=2).backward()
    assert term_NE.grad[1].abs().max() == 0
    assert (term_NE.grad[2:, 0] > 0).all()


def test_variants_of_a_positive_are_never_hard_negatives():
    term_NE = at_angle(0.9, 0.8, 0.4, 0.3).requires_grad_()
    hard(X_AXIS, term_NE, FIRST_OF_FOUR, ignored_BN=torch.tensor([[False, True, False, False]])).backward()
    assert term_NE.grad[1].abs().max() == 0


def test_hard_negatives_reach_the_audio_side():
    """Scores taken as constants from an index train nothing: the audio must feel its negatives."""
    audio_BE = at_angle(0.95).requires_grad_()
    term_NE = at_angle(0.9, 0.5, 0.3, 0.1)
    (with_three,) = torch.autograd.grad(hard(audio_BE, term_NE, FIRST_OF_FOUR), audio_BE)
    (with_one,) = torch.autograd.grad(hard(audio_BE, term_NE, FIRST_OF_FOUR, k=1), audio_BE)
    assert (with_three - with_one).abs().max() > 1e-3


def test_clip_without_candidates_contributes_exactly_zero():
    audio_BE, term_NE = at_angle(0.9, 0.8).requires_grad_(), at_angle(0.9, 0.95).requires_grad_()
    positives_BN = torch.tensor([[True, False], [False, False]])  # one rival above the margin; no positive
    loss = hard(audio_BE, term_NE, positives_BN, ignored_BN=torch.tensor([[False, True], [False, False]]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    assert audio_BE.grad.abs().max() == term_NE.grad.abs().max() == 0.0


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_bank_entries_count_as_batch_terms_would(seed):
    """Negatives in the bank or in the batch: same loss, same audio gradient; the bank itself gets none."""
    generator = torch.Generator().manual_seed(seed)

    def draw(num_rows):
        return torch.nn.functional.normalize(torch.randn(num_rows, 4, dtype=F64, generator=generator), dim=1)

    audio_BE, term_NE = draw(3).requires_grad_(), draw(9)
    positives_BN = torch.zeros(3, 9, dtype=torch.bool)
    positives_BN[0, 0] = positives_BN[1, 1] = positives_BN[1, 2] = True
    bank_KE = term_NE[4:].clone()
    bank = {"bank": BankNegatives(bank_KE.detach(), left_out())}
    whole = hard(audio_BE, term_NE, positives_BN, k=3)
    split = hard(audio_BE, term_NE[:4], positives_BN[:, :4], k=3, **bank)
    assert float((whole - split).detach().abs()) < 1e-13
    (expected,) = torch.autograd.grad(whole, audio_BE)
    split.backward()
    assert (audio_BE.grad - expected).abs().max() < 1e-13


def test_bank_alone_trains_the_audio_side():
    audio_BE = at_angle(0.95).requires_grad_()
    positives_BN, bank_KE = torch.tensor([[True]]), at_angle(0.2, 0.3)
    bank = BankNegatives(bank_KE, left_out())
    (live,) = torch.autograd.grad(hard(audio_BE, at_angle(0.9), positives_BN, bank=bank), audio_BE)
    bank = BankNegatives(bank_KE, left_out((0, 0), (0, 1)))
    (none,) = torch.autograd.grad(hard(audio_BE, at_angle(0.9), positives_BN, bank=bank), audio_BE)
    assert live.abs().max() > 1e-3
    assert none.abs().max() == 0.0


def test_bank_leaves_out_positives_variants_and_terms_of_the_batch(cases):
    clips = [cases.ClipCase(0, [10]), cases.ClipCase(0, [], [1003]), cases.ClipCase(0, [13])]
    relations = Relations.build([cases.batch_ids(clips[:1]), cases.batch_ids(clips[1:])])
    keys_K = torch.tensor([14, 11, 17, 10, 12])  # variant of 10, the cut term, variant of 13, in the batch, stranger
    bank = TermBank(torch.zeros(5, 2), keys_K, torch.tensor([cases.group_of(int(key)) for key in keys_K]))
    for rank, expected in ((0, [(0, 0), (0, 3)]), (1, [(0, 1), (1, 2)])):
        found = bank.against(relations, rank).left_out
        assert sorted(zip(*(x.tolist() for x in found.pairs_Q), strict=True)) == expected
        assert found.entry_J.tolist() == [3]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_no_term_clip_pushes_and_never_pulls(seed):
    """dL/ds >= 0 for every score of a clip without terms: as a row of its own loss, and as a column, where it only
    raises the denominator of each term's row."""
    generator = torch.Generator().manual_seed(seed)
    cosine_BN = (torch.rand(4, 5, dtype=F64, generator=generator) * 2 - 1).requires_grad_()
    positives_BN = torch.rand(4, 5, generator=generator) < 0.4
    positives_BN[2] = False
    ignored_BN = torch.zeros_like(positives_BN)
    ignored_BN[2, 0] = True

    (own,) = torch.autograd.grad(
        no_term_loss(cosine_BN, ignored_BN, torch.tensor([0, 0, 1.0, 0]), INV_T, 0.3), cosine_BN
    )
    assert (own[2, 1:] > 0).all()
    assert own[2, 0] == 0  # cut at the clip's edge: neither heard nor absent
    assert (own[[0, 1, 3]] == 0).all()

    as_rows = multi_positive_cross_entropy(cosine_BN * INV_T, positives_BN, ignored_BN).sum()
    (row_gradient,) = torch.autograd.grad(as_rows, cosine_BN)
    assert (row_gradient[2] == 0).all()  # it has nothing to find
    as_columns = multi_positive_cross_entropy(cosine_BN.T * INV_T, positives_BN.T, ignored_BN.T).sum()
    (column_gradient,) = torch.autograd.grad(as_columns, cosine_BN)
    carried_N = positives_BN.any(dim=0)
    assert (column_gradient[2] >= 0).all()
    assert (column_gradient[2, 1:][carried_N[1:]] > 0).all()


def test_no_term_loss_is_small_once_all_terms_are_below_the_margin():
    ignored_BN, weight_B = torch.zeros(1, 2, dtype=torch.bool), torch.ones(1)
    near = no_term_loss(torch.tensor([[0.9, 0.2]]), ignored_BN, weight_B, torch.tensor(50.0), 0.3)
    far = no_term_loss(torch.tensor([[0.1, -0.2]]), ignored_BN, weight_B, torch.tensor(50.0), 0.3)
    assert near == pytest.approx(30.0, abs=0.01)
    assert far < 1e-4
