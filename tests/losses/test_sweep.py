"""One sweep over a bank against the matrix of all scores."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import sweep as sweep_module
from losses.infonce import floor_of
from losses.scores import UnitRows
from losses.sweep import bank_contrast, hardest_of_bank
from tests.losses import tiles


def compare(case, k, triton=False):
    """Largest errors: (lse, d audio relative, d (1 / temperature) relative, top cosines)."""
    lse_B, d_audio_BE, d_inv_t, top_BH, cosine_BK = case.by_masks(k)
    audio_BE = case.audio_BE.detach().clone().requires_grad_()
    inv_t = case.inv_t.clone().requires_grad_()
    found_B, found_BH, index_BH = bank_contrast(audio_BE, case.bank_KE, case.left_out, case.limit_B, inv_t, k, triton)
    floor = floor_of(found_B)
    has_any_B, is_real_BH = lse_B > -1e20, top_BH > -5
    assert (found_B[~has_any_B] == floor).all()
    assert (found_BH[~is_real_BH] <= floor).all()
    assert found_BH.shape == top_BH.shape
    grads = torch.autograd.grad((found_B.double() * case.weight_B * has_any_B).sum(), (audio_BE, inv_t))
    chosen_BH = cosine_BK.gather(1, index_BH)[is_real_BH]  # a place that is left out holds -9
    assert (chosen_BH - top_BH[is_real_BH]).abs().max() < 1e-5
    for row in range(len(top_BH)):
        places = index_BH[row][is_real_BH[row]].tolist()
        assert len(set(places)) == len(places)

    def largest(found, expected):
        return float((found.double() - expected).abs().max()) if expected.numel() else 0.0

    return (
        largest(found_B[has_any_B].detach(), lse_B[has_any_B]),
        largest(grads[0], d_audio_BE) / max(float(d_audio_BE.abs().max()), 1e-9),
        largest(grads[1], d_inv_t) / max(float(d_inv_t.abs()), 1e-3),
        largest(found_BH[is_real_BH], top_BH[is_real_BH]),
    )


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), num_clips=st.integers(2, 5), num_entries=st.integers(1, 40), k=st.integers(1, 50))
def test_equals_the_matrix(seed, num_clips, num_entries, k):
    case = tiles.bank_problem(seed, num_clips, num_entries, 6, torch.float64)
    if not (case.by_masks(k)[3] > -5).any():
        return  # no candidate at all
    assert max(compare(case, k)) < 1e-10


@pytest.mark.parametrize("numbers", [1, 50, 333])
@pytest.mark.parametrize("inv_t", [14.0, 100.0])
def test_chunks_of_any_width_give_the_same(monkeypatch, numbers, inv_t):
    monkeypatch.setattr(sweep_module, "CHUNK_NUMBERS", numbers)
    assert max(compare(tiles.bank_problem(1, 6, 53, 8, torch.float64, inv_t), k=7)) < 1e-10


def test_the_bank_gets_no_gradient_and_an_empty_one_changes_nothing():
    case = tiles.bank_problem(2, 3, 12, 4, torch.float64)
    bank_KE = case.bank_KE.clone().requires_grad_()
    audio_BE = case.audio_BE.clone().requires_grad_()
    lse_B, _, _ = bank_contrast(audio_BE, bank_KE, case.left_out, case.limit_B, case.inv_t, 2)
    lse_B[1:].sum().backward()
    assert bank_KE.grad is None
    assert audio_BE.grad[1:].abs().max() > 0
    top_BH, index_BH = hardest_of_bank(UnitRows(audio_BE), bank_KE[:0], case.left_out, case.limit_B, 2)
    assert top_BH.shape == index_BH.shape == (3, 0)


def test_gradcheck():
    case = tiles.bank_problem(3, 3, 9, 4, torch.float64)

    def lse(audio_BE, inv_t):
        return bank_contrast(audio_BE, case.bank_KE, case.left_out, case.limit_B, inv_t, 2)[0][1:]

    limit_B = case.limit_B.clone()
    limit_B[1:] = 0.9  # far from any score, so that a small step crosses nothing
    case.limit_B = limit_B
    assert torch.autograd.gradcheck(lse, (case.audio_BE.clone().requires_grad_(), case.inv_t.clone().requires_grad_()))
