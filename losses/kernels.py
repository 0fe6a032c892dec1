"""Triton kernels of the tiled InfoNCE (losses/tiled.py says what they compute, and is their reference).

  tile_sums         one tile of scores -> its rows' and its columns' log-sum-exps; a small sum over tiles follows
  tile_gradient     one tile of scores again -> G = d loss / d scores, bf16, into a panel of PANEL x PANEL that stays in
                    the cache, where two matrix products of the library add it to d rows and d cols

Products run on the tensor cores in bf16 with fp32 sums. bf16 embeddings go in as they are. Those of fp32 are split,
x = high + low (two bf16, 16 bits of mantissa), and a score is high high + low high + high low: its error is about 2^-17
of the terms' size, where bf16 alone would give 2^-9, too much once divided by the temperature, and where tf32's three
products would cost twice as much. G, which is already the difference of softmax and target, is rounded once to bf16,
and its products take the high parts: 2^-9 of each *term* of a gradient, not of the loss.

While 2 / temperature is below 69 (temperature 0.029 for unit rows), exp(score - 1 / temperature) can neither overflow
nor vanish, so one exponential serves rows and columns and no maximum is searched for. Otherwise each direction has its
own. The choice is made on the device: nothing here waits for it.

Works from compute capability 8.0 (A100). `TRITON_INTERPRET=1` runs the kernels on the CPU, for tests.

Shapes: R rows, C columns, E embedding (padded to a multiple of 64), P pairs.
"""

import triton
import triton.language as tl

TILE_ROWS, TILE = 64, 128  # rows and columns of a tile, which are also the places that pairs are sorted by
STEP = 64  # of the embedding's width
# The one way in which all kernels here are launched, as nothing is to be tuned before the first step. Taller tiles read
# less, but with 128 rows the gradient's kernel fills all 255 registers of a thread and half of the warps; so, it takes
# 128 of them on compute capability 8.0 and 9.0 alike, spills none, and two tiles share a processor: one multiplies
# while the other takes exponentials. Buffers are 72 KiB a tile.
LAUNCH = {"BM": TILE_ROWS, "BN": TILE, "BK": STEP, "GROUP": 16, "num_warps": 8, "num_stages": 3}
PANEL = 4096  # 32 MiB of G in bf16
LOG2E = 1.4426950408889634
FAST = 50.0  # twice this, as an exponent of 2, is well inside of fp32


