"""The tiled InfoNCE on the GPU: launches the kernels of losses/kernels.py over all tiles.

Nothing here waits for the device or depends on what a tensor holds, so a CUDA graph can capture it (after one call that
compiles the kernels).

Shapes: R rows, C columns, E embedding, P pairs, S places (tiles).
"""

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from losses import kernels
from losses.kernels import FAST, LAUNCH, LOG2E, PANEL, STEP, TILE, TILE_ROWS
from losses.pairs import Pairs
from losses.tiled import Match, Slopes

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


@dataclass(frozen=True)
class Operand:
    """Embeddings as the tensor cores take them: bf16 [R, E'], or [R, 2 E'] = high | low; E' a multiple of STEP."""

    data: Tensor
    width: int
    is_split: bool

    @classmethod
    def of(cls, x_RE: Tensor) -> "Operand":
        """bf16 of a fitting width is taken as it is; everything else is copied. fp64 is refused: nothing is rounded
        that far without being asked."""
        if x_RE.dtype == torch.float64:
            raise ValueError("embeddings are float64; allowed in the Triton kernels: bfloat16, float16, float32")
        width = triton.cdiv(x_RE.shape[1], STEP) * STEP
        padding = width - x_RE.shape[1]
        if x_RE.dtype == torch.bfloat16:
            return cls(_carried(F.pad(x_RE, (0, padding)) if padding else x_RE.contiguous()), width, False)
        data = x_RE.new_zeros(x_RE.shape[0], 2 * width, dtype=torch.bfloat16)
        high_RE = data[:, : x_RE.shape[1]]
        high_RE.copy_(x_RE)
        data[:, width : width + x_RE.shape[1]].copy_(x_RE - high_RE)
        return cls(_carried(data), width, True)

    def high(self, rows: slice, dim: int) -> Tensor:
        return self.data[rows, :dim]


def _carried(data: Tensor) -> Tensor:
    """The interpreter multiplies bf16 as if it were integers; the same values in fp32 it multiplies right."""
    return data.float() if INTERPRETED else data


