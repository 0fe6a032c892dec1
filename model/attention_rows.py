"""How the kernels of `model.attention_kernels` read and write the pack's rows: their spans, head vectors in halves.

Head vectors are kept as two halves, which is how rotary positions pair their elements; they are turned as they are
loaded, and gradients are turned back as they are stored.

Names: M rows, N another set of rows, C half a head, V a whole head (both filled up to a power of two).
"""

import triton
import triton.language as tl


@triton.jit
def spans(owner_ptr, cu_ptr, start, num_rows, ROWS: tl.constexpr):
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
def load_halves(
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
def store_halves(
    low_MC, high_MC, pointer, stride, place_ptr, cos_ptr, sin_ptr, start, count,
    HALF: tl.constexpr, C: tl.constexpr, ROWS: tl.constexpr, ROTARY: tl.constexpr,
):  # fmt: skip
    """The gradient's way back through `load_halves`: fp32 halves turned the other way and stored."""
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
def load_whole(pointer, stride, start, count, HEAD: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr):
    """Head vectors [ROWS, V] of ROWS rows from `start`, of which `count` exist."""
    rows_M = tl.arange(0, ROWS)
    columns_V = tl.arange(0, V)
    ok_MV = (rows_M < count)[:, None] & (columns_V < HEAD)[None, :]
    return tl.load(_at(pointer, start, stride, rows_M, columns_V), mask=ok_MV, other=0.0)


@triton.jit
def store_whole(x_MV, pointer, stride, start, count, HEAD: tl.constexpr, V: tl.constexpr, ROWS: tl.constexpr):
    rows_M = tl.arange(0, ROWS)
    columns_V = tl.arange(0, V)
    ok_MV = (rows_M < count)[:, None] & (columns_V < HEAD)[None, :]
    tl.store(_at(pointer, start, stride, rows_M, columns_V), x_MV.to(pointer.dtype.element_ty), mask=ok_MV)


@triton.jit
def products(a_low_MC, a_high_MC, b_low_NC, b_high_NC):
    """Inner products [M, N] of the rows of a and of b. fp32 inputs are multiplied as fp32, never as tf32."""
    partial_MN = tl.dot(a_low_MC, tl.trans(b_low_NC), input_precision="ieee")
    return tl.dot(a_high_MC, tl.trans(b_high_NC), partial_MN, input_precision="ieee")
