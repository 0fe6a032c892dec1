"""Triton kernels of attention within packed sequences; `model.tile_attention` says what they are for and launches them.

A program holds TILE rows of the pack, which may be the end of one sequence, many whole ones and the start of another,
and walks over the rows that any of them may see, STEP at a time. Row r sees the rows from `first[r]` to `last[r]`
(excluded), its sequence or the part of it up to r, so that the mask is two comparisons and nothing is looked up for a
column. Head vectors are kept as two halves, which is how rotary positions pair their elements.

Scores and sums are fp32; the probabilities, and the slopes of the scores, are rounded to the inputs' dtype before they
are multiplied, as in every flash attention. Nothing is accumulated over programs, so that results repeat bit by bit.

Names: M the tile's rows, N a step's rows, C half a head, V a whole head (both filled up to a power of two).
"""

import triton
import triton.language as tl

_UNSEEN = tl.constexpr(-1.0e30)  # a running maximum before any score: finite, so that its exponential never is NaN


@triton.jit
def _spans(owner_ptr, cu_ptr, start, num_rows, ROWS: tl.constexpr):
    """The sequences of ROWS rows from `start`: first row and row after the last, of each row [ROWS] and of them all.

    Rows beyond the pack repeat its last row's.
    """
    rows_M = tl.minimum(start + tl.arange(0, ROWS), num_rows - 1)
    owner_M = tl.load(owner_ptr + rows_M)
    begin_M = tl.load(cu_ptr + owner_M)
    end_M = tl.load(cu_ptr + owner_M + 1)
    begin = tl.load(cu_ptr + tl.load(owner_ptr + start))
    end = tl.load(cu_ptr + tl.load(owner_ptr + tl.minimum(start + ROWS, num_rows) - 1) + 1)
    return rows_M, begin_M, end_M, begin, end


@triton.jit
def _at(pointer, start, stride, rows_M, columns_C):
    """Addresses [M, C] of the rows `start` + rows_M: 64-bit for the start alone."""
    return pointer + tl.cast(start, tl.int64) * stride + rows_M[:, None] * stride + columns_C[None, :]


@triton.jit
def _load_turns(place_ptr, cos_ptr, sin_ptr, rows_M, ok_M, columns_C, HALF: tl.constexpr):
    """fp32 cosines and sines [M, C] of the rows' places in their sequences."""
    place_M = tl.load(place_ptr + rows_M, mask=ok_M, other=0)
    at_MC = place_M[:, None] * (2 * HALF) + columns_C[None, :]
    ok_MC = ok_M[:, None] & (columns_C < HALF)[None, :]
    cos_MC = tl.load(cos_ptr + at_MC, mask=ok_MC, other=1.0).to(tl.float32)
    sin_MC = tl.load(sin_ptr + at_MC, mask=ok_MC, other=0.0).to(tl.float32)
    return cos_MC, sin_MC