@triton.jit
def tile_scores(
    a_ptr, b_ptr, rows, cols, a_stride, b_stride,
    E: tl.constexpr, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """[BM, BN] fp32 products of rows of a and b (bf16, [high | low] where split). rows, cols are within bounds."""
    within = tl.arange(0, BK)
    a_ptrs = a_ptr + rows.to(tl.int64)[:, None] * a_stride + within[None, :]
    b_ptrs = b_ptr + cols.to(tl.int64)[:, None] * b_stride + within[None, :]
    STEPS: tl.constexpr = E // BK
    acc = tl.zeros((rows.shape[0], cols.shape[0]), dtype=tl.float32)
    for step in range(0, STEPS * (1 + SPLIT_A + SPLIT_B)):
        part = step // STEPS  # 0: high high; 1: low high (if a is split); the last: high low (if b is)
        at = (step % STEPS) * BK
        a_at = at
        b_at = at
        if SPLIT_A:
            a_at += tl.where(part == 1, E, 0)
        if SPLIT_B:
            b_at += tl.where(part == 1 + SPLIT_A, E, 0)
        a = tl.load(a_ptrs + a_at)
        b = tl.load(b_ptrs + b_at)
        acc = tl.dot(a, tl.trans(b), acc)
    return acc


@triton.jit
def at_pairs(
    tile, rows, cols, starts_ptr, pair_row_ptr, pair_col_ptr, value_ptr, at,
    ADD: tl.constexpr, fill,
):  # fmt: skip
    """The tile with `fill` at the pairs in it, or with their values added. `at`: its place."""
    p = tl.load(starts_ptr + at)
    last = tl.load(starts_ptr + at + 1)
    while p < last:
        here = (rows == tl.load(pair_row_ptr + p))[:, None] & (cols == tl.load(pair_col_ptr + p))[None, :]
        if ADD:
            tile = tl.where(here, tile + tl.load(value_ptr + p), tile)
        else:
            tile = tl.where(here, fill, tile)
        p += 1
    return tile


@triton.jit
def tile_of(program, num_row_tiles, num_col_tiles, GROUP: tl.constexpr):
    """(row tile, column tile): GROUP row tiles share a column tile before the next one, which the cache then serves."""
    in_group = GROUP * num_col_tiles
    first = (program // in_group) * GROUP
    height = tl.minimum(num_row_tiles - first, GROUP)
    return first + (program % in_group) % height, (program % in_group) // height


@triton.jit
def tile_sums(
    a_ptr, b_ptr, scale_ptr, reach_ptr, row_bias_ptr, col_bias_ptr, starts_ptr, pair_row_ptr, pair_col_ptr,
    row_part_ptr, col_part_ptr, num_rows, num_cols, a_stride, b_stride,
    E: tl.constexpr, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, SYMMETRIC: tl.constexpr, PAIRS: tl.constexpr,
    FAST: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_of(tl.program_id(0), tl.cdiv(num_rows, BM), tl.cdiv(num_cols, BN), GROUP)
    rows = row_tile * BM + tl.arange(0, BM)
    cols = col_tile * BN + tl.arange(0, BN)
    score = tile_scores(
        a_ptr, b_ptr, tl.minimum(rows, num_rows - 1), tl.minimum(cols, num_cols - 1), a_stride, b_stride,
        E, SPLIT_A, SPLIT_B, BK,
    )  # fmt: skip
    score = score * tl.load(scale_ptr)  # logarithms are to base 2 throughout
    reach = tl.load(reach_ptr)
    col_bias = tl.load(col_bias_ptr + cols, mask=cols < num_cols, other=-float("inf"))
    at = row_tile * tl.cdiv(num_cols, BN) + col_tile
    if SYMMETRIC:
        row_bias = tl.load(row_bias_ptr + rows, mask=rows < num_rows, other=-float("inf"))
    if reach < FAST:
        p = tl.exp2(score - reach)
        if PAIRS:
            p = at_pairs(p, rows, cols, starts_ptr, pair_row_ptr, pair_col_ptr, starts_ptr, at, False, 0.0)
        row_lse = reach + tl.log2(tl.sum(p * tl.exp2(col_bias)[None, :], axis=1))
        tl.store(row_part_ptr + col_tile * num_rows + rows, row_lse, mask=rows < num_rows)
        if SYMMETRIC:
            col_lse = reach + tl.log2(tl.sum(p * tl.exp2(row_bias)[:, None], axis=0))
            tl.store(col_part_ptr + row_tile * num_cols + cols, col_lse, mask=cols < num_cols)
    else:
        if PAIRS:
            score = at_pairs(
                score, rows, cols, starts_ptr, pair_row_ptr, pair_col_ptr, starts_ptr, at, False, -float("inf")
            )
        biased = score + col_bias[None, :]
        top = tl.max(biased, axis=1)
        top = tl.where(top == -float("inf"), 0.0, top)
        row_lse = top + tl.log2(tl.sum(tl.exp2(biased - top[:, None]), axis=1))
        tl.store(row_part_ptr + col_tile * num_rows + rows, row_lse, mask=rows < num_rows)
        if SYMMETRIC:
            biased = score + row_bias[:, None]
            col_top = tl.max(biased, axis=0)
            col_top = tl.where(col_top == -float("inf"), 0.0, col_top)
            col_lse = col_top + tl.log2(tl.sum(tl.exp2(biased - col_top[None, :]), axis=0))
            tl.store(col_part_ptr + row_tile * num_cols + cols, col_lse, mask=cols < num_cols)


@triton.jit
def tile_gradient(
    a_ptr, b_ptr, g_ptr, scale_ptr, reach_ptr,
    row_bias_ptr, col_bias_ptr, row_lse_ptr, col_lse_ptr, d_row_ptr, d_col_ptr,
    starts_ptr, pair_row_ptr, pair_col_ptr, pos_starts_ptr, pos_row_ptr, pos_col_ptr, pos_value_ptr,
    row_key_ptr, col_key_ptr, row_pull_ptr, col_pull_ptr,
    row_start, col_start, row_stop, col_stop, num_cols, a_stride, b_stride, g_stride,
    E: tl.constexpr, SPLIT_A: tl.constexpr, SPLIT_B: tl.constexpr, SYMMETRIC: tl.constexpr, PAIRS: tl.constexpr,
    POSITIVES: tl.constexpr, KEYS: tl.constexpr, FAST: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    row_tile, col_tile = tile_of(
        tl.program_id(0), tl.cdiv(row_stop - row_start, BM), tl.cdiv(col_stop - col_start, BN), GROUP
    )
    rows = row_start + row_tile * BM + tl.arange(0, BM)
    cols = col_start + col_tile * BN + tl.arange(0, BN)
    row_ok = rows < row_stop
    col_ok = cols < col_stop
    score = tile_scores(
        a_ptr, b_ptr, tl.minimum(rows, row_stop - 1), tl.minimum(cols, col_stop - 1), a_stride, b_stride,
        E, SPLIT_A, SPLIT_B, BK,
    )  # fmt: skip
    score = score * tl.load(scale_ptr)
    reach = tl.load(reach_ptr)
    NONE: tl.constexpr = -float("inf")
    col_bias = tl.load(col_bias_ptr + cols, mask=col_ok, other=NONE)
    row_lse = tl.load(row_lse_ptr + rows, mask=row_ok, other=float("inf"))
    d_row = tl.load(d_row_ptr + rows, mask=row_ok, other=0.0)
    if SYMMETRIC:
        row_bias = tl.load(row_bias_ptr + rows, mask=row_ok, other=NONE)
        col_lse = tl.load(col_lse_ptr + cols, mask=col_ok, other=float("inf"))
        d_col = tl.load(d_col_ptr + cols, mask=col_ok, other=0.0)
    if reach < FAST:
        g = (d_row * tl.exp2(reach - row_lse))[:, None] * tl.exp2(col_bias)[None, :]
        if SYMMETRIC:
            g += (d_col * tl.exp2(reach - col_lse))[None, :] * tl.exp2(row_bias)[:, None]
        g = g * tl.exp2(score - reach)
    else:
        g = d_row[:, None] * tl.exp2(score + col_bias[None, :] - row_lse[:, None])
        if SYMMETRIC:
            g += d_col[None, :] * tl.exp2(score + row_bias[:, None] - col_lse[None, :])
    at = (row_start // BM + row_tile) * tl.cdiv(num_cols, BN) + col_start // BN + col_tile
    if PAIRS:
        g = at_pairs(g, rows, cols, starts_ptr, pair_row_ptr, pair_col_ptr, starts_ptr, at, False, 0.0)
    if KEYS:
        row_key = tl.load(row_key_ptr + rows, mask=row_ok, other=-1)
        col_key = tl.load(col_key_ptr + cols, mask=col_ok, other=-2)
        pull = tl.load(row_pull_ptr + rows, mask=row_ok, other=0.0)[:, None]
        if SYMMETRIC:
            pull = pull + tl.load(col_pull_ptr + cols, mask=col_ok, other=0.0)[None, :]
        g += tl.where((row_key[:, None] == col_key[None, :]) & (row_key >= 0)[:, None], pull, 0.0)
    if POSITIVES:
        g = at_pairs(g, rows, cols, pos_starts_ptr, pos_row_ptr, pos_col_ptr, pos_value_ptr, at, True, 0.0)
    places = (rows - row_start)[:, None] * g_stride + (cols - col_start)[None, :]  # a panel's: far below 2^31
    tl.store(g_ptr + places, g.to(g_ptr.dtype.element_ty), mask=row_ok[:, None] & col_ok[None, :])
