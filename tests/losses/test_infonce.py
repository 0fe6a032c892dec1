"""Multi-positive InfoNCE: duplicated columns, left-out columns, rows without a positive."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses.infonce import cosine_scores, multi_positive_cross_entropy, multi_positive_infonce

F64 = torch.float64


def drawn(seed, num_rows, num_cols, masks=(0.3, 0.2)):
    generator = torch.Generator().manual_seed(seed)
    scores_RC = torch.randn(num_rows, num_cols, dtype=F64, generator=generator) * 4
    positives_RC = torch.rand(num_rows, num_cols, generator=generator) < masks[0]
    ignored_RC = (torch.rand(num_rows, num_cols, generator=generator) < masks[1]) & ~positives_RC
    return scores_RC.requires_grad_(), positives_RC, ignored_RC


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10_000), copies=st.lists(st.integers(1, 4), min_size=1, max_size=6))
def test_duplicating_a_column_changes_nothing(seed, copies):
    """+ log m_j and an m-weighted target equal the matrix in which every column stands m_j times."""
    counts_C = torch.tensor(copies)
    scores_RC, positives_RC, ignored_RC = drawn(seed, 3, len(copies))
    loss_R = multi_positive_cross_entropy(scores_RC, positives_RC, ignored_RC, counts_C.double().log())
    (gradient,) = torch.autograd.grad(loss_R.sum(), scores_RC)

    def repeated(matrix):
        return matrix.repeat_interleave(counts_C, dim=1)

    expected_R = multi_positive_cross_entropy(repeated(scores_RC), repeated(positives_RC), repeated(ignored_RC))
    (expected_gradient,) = torch.autograd.grad(expected_R.sum(), scores_RC)
    assert (loss_R - expected_R).abs().max() < 1e-13
    assert (gradient - expected_gradient).abs().max() < 1e-13


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_one_positive_is_plain_cross_entropy(seed):
    scores_RC, _, ignored_RC = drawn(seed, 4, 5, masks=(0.0, 0.0))
    targets_R = torch.randint(0, 5, (4,), generator=torch.Generator().manual_seed(seed))
    positives_RC = torch.nn.functional.one_hot(targets_R, 5).bool()
    loss_R = multi_positive_cross_entropy(scores_RC, positives_RC, ignored_RC)
    expected_R = torch.nn.functional.cross_entropy(scores_RC, targets_R, reduction="none")
    assert (loss_R - expected_R).abs().max() < 1e-13


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_ignored_column_gets_exactly_zero_gradient_and_changes_no_value(seed):
    scores_RC, positives_RC, ignored_RC = drawn(seed, 4, 6, masks=(0.3, 0.5))
    loss_R = multi_positive_cross_entropy(scores_RC, positives_RC, ignored_RC)
    (gradient,) = torch.autograd.grad(loss_R.sum(), scores_RC)
    assert (gradient[ignored_RC] == 0).all()
    louder_RC = torch.where(ignored_RC, scores_RC.detach() + 100.0, scores_RC.detach())
    assert torch.equal(multi_positive_cross_entropy(louder_RC, positives_RC, ignored_RC), loss_R)


def test_row_without_positive_gives_exactly_zero_and_no_nan():
    scores_RC, positives_RC, ignored_RC = drawn(5, 4, 3)
    positives_RC[0], ignored_RC[0] = False, False  # only negatives
    positives_RC[1], ignored_RC[1] = False, True  # nothing but ignored columns
    positives_RC[2], ignored_RC[2] = True, False  # only positives
    positives_RC[3], ignored_RC[3] = torch.tensor([True, False, False]), torch.tensor([False, True, True])
    loss_R = multi_positive_cross_entropy(scores_RC, positives_RC, ignored_RC)
    (gradient,) = torch.autograd.grad(loss_R.sum(), scores_RC)
    assert torch.isfinite(gradient).all()
    assert loss_R[0] == loss_R[1] == 0.0
    assert (gradient[:2] == 0).all()
    assert loss_R[3] == 0.0  # one column, the positive: certain


def test_no_columns_at_all():
    rows_RE = torch.randn(2, 3, requires_grad=True)
    nothing_RC = torch.zeros(2, 0, dtype=torch.bool)
    weight_R, inv_t = torch.full((2,), 0.5), torch.tensor(5.0, requires_grad=True)
    loss = multi_positive_infonce(rows_RE, torch.zeros(0, 3), nothing_RC, nothing_RC, None, weight_R, inv_t)
    loss.backward()
    assert loss == 0.0
    assert rows_RE.grad.abs().max() == inv_t.grad == 0.0


def test_gradcheck_with_rows_columns_and_temperature():
    generator = torch.Generator().manual_seed(2)
    rows_RE, cols_CE = (torch.randn(n, 3, dtype=F64, generator=generator, requires_grad=True) for n in (3, 4))
    _, positives_RC, ignored_RC = drawn(1, 3, 4)
    positives_RC[0] = False
    log_weight_C, weight_R = torch.tensor([1.0, 3.0, 2.0, 1.0], dtype=F64).log(), torch.tensor([0.2, 0.5, 0.3])
    inv_temperature = torch.tensor(4.0, dtype=F64, requires_grad=True)

    def share(rows, cols, inv_t):
        return multi_positive_infonce(rows, cols, positives_RC, ignored_RC, log_weight_C, weight_R, inv_t)

    assert torch.autograd.gradcheck(share, (rows_RE, cols_CE, inv_temperature))


def test_scores_of_bf16_rows_are_fp32():
    """Columns gathered in bf16 are rounded once, by the wire, not again by the product."""
    generator = torch.Generator().manual_seed(3)
    rows_RE, cols_CE = torch.randn(4, 64, generator=generator), torch.randn(5, 64, generator=generator).bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        scores_RC = cosine_scores(rows_RE, cols_CE)
    assert scores_RC.dtype == torch.float32
    exact_RC = rows_RE.double() @ cols_CE.double().T
    assert (scores_RC - exact_RC).abs().max() < 1e-5
