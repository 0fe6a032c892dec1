"""Triton kernels of attention within packed sequences; `model.tile_attention` says what they are for and launches them.

A program holds TILE rows of the pack, which may be the end of one sequence, many whole ones and the start of another,
and walks over the rows that any of them may see, STEP at a time. Row r sees the rows from `first[r]` to `last[r]`
(excluded), its sequence or the part up to r: the mask is two comparisons and nothing is looked up for a column.

Scores and sums are fp32; the probabilities, and the slopes of the scores, are rounded to the inputs' dtype before they
are multiplied, as in every flash attention. Nothing is accumulated over programs, so that results repeat bit by bit.

Names: M the tile's rows, N a step's rows, C half a head, V a whole head (both filled up to a power of two).
"""

import triton
import triton.language as tl

from model.attention_rows import load_halves, load_whole, products, spans, store_halves, store_whole

_UNSEEN = tl.constexpr(-1.0e30)  # a running maximum before any score: finite, so that its exponential never is NaN


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
    rows_M, first_M, last_M, begin, end = spans(owner_ptr, cu_ptr, start, num_rows, TILE)
    if CAUSAL:
        last_M = rows_M + 1
        end = start + count
    q_low_MC, q_high_MC = load_halves(
        qkv_ptr + head * HEAD, stride, place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY
    )
    top_M = tl.full((TILE,), _UNSEEN, tl.float32)
    sum_M = tl.zeros((TILE,), tl.float32)
    out_MV = tl.zeros((TILE, V), tl.float32)
    for at in range(begin, end, STEP):
        k_low_NC, k_high_NC = load_halves(
            key_ptr, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HALF, C, STEP, ROTARY
        )
        v_NV = load_whole(value_ptr, stride, at, end - at, HEAD, V, STEP)
        columns_N = at + tl.arange(0, STEP)
        seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
        scores_MN = products(q_low_MC, q_high_MC, k_low_NC, k_high_NC) * scale_log2
        scores_MN = tl.where(seen_MN, scores_MN, float("-inf"))
        new_top_M = tl.maximum(top_M, tl.max(scores_MN, 1))
        weights_MN = tl.exp2(scores_MN - new_top_M[:, None])
        shrink_M = tl.exp2(top_M - new_top_M)
        sum_M = sum_M * shrink_M + tl.sum(weights_MN, 1)
        out_MV = tl.dot(weights_MN.to(v_NV.dtype), v_NV, out_MV * shrink_M[:, None], input_precision="ieee")
        top_M = new_top_M
    store_whole(out_MV / sum_M[:, None], out_ptr + head * HEAD, NUM_HEADS * HEAD, start, count, HEAD, V, TILE)
    within_M = tl.arange(0, TILE)
    tl.store(lse_ptr + head * num_rows + start + within_M, top_M + tl.log2(sum_M), mask=within_M < count)


@triton.jit
def _query_walk(
    q_low_MC, q_high_MC, dout_MV, lse_M, delta_M, key_ptr, value_ptr, stride, place_ptr, cos_ptr, sin_ptr,
    first_M, last_M, begin, end, scale_log2,
    HEAD: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Halves [M, C] of the gradient of the tile's turned queries, over the scale: a walk over the keys they see."""
    dq_low_MC = tl.zeros((TILE, C), tl.float32)
    dq_high_MC = tl.zeros((TILE, C), tl.float32)
    for at in range(begin, end, STEP):
        k_low_NC, k_high_NC = load_halves(
            key_ptr, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HEAD // 2, C, STEP, ROTARY
        )
        v_NV = load_whole(value_ptr, stride, at, end - at, HEAD, 2 * C, STEP)
        columns_N = at + tl.arange(0, STEP)
        seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
        scores_MN = products(q_low_MC, q_high_MC, k_low_NC, k_high_NC) * scale_log2
        weights_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_M[:, None]), 0.0)
        dweights_MN = tl.dot(dout_MV, tl.trans(v_NV), input_precision="ieee")
        dscores_MN = (weights_MN * (dweights_MN - delta_M[:, None])).to(k_low_NC.dtype)
        dq_low_MC = tl.dot(dscores_MN, k_low_NC, dq_low_MC, input_precision="ieee")
        dq_high_MC = tl.dot(dscores_MN, k_high_NC, dq_high_MC, input_precision="ieee")
    return dq_low_MC, dq_high_MC


