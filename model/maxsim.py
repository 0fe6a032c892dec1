"""The maxsim read-out: a clip is many short windows of frames, and its score with a term is that of the best window.

    frames of a clip   0 1 2 3 4 5 6        sizes 2 and 4, stride 2
    windows            [0 1] [2 3] [4 5] [5 6]      the last one ends with the clip, wherever the stride falls
                       [0 1 2 3] [2 3 4 5] [3 4 5 6]

A mean over the whole clip mixes a term with all that is said around it; the best window can leave the rest out, and
tells where the term is. It is the late interaction of ColBERT (Khattab & Zaharia 2020) with pooled windows in place of
tokens on one side, and a single vector on the other.

Shapes: B clips, W windows of all clips one after another, C columns, H columns of each clip's own, Q packed frames,
E embedding, L windows of the longest clip of a chunk.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from model.logmel import HOP, SAMPLE_RATE

# Scores held at a time while the best windows are looked for (64 MiB in fp32).
_MAX_SCORES = 1 << 24


def frame_seconds(pool: int) -> float:
    """Time from one tower frame to the next: two 10 ms hops, times the tower's own pooling."""
    return 2 * HOP * pool / SAMPLE_RATE


@dataclass(frozen=True)
class WindowShape:
    """Sizes of the windows, and the distance between two of one size; all in tower frames."""

    sizes: tuple[int, ...]
    stride: int


@dataclass(frozen=True, eq=False)
class WindowTable:
    """Which frames each window averages: int64 [W] on the CPU, clip after clip."""

    counts: list[int]
    """Windows of each clip, at least 1."""
    first_W: Tensor
    """First frame, counted from the clip's start."""
    size_W: Tensor
    """Number of frames."""

    @classmethod
    def build(cls, lengths: Sequence[int], shape: WindowShape) -> "WindowTable":
        """`lengths`: frames of each clip. A clip shorter than every size gets one window, the whole of it."""
        tables = [_windows_of(length, shape) for length in lengths]
        first_W, size_W = (torch.cat([table[i] for table in tables]) for i in (0, 1))
        return cls([len(table[0]) for table in tables], first_W, size_W)

    def mean(self, y_QE: Tensor, cu_seqlens: Sequence[int]) -> Tensor:
        """Mean of each window's frames, [W, E]; `cu_seqlens` are the clips' first frames in the pack."""
        starts_B = torch.tensor(list(cu_seqlens[: len(self.counts)]))
        start_W = self.first_W + starts_B.repeat_interleave(torch.tensor(self.counts))
        offset_W = self.size_W.cumsum(0) - self.size_W
        within = torch.arange(int(self.size_W.sum())) - offset_W.repeat_interleave(self.size_W)
        frames = start_W.repeat_interleave(self.size_W) + within
        indices, offsets = (t.to(y_QE.device, non_blocking=True) for t in (frames, offset_W))
        # Sums within each window: differences of running sums would lose digits over a long pack.
        return F.embedding_bag(indices, y_QE, offsets, mode="mean")

    def spans_s(self, windows: Tensor, frame_s: float) -> Tensor:
        """(start, end) of these windows (any shape, indices into W) in seconds from their clip's start, [..., 2]."""
        windows = windows.cpu()
        first, size = self.first_W[windows], self.size_W[windows]
        return torch.stack([first, first + size], dim=-1) * frame_s


@lru_cache(maxsize=4096)  # clips of a batch share their lengths
def _windows_of(length: int, shape: WindowShape) -> tuple[Tensor, Tensor]:
    firsts, sizes = [], []
    for size in shape.sizes:
        if size > length:
            continue
        last = length - size
        own = [*range(0, last, shape.stride), last]
        firsts += own
        sizes += [size] * len(own)
    if not firsts:
        firsts, sizes = [0], [length]
    return torch.tensor(firsts), torch.tensor(sizes)


