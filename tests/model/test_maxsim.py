"""Windows against plain slices, scores and gradients against the matrix of all windows."""

import pytest
import torch
import torch.nn.functional as F

import model.maxsim as maxsim
from model.maxsim import WindowedClips, WindowShape, WindowTable, frame_seconds
from model.settings import ModelSettings

SHAPE = WindowShape((2, 4), 3)


def all_windows(length: int, shape: WindowShape) -> list[tuple[int, int]]:
    """(first, size), written the slow way."""
    found = []
    for size in shape.sizes:
        firsts = [first for first in range(0, length, shape.stride) if first + size <= length]
        if size <= length and length - size not in firsts:
            firsts.append(length - size)
        found += [(first, size) for first in firsts]
    return found or [(0, length)]


@pytest.mark.parametrize("shape", [SHAPE, WindowShape((1,), 1), WindowShape((2, 4, 8, 12, 16, 24), 2)])
def test_windows_cover_every_frame_and_stay_within_their_clip(shape: WindowShape) -> None:
    lengths = [1, 2, 3, 5, 24, 25, 61]
    table = WindowTable.build(lengths, shape)
    pairs = list(zip(table.first_W.tolist(), table.size_W.tolist(), strict=True))
    assert table.counts == [len(all_windows(length, shape)) for length in lengths]
    at = 0
    for length, count in zip(lengths, table.counts, strict=True):
        own, at = pairs[at : at + count], at + count
        assert sorted(own) == sorted(all_windows(length, shape))
        assert {frame for first, size in own for frame in range(first, first + size)} == set(range(length))


def test_means_and_spans_are_those_of_the_slices() -> None:
    lengths, starts = [5, 1, 9], [0, 5, 6, 15]
    y_QE = torch.randn(15, 3, dtype=torch.float64, requires_grad=True)
    table = WindowTable.build(lengths, SHAPE)
    mean_WE = table.mean(y_QE, starts)
    expected = [
        y_QE[start + first : start + first + size].mean(0)
        for length, start in zip(lengths, starts, strict=False)
        for first, size in all_windows(length, SHAPE)
    ]
    assert torch.allclose(mean_WE, torch.stack(expected), atol=1e-14)
    grads = [torch.autograd.grad(rows.square().sum(), y_QE)[0] for rows in (mean_WE, torch.stack(expected))]
    assert torch.allclose(grads[0], grads[1], atol=1e-14)
    last = len(table.first_W) - 1
    assert table.spans_s(torch.tensor([[0], [last]]), frame_seconds(2)).tolist() == [
        [[0.0, pytest.approx(0.08)]],
        [[pytest.approx(0.2), pytest.approx(0.36)]],
    ]


def make_clips(counts: list[int], num_columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    rows, cols = (torch.randn(n, 6, dtype=torch.float64, generator=generator) for n in (sum(counts), num_columns))
    return F.normalize(rows, dim=1).requires_grad_(), F.normalize(cols, dim=1).requires_grad_()


@pytest.mark.parametrize("budget", [1, 60, 1 << 24], ids=["chunk of one clip", "some", "one chunk"])
def test_best_window_equals_the_maximum_over_all_scores(budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(maxsim, "_MAX_SCORES", budget)
    counts = [3, 1, 20, 4, 4]
    rows_WE, cols_CE = make_clips(counts, 7)
    clips = WindowedClips(rows_WE, counts)
    plain_BC = torch.stack([scores.amax(0) for scores in (rows_WE @ cols_CE.T).split(counts)])
    ours_BC = clips.against(cols_CE)
    assert torch.allclose(ours_BC, plain_BC, atol=1e-15)
    weights_BC = torch.randn(5, 7, dtype=torch.float64)
    ours = torch.autograd.grad((ours_BC * weights_BC).sum(), (rows_WE, cols_CE))
    plain = torch.autograd.grad((plain_BC * weights_BC).sum(), (rows_WE, cols_CE), retain_graph=True)
    for one, other in zip(ours, plain, strict=True):
        assert torch.allclose(one, other, atol=1e-14)
        assert other.abs().max() > 0.1

    # Each clip with columns of its own: some of the same columns, in another order for each clip.
    chosen_BH = torch.stack([torch.randperm(7)[:3] for _ in counts])
    own_BH = clips.against_own(cols_CE[chosen_BH])
    assert torch.allclose(own_BH, plain_BC.gather(1, chosen_BH), atol=1e-14)
    one, other = (
        torch.autograd.grad(scores.square().sum(), (rows_WE, cols_CE), retain_graph=True)
        for scores in (own_BH, plain_BC.gather(1, chosen_BH))
    )
    assert all(torch.allclose(a, b, atol=1e-14) for a, b in zip(one, other, strict=True))
    starts = [0, 3, 4, 24, 28]
    for clip, (start, count) in enumerate(zip(starts, counts, strict=True)):
        winners = clips.winners(cols_CE[chosen_BH])[clip]
        assert ((winners >= start) & (winners < start + count)).all()


def test_no_clips_and_no_columns() -> None:
    cols_CE = make_clips([1], 4)[1]
    none = WindowedClips(torch.zeros(0, 6, dtype=torch.float64, requires_grad=True), [])
    scores_0C = none.against(cols_CE)
    assert scores_0C.shape == (0, 4)
    scores_0C.sum().backward()  # a rank without clips must still reach the gathered terms
    assert torch.equal(cols_CE.grad, torch.zeros_like(cols_CE))
    some = WindowedClips(make_clips([2], 1)[0], [2])
    assert some.against(cols_CE[:0]).shape == (1, 0)
    assert some.against_own(torch.zeros(1, 0, 6, dtype=torch.float64)).shape == (1, 0)


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"readout": "max"}, "readout: got 'max'"),
        ({"maxsim_windows": ()}, "maxsim_windows"),
        ({"maxsim_windows": (0, 2)}, "maxsim_windows"),
        ({"maxsim_windows": (4, 4)}, "maxsim_windows"),
        ({"maxsim_windows": (2, 4), "maxsim_stride": 5}, "maxsim_stride: got 5, allowed are 1 to 4"),
        ({"maxsim_stride": 0}, "maxsim_stride"),
    ],
)
def test_settings_that_cannot_be_are_told(changed: dict, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        ModelSettings(**changed).validate()
