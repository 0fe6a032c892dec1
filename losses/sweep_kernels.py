"""Triton kernels of the sweep over a bank (losses/sweep.py is their reference).

  bank_tile     a tile of cosines -> the candidates' exponentials (bf16, into the chunk that the library then multiplies
                with the bank), their sum, and the highest candidate among each row's TILE columns
  rescore       cosines of each row with the tiles that hold its highest candidates, once more

The k highest of a row lie in the k tiles with the highest maxima, so only those are looked at again: k * TILE numbers a
row instead of the whole bank.

Exponentials are taken against a fixed reference per row, 60 powers of e below the row's largest possible score, which
is its limit. Nothing overflows, and a candidate is lost only if it is 147 powers of e below the limit: with temperature
0.07 cosines span 29 powers in all, and at 0.01, the least allowed, that is a cosine 1.47 below.
"""

import triton
import triton.language as tl

from losses.kernels import at_pairs, tile_of, tile_scores


@triton.jit
def bank_tile(
    a_ptr, b_ptr, p_ptr, top_ptr, sum_ptr, scale_ptr, limit_ptr, reference_ptr, is_out_ptr,
    starts_ptr, pair_row_ptr, pair_col_ptr,
    col_start, col_stop, num_rows, num_cols, a_stride, b_stride, p_stride, top_stride,
    E: tl.constexpr, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, SUMS: tl.constexpr, TOPS: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, BM), tl.cdiv(col_stop - col_start, BN), GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    near = col_tile * BN + tl.arange(0, BN)  # counted from the chunk's first
    cols = col_start + near
    row_ok = rows < num_rows
    col_ok = cols < col_stop
    # b begins at the chunk.
    cosine = tile_scores(
        a_ptr, b_ptr, tl.minimum(rows, num_rows - 1), tl.minimum(near, col_stop - col_start - 1), a_stride, b_stride,
        E, SPLIT_A, SPLIT_B, BK,
    )  # fmt: skip
    limit = tl.load(limit_ptr + rows, mask=row_ok, other=-float("inf"))
    is_out = tl.load(is_out_ptr + cols, mask=col_ok, other=1)
    cosine = tl.where((cosine <= limit[:, None]) & (is_out == 0)[None, :], cosine, -float("inf"))
    at = row_tile * tl.cdiv(num_cols, BN) + col_start // BN + col_tile
    cosine = at_pairs(cosine, rows, cols, starts_ptr, pair_row_ptr, pair_col_ptr, starts_ptr, at, False, -float("inf"))
    if TOPS:
        tl.store(
            top_ptr + rows.to(tl.int64) * top_stride + col_start // BN + col_tile, tl.max(cosine, axis=1), mask=row_ok
        )
    if SUMS:
        reference = tl.load(reference_ptr + rows, mask=row_ok, other=0.0)
        p = tl.exp2(cosine * tl.load(scale_ptr) - reference[:, None])
        tl.store(sum_ptr + col_tile * num_rows + rows, tl.sum(p, axis=1), mask=row_ok)
        places = rows.to(tl.int64)[:, None] * p_stride + near[None, :]
        tl.store(p_ptr + places, p.to(p_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])


@triton.jit
def rescore(
    a_ptr, b_ptr, tile_ptr, limit_ptr, is_out_ptr, left_start_ptr, left_entry_ptr, out_ptr,
    num_cols, a_stride, b_stride, num_tiles,
    E: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    place = tl.program_id(1)
    tile = tl.load(tile_ptr + row * num_tiles + place)
    cols = tile * BN + tl.arange(0, BN)
    col_ok = cols < num_cols
    safe = tl.minimum(cols, num_cols - 1).to(tl.int64)
    within = tl.arange(0, BK)
    sums = tl.zeros((BN,), dtype=tl.float32)
    for at in range(0, E, BK):
        k_ok = at + within < E
        a = tl.load(a_ptr + row.to(tl.int64) * a_stride + at + within, mask=k_ok, other=0.0).to(tl.float32)
        b = tl.load(b_ptr + safe[:, None] * b_stride + at + within[None, :], mask=k_ok[None, :], other=0.0)
        sums += tl.sum(b.to(tl.float32) * a[None, :], axis=1)
    is_out = tl.load(is_out_ptr + cols, mask=col_ok, other=1)
    sums = tl.where((sums <= tl.load(limit_ptr + row)) & (is_out == 0), sums, -float("inf"))
    p = tl.load(left_start_ptr + row)
    last = tl.load(left_start_ptr + row + 1)
    while p < last:
        sums = tl.where(cols == tl.load(left_entry_ptr + p), -float("inf"), sums)
        p += 1
    tl.store(out_ptr + (row * num_tiles + place) * BN + tl.arange(0, BN), sums)