@dataclass(frozen=True, eq=False)
class WindowedClips:
    """The windows of some clips, as unit rows, and scores of whole clips with columns: the best window's cosine."""

    window_WE: Tensor
    counts: list[int]

    @property
    def num_clips(self) -> int:
        return len(self.counts)

    def against(self, cols_CE: Tensor) -> Tensor:
        """[B, C], fp32 (fp64 for fp64). The gradient goes through the winning window of each (clip, column) alone."""
        rows_WE, cols_CE = self._alike(cols_CE)
        with torch.autocast(rows_WE.device.type, enabled=False):
            return _BestWindow.apply(rows_WE, cols_CE, tuple(self.counts))

    def against_own(self, cols_BHE: Tensor) -> Tensor:
        """[B, H]: each clip with its own H columns; gradient as in `against`."""
        winner_BH = self.winners(cols_BHE)
        rows_WE, cols_BHE = self._alike(cols_BHE)
        return (rows_WE[winner_BH] * cols_BHE).sum(dim=2)

    @torch.no_grad()
    def winners(self, cols_BHE: Tensor) -> Tensor:
        """Index among all W of each clip's best window for each of its own columns, int64 [B, H]."""
        rows_WE, cols_BHE = self._alike(cols_BHE)
        winner_BH = torch.zeros(cols_BHE.shape[:2], dtype=torch.int64, device=rows_WE.device)
        for clips, index_bL in self._chunks(cols_BHE.shape[1] + rows_WE.shape[1]):
            scores_bLH = rows_WE[index_bL] @ cols_BHE[clips].transpose(1, 2)
            winner_BH[clips] = index_bL.gather(1, scores_bLH.argmax(dim=1))
        return winner_BH

    def _alike(self, cols: Tensor) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(torch.promote_types(self.window_WE.dtype, cols.dtype), torch.float32)
        return self.window_WE.to(dtype), cols.to(dtype)

    def _chunks(self, width: int) -> Iterator[tuple[Tensor, Tensor]]:
        return _clip_chunks(self.counts, width, self.window_WE.device)


def _clip_chunks(counts: Sequence[int], width: int, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """(clips [b], their windows [b, L]) of clips of like length, so that b * L * width stays within _MAX_SCORES.

    A shorter clip repeats its last window, which no maximum minds.
    """
    starts = [0, *accumulate(counts)]
    order = sorted(range(len(counts)), key=lambda clip: counts[clip])
    at = 0
    while at < len(order):
        stop = at + 1
        while (
            stop < len(order)
            and (stop + 1 - at) * counts[order[stop]] * width <= _MAX_SCORES
            and counts[order[stop]] <= 1.25 * counts[order[at]] + 8
        ):
            stop += 1
        chosen = order[at:stop]
        count_b = torch.tensor([counts[clip] for clip in chosen])
        index_bL = torch.arange(int(count_b.max())).expand(len(chosen), -1)
        index_bL = torch.tensor([starts[clip] for clip in chosen])[:, None] + index_bL.minimum(count_b[:, None] - 1)
        yield torch.tensor(chosen, device=device), index_bL.to(device, non_blocking=True)
        at = stop


class _BestWindow(torch.autograd.Function):
    """[W, E] x [C, E] -> [B, C] without ever holding the [W, C] scores of all windows, forward or backward."""

    @staticmethod
    def forward(ctx: Any, rows_WE: Tensor, cols_CE: Tensor, counts: tuple[int, ...]) -> Tensor:
        num_columns = cols_CE.shape[0]
        best_BC = rows_WE.new_zeros(len(counts), num_columns)
        winner_BC = torch.zeros(len(counts), num_columns, dtype=torch.int64, device=rows_WE.device)
        step = max(1024, _MAX_SCORES // max(1, max(counts, default=1)))
        for start in range(0, num_columns, step):
            part_CE = cols_CE[start : start + step]
            for clips, index_bL in _clip_chunks(counts, len(part_CE), rows_WE.device):
                scores_bLC = (rows_WE[index_bL.flatten()] @ part_CE.T).view(*index_bL.shape, -1)
                best_bC, place_bC = scores_bLC.max(dim=1)
                best_BC[clips, start : start + step] = best_bC
                winner_BC[clips, start : start + step] = index_bL.gather(1, place_bC)
        ctx.save_for_backward(rows_WE, cols_CE, winner_BC)
        ctx.counts = counts
        return best_BC

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad_BC: Tensor) -> tuple[Tensor | None, ...]:
        rows_WE, cols_CE, winner_BC = ctx.saved_tensors
        grad_rows_WE, grad_cols_CE = torch.zeros_like(rows_WE), torch.zeros_like(cols_CE)
        starts = [0, *accumulate(ctx.counts)]
        clip = 0
        while clip < len(ctx.counts):
            stop = clip + 1
            while stop < len(ctx.counts) and (starts[stop + 1] - starts[clip]) * cols_CE.shape[0] <= _MAX_SCORES:
                stop += 1
            first, last = starts[clip], starts[stop]
            # Windows of different clips never meet, so each entry is written once.
            grad_wC = grad_BC.new_zeros(last - first, cols_CE.shape[0])
            grad_wC.scatter_(0, winner_BC[clip:stop] - first, grad_BC[clip:stop])
            grad_rows_WE[first:last] = grad_wC @ cols_CE
            grad_cols_CE += grad_wC.T @ rows_WE[first:last]
            clip = stop
        return grad_rows_WE, grad_cols_CE, None
