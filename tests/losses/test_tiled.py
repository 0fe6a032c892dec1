"""The tiled loss by torch is the dense one, to rounding, whatever the sizes and options."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from losses import tiled
from losses.infonce import floor_of
from losses.pairs import Pairs
from losses.tiled import Match, contrast
from tests.losses import tiles

F64, F32, BF16 = torch.float64, torch.float32, torch.bfloat16


@settings(max_examples=80, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    num_rows=st.integers(0, 9),
    num_cols=st.integers(0, 9),
    symmetric=st.booleans(),
    keys=st.booleans(),
)
def test_equals_the_dense_reference(seed, num_rows, num_cols, symmetric, keys):
    case = tiles.problem(seed, num_rows, num_cols, symmetric=symmetric, keys=keys)
    assert max(tiles.errors(case.by_tiles(triton=False), case.by_masks())) < 1e-10


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("keys", [False, True])
@pytest.mark.parametrize("panel", [1, 37, 100])
def test_panels_of_any_height_give_the_same(monkeypatch, symmetric, keys, panel):
    """A panel of one row, one that does not divide the rows, several rows."""
    case = tiles.problem(3, 23, 17, symmetric=symmetric, keys=keys)
    monkeypatch.setattr(tiled, "PANEL_NUMBERS", panel)
    assert max(tiles.errors(case.by_tiles(triton=False), case.by_masks())) < 1e-10


@pytest.mark.parametrize(("dtypes", "most"), [((F32, F32), 1e-5), ((BF16, BF16), 6e-3), ((F32, BF16), 6e-3)])
@pytest.mark.parametrize("keys", [False, True])
def test_other_dtypes_differ_by_their_own_rounding(dtypes, most, keys):
    """Gradients come back in the embeddings' dtype; the loss is fp32 of the embeddings as they are."""
    case = tiles.problem(4, 40, 33, dim=16, dtypes=dtypes, keys=keys)
    loss, *grads = tiles.errors(case.by_tiles(triton=False), case.by_masks())
    assert loss < 1e-5
    assert max(grads) < most


def test_gradcheck():
    case = tiles.problem(5, 4, 5, dim=3)

    def losses(rows_RE, cols_CE, inv_t):
        return contrast(rows_RE, cols_CE, inv_t, case.match)

    inputs = [x.detach().clone().requires_grad_() for x in (case.rows_RE, case.cols_CE, case.inv_t)]
    assert torch.autograd.gradcheck(losses, inputs)


def test_row_without_any_column_is_finite_and_passes_nothing_on():
    rows_RE, cols_CE = (torch.eye(3, dtype=F64, requires_grad=True) for _ in range(2))
    nobody_C = torch.full((3,), -torch.inf, dtype=F64)
    loss_R, loss_C = contrast(rows_RE, cols_CE, torch.tensor(5.0, dtype=F64), Match(nobody_C))
    loss_R.sum().backward()
    assert (loss_R == floor_of(loss_R)).all()
    assert loss_C.numel() == 0
    assert rows_RE.grad.abs().max() == cols_CE.grad.abs().max() == 0.0


def test_no_buffer_of_rows_times_columns(monkeypatch):
    """The largest tensor made during forward and backward is a panel, not the matrix."""
    size, panel = 96, 500
    monkeypatch.setattr(tiled, "PANEL_NUMBERS", panel)
    case = tiles.problem(6, size, size, dense_ignored=0.0)
    seen = []

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            seen.extend(x.numel() for x in (out if isinstance(out, tuple | list) else [out]) if torch.is_tensor(x))
            return out

    with Watch():
        case.by_tiles(triton=False)
    assert max(seen) >= panel // size * size
    assert max(seen) < size * size / 8


def test_padded_pairs_stand_for_nothing():
    case = tiles.problem(7, 6, 6)
    padding = torch.full((4,), -1)
    padded = Pairs(*(torch.cat([x, padding]) for x in case.match.ignored))
    longer = Match(case.match.col_bias_C, case.match.row_bias_R, padded, *list(vars(case.match).values())[3:])
    expected = case.by_tiles(triton=False)
    case.match = longer
    assert all(torch.equal(a, b) for a, b in zip(case.by_tiles(triton=False), expected, strict=True))