@triton.jit
def _key_walk(
    dk_low_MC, dk_high_MC, dv_MV, k_low_MC, k_high_MC, v_MV, query_ptr, stride, dout_ptr, dout_stride,
    lse_ptr, delta_ptr, place_ptr, cos_ptr, sin_ptr, first_M, last_M, begin, end, scale_log2,
    HEAD: tl.constexpr, C: tl.constexpr, STEP: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """Adds one query head's part to the gradients of the tile's keys and values: a walk over the rows that see them."""
    for at in range(begin, end, STEP):
        q_low_NC, q_high_NC = load_halves(
            query_ptr, stride, place_ptr, cos_ptr, sin_ptr, at, end - at, HEAD // 2, C, STEP, ROTARY
        )
        dout_NV = load_whole(dout_ptr, dout_stride, at, end - at, HEAD, 2 * C, STEP)
        columns_N = at + tl.arange(0, STEP)
        lse_N = tl.load(lse_ptr + columns_N, mask=columns_N < end, other=0.0)
        delta_N = tl.load(delta_ptr + columns_N, mask=columns_N < end, other=0.0)
        seen_MN = (columns_N[None, :] >= first_M[:, None]) & (columns_N[None, :] < last_M[:, None])
        scores_MN = products(k_low_MC, k_high_MC, q_low_NC, q_high_NC) * scale_log2
        weights_MN = tl.where(seen_MN, tl.exp2(scores_MN - lse_N[None, :]), 0.0)
        dv_MV = tl.dot(weights_MN.to(dout_NV.dtype), dout_NV, dv_MV, input_precision="ieee")
        dweights_MN = tl.dot(v_MV, tl.trans(dout_NV), input_precision="ieee")
        dscores_MN = (weights_MN * (dweights_MN - delta_N[None, :])).to(q_low_NC.dtype)
        dk_low_MC = tl.dot(dscores_MN, q_low_NC, dk_low_MC, input_precision="ieee")
        dk_high_MC = tl.dot(dscores_MN, q_high_NC, dk_high_MC, input_precision="ieee")
    return dk_low_MC, dk_high_MC, dv_MV


@triton.jit(do_not_specialize=["num_rows"])
def query_gradient_kernel(
    qkv_ptr, dout_ptr, out_ptr, lse_ptr, delta_ptr, dqkv_ptr, owner_ptr, place_ptr, cu_ptr, cos_ptr, sin_ptr,
    num_rows, stride, dout_stride, scale, scale_log2,
    NUM_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD: tl.constexpr, C: tl.constexpr, CAUSAL: tl.constexpr,
    ROTARY: tl.constexpr, TILE: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """The query part of dqkv, and delta[r] = dout[r] out[r] for the key part. Grid: (NUM_HEADS, tiles)."""
    HALF: tl.constexpr = HEAD // 2
    V: tl.constexpr = 2 * C
    head = tl.program_id(0)
    start = tl.program_id(1) * TILE
    count = tl.minimum(num_rows - start, TILE)
    key_ptr = qkv_ptr + (NUM_HEADS + head // GROUP) * HEAD
    value_ptr = key_ptr + (NUM_HEADS // GROUP) * HEAD
    rows_M, first_M, last_M, begin, end = spans(owner_ptr, cu_ptr, start, num_rows, TILE)
    if CAUSAL:
        last_M = rows_M + 1
        end = start + count
    q_low_MC, q_high_MC = load_halves(
        qkv_ptr + head * HEAD, stride, place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY
    )
    dout_MV = load_whole(dout_ptr + head * HEAD, dout_stride, start, count, HEAD, V, TILE)
    within_M = tl.arange(0, TILE)
    lse_M = tl.load(lse_ptr + head * num_rows + start + within_M, mask=within_M < count, other=0.0)
    out_MV = load_whole(out_ptr + head * HEAD, NUM_HEADS * HEAD, start, count, HEAD, V, TILE)
    delta_M = tl.sum(dout_MV.to(tl.float32) * out_MV.to(tl.float32), 1)
    tl.store(delta_ptr + head * num_rows + start + within_M, delta_M, mask=within_M < count)

    dq_low_MC, dq_high_MC = _query_walk(
        q_low_MC, q_high_MC, dout_MV, lse_M, delta_M, key_ptr, value_ptr, stride, place_ptr, cos_ptr, sin_ptr,
        first_M, last_M, begin, end, scale_log2, HEAD, C, TILE, STEP, ROTARY,
    )  # fmt: skip
    store_halves(
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
    rows_M, first_M, last_M, begin, end = spans(owner_ptr, cu_ptr, start, num_rows, TILE)
    if CAUSAL:
        first_M = rows_M
        begin = start
    k_low_MC, k_high_MC = load_halves(key_ptr, stride, place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY)
    v_MV = load_whole(key_ptr + NUM_KV * HEAD, stride, start, count, HEAD, V, TILE)
    dk_low_MC = tl.zeros((TILE, C), tl.float32)
    dk_high_MC = tl.zeros((TILE, C), tl.float32)
    dv_MV = tl.zeros((TILE, V), tl.float32)
    for member in range(0, GROUP):
        head = kv_head * GROUP + member
        dk_low_MC, dk_high_MC, dv_MV = _key_walk(
            dk_low_MC, dk_high_MC, dv_MV, k_low_MC, k_high_MC, v_MV,
            qkv_ptr + head * HEAD, stride, dout_ptr + head * HEAD, dout_stride, lse_ptr + head * num_rows,
            delta_ptr + head * num_rows, place_ptr, cos_ptr, sin_ptr, first_M, last_M, begin, end, scale_log2,
            HEAD, C, STEP, ROTARY,
        )  # fmt: skip
    row_stride = (NUM_HEADS + 2 * NUM_KV) * HEAD
    dkey_ptr = dqkv_ptr + (NUM_HEADS + kv_head) * HEAD
    store_halves(
        dk_low_MC * scale, dk_high_MC * scale, dkey_ptr, row_stride,
        place_ptr, cos_ptr, sin_ptr, start, count, HALF, C, TILE, ROTARY,
    )  # fmt: skip
    store_whole(dv_MV, dkey_ptr + NUM_KV * HEAD, row_stride, start, count, HEAD, V, TILE)