@dataclass(frozen=True)
class TileIndex:
    """Pairs sorted by the tile they fall into, and where each tile's begin."""

    starts_S: Tensor  # int32, two more than there are tiles
    row_P: Tensor  # int32
    col_P: Tensor
    order_P: Tensor

    @classmethod
    def of(cls, pairs: Pairs, num_rows: int, num_cols: int) -> "TileIndex":
        across, down = triton.cdiv(num_cols, TILE), triton.cdiv(num_rows, TILE_ROWS)
        tile_P = (pairs.row_P // TILE_ROWS) * across + pairs.col_P // TILE
        tile_P, order_P = tile_P.masked_fill(pairs.row_P < 0, across * down).sort(stable=True)
        tiles_S = torch.arange(across * down + 2, device=tile_P.device)
        starts_S = torch.searchsorted(tile_P, tiles_S, out_int32=True)
        # A launch may read one place further than there are tiles, and padding belongs to none.
        starts_S[-1:] = starts_S[-2:-1]
        return cls(starts_S, pairs.row_P[order_P].int(), pairs.col_P[order_P].int(), order_P)


def launch(kernel: Any, num_rows: int, num_cols: int, *args: Any, **constants: Any) -> None:
    """One program a tile."""
    kernel[(triton.cdiv(num_rows, TILE_ROWS) * triton.cdiv(num_cols, TILE),)](*args, **constants, **LAUNCH)


def reach_of(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor) -> Tensor:
    """No score is further from 0 than this, to base 2; a scalar on the device."""
    longest = [torch.linalg.vector_norm(x, dim=1, dtype=torch.float32).amax() for x in (rows_RE, cols_CE)]
    return longest[0] * longest[1] * inv_t.abs() * (LOG2E * 1.001)


@dataclass(frozen=True)
class Tiles:
    """What both passes need, made once."""

    reach: Tensor
    ignored: TileIndex | None
    positives: TileIndex | None


def log_sum_exps(rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor, match: Match) -> tuple[Tensor, Tensor, Tiles | None]:
    """(of each row, of each column: empty unless symmetric; tiles for `gradients`). -inf: nothing is in the sum."""
    num_rows, num_cols = rows_RE.shape[0], cols_CE.shape[0]
    if num_rows == 0 or num_cols == 0:
        return (
            inv_t.new_full((num_rows,), -torch.inf),
            inv_t.new_full((num_cols * match.is_symmetric,), -torch.inf),
            None,
        )
    a, b = Operand.of(rows_RE), Operand.of(cols_CE)
    tiles = Tiles(
        reach_of(rows_RE, cols_CE, inv_t),
        None if match.ignored is None else TileIndex.of(match.ignored, num_rows, num_cols),
        None if match.positives is None else TileIndex.of(match.positives, num_rows, num_cols),
    )
    across, down = triton.cdiv(num_cols, TILE), triton.cdiv(num_rows, TILE_ROWS)
    row_part_SR = inv_t.new_full((across, num_rows), -torch.inf)
    col_part_SC = inv_t.new_full((down, num_cols) if match.is_symmetric else (1,), -torch.inf)
    launch(
        kernels.tile_sums,
        num_rows, num_cols,
        a.data, b.data, inv_t * LOG2E, tiles.reach, *_biases(match), *_pair_args(tiles.ignored, tiles.reach),
        row_part_SR, col_part_SC, num_rows, num_cols, a.data.stride(0), b.data.stride(0),
        E=a.width, SPLIT_A=a.is_split, SPLIT_B=b.is_split, SYMMETRIC=match.is_symmetric,
        PAIRS=tiles.ignored is not None, FAST=FAST,
    )  # fmt: skip
    row_lse_R = row_part_SR.div_(LOG2E).logsumexp(dim=0)
    return row_lse_R, col_part_SC.div_(LOG2E).logsumexp(dim=0) if match.is_symmetric else col_part_SC[:0], tiles


def gradients(
    rows_RE: Tensor, cols_CE: Tensor, inv_t: Tensor, match: Match, slopes: Slopes, tiles: Tiles | None
) -> tuple[Tensor, Tensor, Tensor]:
    """(d rows, d cols, sum over the matrix of d score * score), the first two in the inputs' dtypes."""
    d_rows_RE, total = torch.zeros_like(rows_RE), inv_t.new_zeros(())
    if tiles is None:
        return d_rows_RE, torch.zeros_like(cols_CE), total
    (num_rows, dim), num_cols = rows_RE.shape, cols_CE.shape[0]
    a, b = Operand.of(rows_RE), Operand.of(cols_CE)
    height, width = min(PANEL, num_rows), min(PANEL, num_cols)
    g_dtype = torch.float32 if INTERPRETED else torch.bfloat16  # the interpreter would cut, not round
    g_panel = torch.empty(height * triton.cdiv(width, 8) * 8, dtype=g_dtype, device=rows_RE.device)
    d_rows_SE = inv_t.new_empty(height, dim)
    d_cols_CE = inv_t.new_empty(num_cols, dim)
    unused = tiles.reach
    pair_args = [*_pair_args(tiles.ignored, unused), *_pair_args(tiles.positives, unused)]
    values_P = unused if tiles.positives is None else slopes.of_pairs(match)[tiles.positives.order_P].contiguous()
    key_args = [unused] * 4
    if match.row_key_R is not None and match.col_key_C is not None:
        key_args = [match.row_key_R, match.col_key_C, *slopes.of_keys(match)]
    vectors = [slopes.row_lse_R * LOG2E, slopes.col_lse_C * LOG2E, slopes.d_row_lse_R, slopes.d_col_lse_C]
    vectors = [x.contiguous() if x.numel() else unused for x in vectors]
    scale = inv_t * LOG2E
    for top in range(0, num_rows, height):
        rows = slice(top, min(top + height, num_rows))
        for left in range(0, num_cols, width):
            cols = slice(left, min(left + width, num_cols))
            tall, wide = rows.stop - rows.start, cols.stop - cols.start
            pitch = triton.cdiv(wide, 8) * 8  # the products want rows that begin at 16 bytes
            g = g_panel[: tall * pitch].view(tall, pitch)
            launch(
                kernels.tile_gradient,
                tall, wide,
                a.data, b.data, g, scale, tiles.reach, *_biases(match), *vectors, *pair_args, values_P, *key_args,
                rows.start, cols.start, rows.stop, cols.stop, num_cols, a.data.stride(0), b.data.stride(0), pitch,
                E=a.width, SPLIT_A=a.is_split, SPLIT_B=b.is_split, SYMMETRIC=match.is_symmetric,
                PAIRS=tiles.ignored is not None, POSITIVES=tiles.positives is not None,
                KEYS=match.row_key_R is not None, FAST=FAST,
            )  # fmt: skip
            g = g[:, :wide]
            add_product(d_rows_SE[:tall], g, b.high(cols, dim), is_first=left == 0)
            add_product(d_cols_CE[cols], g.T, a.high(rows, dim), is_first=top == 0)
        d_rows_SE[:tall].mul_(inv_t)
        total += (d_rows_SE[:tall] * rows_RE[rows]).sum()
        d_rows_RE[rows].copy_(d_rows_SE[:tall])
    return d_rows_RE, d_cols_CE.mul_(inv_t).to(cols_CE.dtype), total


def add_product(sum_MN: Tensor, a_MK: Tensor, b_KN: Tensor, is_first: bool) -> None:
    """sum += a b (the first time: sum = a b), bf16 products with fp32 sums, in place."""
    if not sum_MN.is_cuda:  # the interpreter's
        product_MN = a_MK.float() @ b_KN.float()
        sum_MN.copy_(product_MN if is_first else sum_MN + product_MN)
    elif is_first:
        torch.mm(a_MK, b_KN, out_dtype=torch.float32, out=sum_MN)
    else:
        torch.addmm(sum_MN, a_MK, b_KN, out_dtype=torch.float32, out=sum_MN)


def _biases(match: Match) -> list[Tensor]:
    col_bias_C = match.col_bias_C.float() * LOG2E
    return [col_bias_C if match.row_bias_R is None else match.row_bias_R.float() * LOG2E, col_bias_C]


def _pair_args(index: TileIndex | None, unused: Tensor) -> list[Tensor]:
    return [unused] * 3 if index is None else [index.starts_S, index.row_P, index.col_P]