@triton.jit
def _load_halves(
    pointer, stride, place_ptr, cos_ptr, sin_ptr, start, count,
    HALF: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Both halves [ROWS, C] of the head vectors of ROWS rows from `start`, of which `count` exist, turned if ROTARY."""
    rows_M = tl.arange(0, ROWS)
    columns_C = tl.arange(0, C)
    ok_M = rows_M < count
    ok_MC = ok_M[:, None] & (columns_C < HALF)[None, :]
    at_MC = _at(pointer, start, stride, rows_M, columns_C)
    low_MC = tl.load(at_MC, mask=ok_MC, other=0.0)
    high_MC = tl.load(at_MC + HALF, mask=ok_MC, other=0.0)
    if ROTARY:
        cos_MC, sin_MC = _load_turns(place_ptr + start, cos_ptr, sin_ptr, rows_M, ok_M, columns_C, HALF)
        turned_MC = (low_MC * cos_MC - high_MC * sin_MC).to(low_MC.dtype)
        high_MC = (high_MC * cos_MC + low_MC * sin_MC).to(low_MC.dtype)
        low_MC = turned_MC
    return low_MC, high_MC


@triton.jit
def _store_halves(
    low_MC, high_MC, pointer, stride, place_ptr, cos_ptr, sin_ptr, start, count,
    HALF: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """The gradient's way back through `_load_halves`: fp32 halves turned the other way and stored."""
    rows_M = tl.arange(0, ROWS)
    columns_C = tl.arange(0, C)
    ok_M = rows_M < count
    if ROTARY:
        cos_MC, sin_MC = _load_turns(place_ptr + start, cos_ptr, sin_ptr, rows_M, ok_M, columns_C, HALF)
        turned_MC = low_MC * cos_MC + high_MC * sin_MC
        high_MC = high_MC * cos_MC - low_MC * sin_MC
        low_MC = turned_MC
    ok_MC = ok_M[:, None] & (columns_C < HALF)[None, :]
    at_MC = _at(pointer, start, stride, rows_M, columns_C)
    tl.store(at_MC, low_MC.to(pointer.dtype.element_ty), mask=ok_MC)
    tl.store(at_MC + HALF, high_MC.to(pointer.dtype.element_ty), mask=ok_MC)


@triton.jit
def _load_whole(pointer, stride, start, count, HEAD: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr):
    """Head vectors [ROWS, V] of ROWS rows from `start`, of which `count` exist."""
    rows_M = tl.arange(0, ROWS)
    columns_V = tl.arange(0, V)
    ok_MV = (rows_M < count)[:, None] & (columns_V < HEAD)[None, :]
    return tl.load(_at(pointer, start, stride, rows_M, columns_V), mask=ok_MV, other=0.0)


@triton.jit
def _store_whole(x_MV, pointer, stride, start, count, HEAD: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr):
    rows_M = tl.arange(0, ROWS)
    columns_V = tl.arange(0, V)
    ok_MV = (rows_M < count)[:, None] & (columns_V < HEAD)[None, :]
    tl.store(_at(pointer, start, stride, rows_M, columns_V), x_MV.to(pointer.dtype.element_ty), mask=ok_MV)


@triton.jit
def _products(a_low_MC, a_high_MC, b_low_NC, b_high_NC):
    """Inner products [M, N] of the rows of a and of b. fp32 inputs are multiplied as fp32, never as tf32."""
    partial_MN = tl.dot(a_low_MC, tl.trans(b_low_NC), input_precision="ieee")
    return tl.dot(a_high_MC, tl.trans(b_high_NC), partial_MN, input_precision="ieee")


@triton.jit(do_not_specialize=["num_rows"])
def forward_kernel(
    qkv_ptr, out_ptr, lse_ptr, owner_ptr, place_ptr, cu_ptr, cos_ptr, sin_ptr, num_rows, stride, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """out[r] = sum over the keys n that r sees of softmax(q[r] k[n] / sqrt(HEAD)) v[n], and each row's log2-sum-exp2.

    Grid: (NUM_HEADS, tiles). `stride` is the distance between rows of qkv; GROUP query heads share a key head.
    """
    HALF: tl.constexpr = HEAD // 2
    V: tl.constexpr = 2 * C
    head = tl.program_id(0)
    start = tl.program_id(1) * TILE
    count = tl.minimum(num_rows - start, TILE)
    key_ptr = qkv_ptr + (NUM_HEADS + head // GROUP) * HEAD
    value_ptr = key_ptr + (NUM_HEADS // GROUP) * HEAD
    rows_M, first_M, last_M, begin, end = _spans(owner_ptr, cu_ptr, start, num_rows, TILE)
    if CAUSAL:
        last_M = rows_M + 1
        end = start + count
    q_low_MC, q_high_MC = _load_halves(
        qkv_ptr + head * HEAD, stride, place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY
    )
    top_M = tl.full((TILE,), _UNSEEN, tl.float32)
    sum_M = tl.zeros((TILE,), tl.float32)
    out_MV = tl.zeros((TILE, V), tl.float32)
    for at in range(begin, end, STEP):
        k_low_NC, k_high_NC = _load_halves(
            key_ptr, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HALF, C, STEP, ROTARY
        )
        v_NV = _load_whole(value_ptr, stride, at, end - at, HEAD, V, STEP)
        columns_N = at + tl.arange(0, STEP)
        seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
        scores_MN = _products(q_low_MC, q_high_MC, k_low_NC, k_high_NC) * scale_log2
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        weights_MN = tl.exp2(scores_MN - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        out_MV = tl.dot(weights_MN.to(v_NV.dtype), v_NV, out_MV * shrink_M[:, None], input_precision="ieee")
        top_M = new_top_M
    _store_whole(out_MV / sum_M[:, None], out_ptr + head * HEAD, NUM_HEADS * HEAD, start, count, HEAD, V, TILE)
    within_M = tl.arange(0, TILE)
    tl.store(lse_ptr + head * num_rows + start + within_M, top_M + tl.log2(sum_M), mask=within_M < count)


@triton.jit(do_not_specialize=["num_rows"])
def query_gradient_kernel(
    qkv_ptr, dout_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, owner_ptr, place_ptr, cu_ptr, cos_ptr, sin_ptr,
    num_rows, stride, dout_stride, scale, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr, SAVED: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The query part of dqkv, and delta[r] = dout[r] out[r] for the key part.

    Grid: (NUM_HEADS, tiles). Where out was not SAVED, delta is the mean of dout v under the softmax, in a first walk.
    """
    HALF: tl.constexpr = HEAD // 2
    V: tl.constexpr = 2 * C
    head = tl.program_id(0)
    start = tl.program_id(1) * TILE
    count = tl.minimum(num_rows - start, TILE)
    key_ptr = qkv_ptr + (NUM_HEADS + head // GROUP) * HEAD
    value_ptr = key_ptr + (NUM_HEADS // GROUP) * HEAD
    rows_M, first_M, last_M, begin, end = _spans(owner_ptr, cu_ptr, start, num_rows, TILE)
    if CAUSAL:
        last_M = rows_M + 1
        end = start + count
    q_low_MC, q_high_MC = _load_halves(
        qkv_ptr + head * HEAD, stride, place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY
    )
    dout_MV = _load_whole(dout_ptr + head * HEAD, dout_stride, start, count, HEAD, V, TILE)
    within_M = tl.arange(0, TILE)
    lse_M = tl.load(lse_ptr + head * num_rows + start + within_M, mask=within_M < count, other=0.0)
    if SAVED:
        out_MV = _load_whole(out_ptr + head * HEAD, NUM_HEADS * HEAD, start, count, HEAD, V, TILE)
        delta_M = tl.sum(dout_MV.to(tl.float32) * out_MV.to(tl.float32), 1)
    else:
        delta_M = tl.zeros((TILE,), tl.float32)
        for at in range(begin, end, STEP):
            k_low_NC, k_high_NC = _load_halves(
                key_ptr, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HALF, C, STEP, ROTARY
            )
            v_NV = _load_whole(value_ptr, stride, at, end - at, HEAD, V, STEP)
            columns_N = at + tl.arange(0, STEP)
            seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
            scores_MN = _products(q_low_MC, q_high_MC, k_low_NC, k_high_NC) * scale_log2
            weights_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
            delta_M += tl.sum(weights_MN * tl.dot(dout_MV, tl.trans(v_NV), input_precision="ieee"), 1)
    tl.store(delta_ptr + head * num_rows + start + within_M, delta_M, mask=within_M < count)

    dq_low_MC = tl.zeros((TILE, C), tl.float32)
    dq_high_MC = tl.zeros((TILE, C), tl.float32)
    for at in range(begin, end, STEP):
        k_low_NC, k_high_NC = _load_halves(
            key_ptr, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HALF, C, STEP, ROTARY
        )
        v_NV = _load_whole(value_ptr, stride, at, end - at, HEAD, V, STEP)
        columns_N = at + tl.arange(0, STEP)
        seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
        scores_MN = _products(q_low_MC, q_high_MC, k_low_NC, k_high_NC) * scale_log2
        weights_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
        dweights_MN = tl.dot(dout_MV, tl.trans(v_NV), input_precision="ieee")
        dscores_MN = (weights_MN * (dweights_MN - delta_M[:, None])).to(k_low_NC.dtype)
        dq_low_MC = tl.dot(dscores_MN, k_low_NC, dq_low_MC, input_precision="ieee")
        dq_high_MC = tl.dot(dscores_MN, k_high_NC, dq_high_MC, input_precision="ieee")
    _store_halves(
        dq_low_MC * scale, dq_high_MC * scale, dqkv_ptr + head * HEAD, (NUM_HEADS + 2 * (NUM_HEADS // GROUP)) * HEAD,
        place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY,
    )  # fmt: skip


@triton.jit(do_not_specialize=["num_rows"])
def key_gradient_kernel(
    qkv_ptr, dout_ptr, lse_ptr, delta_ptr, dqkv_ptr, owner_ptr, place_ptr, cu_ptr, cos_ptr, sin_ptr,
    num_rows, stride, dout_stride, scale, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The key and value parts of dqkv. Grid: (NUM_HEADS / GROUP, tiles); here M are keys, and N the queries' rows."""
    HALF: tl.constexpr = HEAD // 2
    V: tl.constexpr = 2 * C
    NUM_KV: tl.constexpr = NUM_HEADS // GROUP
    kv_head = tl.program_id(0)
    start = tl.program_id(1) * TILE
    count = tl.minimum(num_rows - start, TILE)
    key_ptr = qkv_ptr + (NUM_HEADS + kv_head) * HEAD
    rows_M, first_M, last_M, begin, end = _spans(owner_ptr, cu_ptr, start, num_rows, TILE)
    if CAUSAL:
        first_M = rows_M
        begin = start
    k_low_MC, k_high_MC = _load_halves(
        key_ptr, stride, place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY
    )
    v_MV = _load_whole(key_ptr + NUM_KV * HEAD, stride, start, count, HEAD, V, TILE)
    dk_low_MC = tl.zeros((TILE, C), tl.float32)
    dk_high_MC = tl.zeros((TILE, C), tl.float32)
    dv_MV = tl.zeros((TILE, V), tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        for at in range(begin, end, STEP):
            q_low_NC, q_high_NC = _load_halves(
                qkv_ptr + head * HEAD, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HALF, C, STEP, ROTARY
            )
            dout_NV = _load_whole(dout_ptr + head * HEAD, dout_stride, at, end - at, HEAD, V, STEP)
            columns_N = at + tl.arange(0, STEP)
            lse_N = tl.load(lse_ptr + head * num_rows + columns_N, mask=columns_N < end, other=0.0)
            delta_N = tl.load(delta_ptr + head * num_rows + columns_N, mask=columns_N < end, other=0.0)
            seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
            scores_MN = _products(k_low_MC, k_high_MC, q_low_NC, q_high_NC) * scale_log2
            weights_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_N[None, :]), 0.0)
            dv_MV = tl.dot(weights_MN.to(dout_NV.dtype), dout_NV, dv_MV, input_precision="ieee")
            dweights_MN = tl.dot(v_MV, tl.trans(dout_NV), input_precision="ieee")
            dscores_MN = (weights_MN * (dweights_MN - delta_N[None, :])).to(q_low_NC.dtype)
            dk_low_MC = tl.dot(dscores_MN, q_low_NC, dk_low_MC, input_precision="ieee")
            dk_high_MC = tl.dot(dscores_MN, q_high_NC, dk_high_MC, input_precision="ieee")
    row_stride = (NUM_HEADS + 2 * NUM_KV) * HEAD
    dkey_ptr = dqkv_ptr + (NUM_HEADS + kv_head) * HEAD
    _store_halves(
        dk_low_MC * scale, dk_high_MC * scale, dkey_ptr, row_stride,
        place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY,
    )  # fmt: skip
    _store_whole(dv_MV, dkey_ptr + NUM_KV * HEAD, row_stride, start, count, HEAD, V, TILE)
