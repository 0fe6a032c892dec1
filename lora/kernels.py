"""Triton kernels of the joint projection; lora/joint_steps.py holds the same steps in torch, their reference.

What they save is passes over the wide activations: forward reads x once for the copy beside the low-rank part and for
that part itself; backward reads the product's gradient and x once for grad_x and grad_A, and grad_y once for grad_B.
Long sums are cut into parts of fixed places, which are added in order: no atomics, the same bits each time.

Shapes: P rows, I in_features, O out_features of all projections, R ranks of all adapters padded to the tail's width,
E = I + R, S parts of a sum.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from lora.mask import NUM_ROUNDS, keep_scale, threshold

_ENOUGH_PROGRAMS = 264  # two for each multiprocessor of the larger chips
_COPY_BLOCK = 4096
_SUM_BLOCK = 1024


def pack(
    adapters: list[tuple[Tensor, Tensor]], into: list[tuple[Tensor, Tensor]], r: int, num_in: int, scaling: float
) -> None:
    """Each adapter's A [r, I] and B [O', r] cast into its places (strided views of `into`), B scaled; one launch."""
    empty = into[0][0]
    padded = [(a, b, to_a, to_b, b.shape[0]) for (a, b), (to_a, to_b) in zip(adapters, into, strict=True)]
    padded += [(empty, empty, empty, empty, 0)] * (3 - len(padded))
    (a0, b0, ta0, tb0, o0), (a1, b1, ta1, tb1, o1), (a2, b2, ta2, tb2, o2) = padded
    most = max(r * num_in, max(o0, o1, o2) * r)
    _pack[(triton.cdiv(most, _COPY_BLOCK), 2 * len(adapters))](
        *(a0, a1, a2, b0, b1, b2, ta0, ta1, ta2, tb0, tb1, tb2),
        *(o0, o1, o2, num_in, into[0][1].stride(0), scaling),
        RANK=r,
        BLOCK=_COPY_BLOCK,
    )


def extend(x_PI: Tensor, down_RI: Tensor, seed_1: Tensor, dropout: float) -> tuple[Tensor, Tensor]:
    """(x_PE, low_PR): x with its low-rank part drop(x) down^T behind it, and that part alone."""
    num_rows, num_in = x_PI.shape
    num_low = down_RI.shape[0]
    wide = triton.next_power_of_2(num_low)
    rows, columns = _row_block(num_rows, wide), 64
    num_row_blocks = triton.cdiv(num_rows, rows)
    num_parts, per_part = _divide(num_in, columns, num_row_blocks)
    x_PE = x_PI.new_empty(num_rows, num_in + num_low)
    low_PR = x_PI.new_empty(num_rows, num_low)
    is_cut = num_parts > 1
    part_SPR = x_PI.new_empty(num_parts, num_rows, num_low, dtype=torch.float32) if is_cut else low_PR
    limit, scale = threshold(dropout), keep_scale(dropout)
    _extend[(num_row_blocks, num_parts)](
        *(x_PI, x_PE, down_RI, low_PR, part_SPR, seed_1, num_rows, num_in, per_part, x_PI.stride(0), limit, scale),
        NUM_LOW=num_low,
        WIDE=wide,
        ROWS=rows,
        COLUMNS=columns,
        DROPS=limit > 0,
        IS_CUT=is_cut,
        ROUNDS=NUM_ROUNDS,
        num_warps=4 if wide <= 128 else 8,
    )
    if is_cut:
        _add_low[(triton.cdiv(num_rows * num_low, _SUM_BLOCK),)](
            *(part_SPR, x_PE, low_PR, num_rows, num_in, num_parts, scale), NUM_LOW=num_low, BLOCK=_SUM_BLOCK
        )
    return x_PE, low_PR


def finish(
    grad_PE: Tensor, x_PI: Tensor, down_RI: Tensor, seed_1: Tensor, dropout: float, needs_x: bool, needs_down: bool
) -> tuple[Tensor | None, Tensor | None]:
    """(grad_x [P, I], parts of grad_down [S, R, I] in fp32) from `grad_PE`, the gradients of x and of the low-rank
    part side by side; without `needs_x` it is [P, R], the latter alone."""
    num_rows, num_in = x_PI.shape
    num_low = down_RI.shape[0]
    wide = triton.next_power_of_2(num_low)
    columns, rows = 64, _row_block(num_rows, wide)
    num_column_blocks = triton.cdiv(num_in, columns)
    num_parts, per_part = _divide(num_rows, rows, num_column_blocks)
    grad_x_PI = torch.empty_like(x_PI, memory_format=torch.contiguous_format) if needs_x else None
    part_SRI = x_PI.new_empty(num_parts, num_low, num_in, dtype=torch.float32) if needs_down else None
    limit, scale = threshold(dropout), keep_scale(dropout)
    _finish[(num_column_blocks, num_parts)](
        *(grad_PE, x_PI, down_RI, grad_PE if grad_x_PI is None else grad_x_PI),
        *(grad_PE if part_SRI is None else part_SRI, seed_1),
        *(num_rows, num_in, per_part, x_PI.stride(0), grad_PE.stride(0), num_in if needs_x else 0, limit, scale),
        NUM_LOW=num_low,
        WIDE=wide,
        ROWS=rows,
        COLUMNS=columns,
        DROPS=limit > 0,
        NEEDS_X=needs_x,
        NEEDS_DOWN=needs_down,
        ROUNDS=NUM_ROUNDS,
        num_warps=4 if wide <= 64 else 8,
    )
    return grad_x_PI, part_SRI


def grad_up(grad_PO: Tensor, low_PR: Tensor, spans: tuple[tuple[int, int, int], ...], r: int) -> Tensor:
    """Parts [S, O, r] in fp32 of grad_y^T low, of each output row the columns of its own adapter. `spans`: for each
    projection (first row, end, first column of its adapter; -1 without one, whose rows are left undefined)."""
    num_rows, num_out = grad_PO.shape
    wide = max(16, triton.next_power_of_2(r))  # 16: the least that tl.dot takes
    outs, rows = (128, 64) if wide <= 64 else (64, 32)
    (_, end0, column0), (_, end1, column1), (_, _, column2) = spans
    blocks0, blocks1, blocks2 = (triton.cdiv(end - first, outs) for first, end, _ in spans)
    num_parts, per_part = _divide(num_rows, rows, blocks0 + blocks1 + blocks2)
    part_SOr = low_PR.new_empty(num_parts, num_out, r, dtype=torch.float32)
    _grad_up[(blocks0 + blocks1 + blocks2, num_parts)](
        *(grad_PO, low_PR, part_SOr, num_rows, num_out, per_part, grad_PO.stride(0)),
        *(end0, end1, blocks0, blocks0 + blocks1, column0, column1, column2),
        RANK=r,
        ALIGNED=math.gcd(r, 16),  # each adapter's first column is a multiple of the rank
        NUM_LOW=low_PR.shape[1],
        WIDE=wide,
        ROWS=rows,
        OUTS=outs,
        num_warps=8,
    )
    return part_SOr


def add_parts(down_SRI: Tensor | None, up_SOr: Tensor | None, scaling: float) -> tuple[Tensor | None, Tensor | None]:
    """Both sums over the parts, the second times `scaling`, in one launch."""
    first, second = (None if part is None else part.new_empty(part.shape[1:]) for part in (down_SRI, up_SOr))
    some = next(part for part in (down_SRI, up_SOr) if part is not None)
    num_first, num_second = (0 if part is None else part.numel() for part in (first, second))
    blocks = triton.cdiv(num_first, _SUM_BLOCK)
    _add_parts[(blocks + triton.cdiv(num_second, _SUM_BLOCK),)](
        *(some if part is None else part for part in (down_SRI, up_SOr, first, second)),
        *(num_first, num_second, blocks),
        *(0 if part is None else part.shape[0] for part in (down_SRI, up_SOr)),
        scaling,
        BLOCK=_SUM_BLOCK,
    )
    return first, second


def _row_block(num_rows: int, wide: int) -> int:
    """Rows a program: few where there are few; few also where the low-rank part is wide, for the registers."""
    return 16 if num_rows <= 512 else 32 if num_rows <= 4096 or wide > 128 else 64


def _divide(length: int, block: int, num_others: int) -> tuple[int, int]:
    """(parts, length of a part): as many as keep the device busy, each of whole blocks and at least two of them."""
    num_blocks = triton.cdiv(length, block)
    num_parts = max(1, min(triton.cdiv(_ENOUGH_PROGRAMS, num_others), num_blocks // 2))
    per_part = triton.cdiv(num_blocks, num_parts) * block
    return triton.cdiv(length, per_part), per_part


@triton.jit
def _cast(source, target, num_rows, width, stride, scale, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(source + place, mask=place < num_rows * width, other=0.0) * scale
    target += place // width * stride + place % width
    tl.store(target, value.to(target.dtype.element_ty), mask=place < num_rows * width)


@triton.jit
def _pack(
    a0, a1, a2, b0, b1, b2, ta0, ta1, ta2, tb0, tb1, tb2,
    o0, o1, o2, num_in, stride, scaling, RANK: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    part = tl.program_id(1)
    if part == 0:
        _cast(a0, ta0, RANK, num_in, num_in, 1.0, BLOCK)
    elif part == 1:
        _cast(b0, tb0, o0, RANK, stride, scaling, BLOCK)
    elif part == 2:
        _cast(a1, ta1, RANK, num_in, num_in, 1.0, BLOCK)
    elif part == 3:
        _cast(b1, tb1, o1, RANK, stride, scaling, BLOCK)
    elif part == 4:
        _cast(a2, ta2, RANK, num_in, num_in, 1.0, BLOCK)
    else:
        _cast(b2, tb2, o2, RANK, stride, scaling, BLOCK)


@triton.jit
def _keep(seed, first_row, first_column, limit, ROWS: tl.constexpr, COLUMNS: tl.constexpr, ROUNDS: tl.constexpr):
    """The tile of `lora.mask.keep_mask` that begins there; first_column is a multiple of 8."""
    row = (first_row + tl.arange(0, ROWS))[:, None] + tl.zeros([1, COLUMNS // 8], tl.int32)
    group = (first_column // 8 + tl.arange(0, COLUMNS // 8))[None, :] + tl.zeros([ROWS, 1], tl.int32)
    zero = row * 0
    w0, w1, w2, w3 = tl.philox(seed, group, row, zero, zero, ROUNDS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, [ROWS, COLUMNS]).to(tl.int32) >= limit


@triton.jit(do_not_specialize=["num_rows", "per_part", "limit"])
def _extend(
    x, x_ext, down, low, partial, seed, num_rows, num_in, per_part, stride_x, limit, scale,
    NUM_LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DROPS: tl.constexpr, IS_CUT: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    first_row = tl.program_id(0) * ROWS
    row = (first_row + tl.arange(0, ROWS)).to(tl.int64)
    wide = tl.arange(0, WIDE)
    width = num_in + NUM_LOW
    key = tl.load(seed)
    total = tl.zeros([ROWS, WIDE], tl.float32)
    # Said, not seen by the compiler: without it every element is loaded by itself.
    first = tl.multiple_of(tl.program_id(1) * per_part, COLUMNS)
    for start in range(first, tl.minimum(first + per_part, num_in), COLUMNS):
        column = start + tl.arange(0, COLUMNS)
        inside = (row < num_rows)[:, None] & (column < num_in)[None, :]
        tile = tl.load(x + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
        tl.store(x_ext + row[:, None] * width + column[None, :], tile, mask=inside)
        if DROPS:
            tile = tl.where(_keep(key, first_row, start, limit, ROWS, COLUMNS, ROUNDS), tile, 0.0)
        wanted = (column < num_in)[:, None] & (wide < NUM_LOW)[None, :]
        down_tile = tl.load(down + wide[None, :] * num_in + column[:, None], mask=wanted, other=0.0)
        total = tl.dot(tile, down_tile, total)
    inside = (row < num_rows)[:, None] & (wide < NUM_LOW)[None, :]
    if IS_CUT:
        part = (tl.program_id(1) * num_rows + row)[:, None] * NUM_LOW + wide[None, :]
        tl.store(partial + part, total, mask=inside)
    else:
        total = (total * scale).to(low.dtype.element_ty)
        tl.store(low + row[:, None] * NUM_LOW + wide[None, :], total, mask=inside)
        tl.store(x_ext + row[:, None] * width + num_in + wide[None, :], total, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "num_parts"])
def _add_low(partial, x_ext, low, num_rows, num_in, num_parts, scale, NUM_LOW: tl.constexpr, BLOCK: tl.constexpr):
    place = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = place < num_rows * NUM_LOW
    total = tl.zeros([BLOCK], tl.float32)
    for part in range(num_parts):
        total += tl.load(partial + part * num_rows * NUM_LOW + place, mask=inside, other=0.0)
    value = (total * scale).to(low.dtype.element_ty)
    tl.store(low + place, value, mask=inside)
    row = (place // NUM_LOW).to(tl.int64)
    tl.store(x_ext + row * (num_in + NUM_LOW) + num_in + place % NUM_LOW, value, mask=inside)


@triton.jit(do_not_specialize=["num_rows", "per_part", "limit"])
def _finish(
    grad, x, down, grad_x, partial, seed,
    num_rows, num_in, per_part, stride_x, stride_grad, first_low, limit, scale,
    NUM_LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    DROPS: tl.constexpr, NEEDS_X: tl.constexpr, NEEDS_DOWN: tl.constexpr, ROUNDS: tl.constexpr,
):  # fmt: skip
    first_column = tl.program_id(0) * COLUMNS
    column = first_column + tl.arange(0, COLUMNS)
    wide = tl.arange(0, WIDE)
    key = tl.load(seed)
    wanted = (wide < NUM_LOW)[:, None] & (column < num_in)[None, :]
    down_tile = tl.load(down + wide[:, None] * num_in + column[None, :], mask=wanted, other=0.0)
    total = tl.zeros([WIDE, COLUMNS], tl.float32)
    first = tl.program_id(1) * per_part
    for start in range(first, tl.minimum(first + per_part, num_rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        low_inside = (row < num_rows)[:, None] & (wide < NUM_LOW)[None, :]
        grad_low = tl.load(grad + row[:, None] * stride_grad + first_low + wide[None, :], mask=low_inside, other=0.0)
        inside = (row < num_rows)[:, None] & (column < num_in)[None, :]
        if DROPS:
            keep = _keep(key, start, first_column, limit, ROWS, COLUMNS, ROUNDS)
        if NEEDS_X:
            through = tl.dot(grad_low, down_tile) * scale
            if DROPS:
                through = tl.where(keep, through, 0.0)
            value = tl.load(grad + row[:, None] * stride_grad + column[None, :], mask=inside, other=0.0) + through
            target = grad_x + row[:, None] * num_in + column[None, :]
            tl.store(target, value.to(grad_x.dtype.element_ty), mask=inside)
        if NEEDS_DOWN:
            tile = tl.load(x + row[:, None] * stride_x + column[None, :], mask=inside, other=0.0)
            if DROPS:
                tile = tl.where(keep, tile, 0.0)
            total = tl.dot(tl.trans(grad_low), tile, total)
    if NEEDS_DOWN:
        part = (tl.program_id(1) * NUM_LOW + wide)[:, None] * num_in + column[None, :]
        tl.store(partial + part, total * scale, mask=wanted)


@triton.jit(do_not_specialize=["num_rows", "per_part", "column0", "column1", "column2"])
def _grad_up(
    grad, low, partial, num_rows, num_out, per_part, stride_grad,
    end0, end1, block1, block2, column0, column1, column2,
    RANK: tl.constexpr, ALIGNED: tl.constexpr, NUM_LOW: tl.constexpr, WIDE: tl.constexpr, ROWS: tl.constexpr,
    OUTS: tl.constexpr,
):  # fmt: skip
    # A program's outputs are of one projection, so that it needs the columns of one adapter.
    block = tl.program_id(0)
    first = tl.where(block < block1, 0, tl.where(block < block2, end0, end1))
    first_block = tl.where(block < block1, 0, tl.where(block < block2, block1, block2))
    end = tl.where(block < block1, end0, tl.where(block < block2, end1, num_out))
    column = tl.where(block < block1, column0, tl.where(block < block2, column1, column2))
    if column < 0:
        return
    column = tl.multiple_of(column, ALIGNED)
    out = first + (block - first_block) * OUTS + tl.arange(0, OUTS)
    wide = tl.arange(0, WIDE)
    total = tl.zeros([OUTS, WIDE], tl.float32)
    first_row = tl.program_id(1) * per_part
    for start in range(first_row, tl.minimum(first_row + per_part, num_rows), ROWS):
        row = (start + tl.arange(0, ROWS)).to(tl.int64)
        inside = (row < num_rows)[:, None] & (out < end)[None, :]
        grad_tile = tl.load(grad + row[:, None] * stride_grad + out[None, :], mask=inside, other=0.0)
        low_inside = (row < num_rows)[:, None] & (wide < RANK)[None, :]
        low_tile = tl.load(low + row[:, None] * NUM_LOW + (column + wide)[None, :], mask=low_inside, other=0.0)
        total = tl.dot(tl.trans(grad_tile), low_tile, total)
    inside = (out < end)[:, None] & (wide < RANK)[None, :]
    part = (tl.program_id(1) * num_out + out)[:, None] * RANK + wide[None, :]
    tl.store(partial + part, total, mask=inside)


@triton.jit(do_not_specialize=["num_first", "num_second", "blocks", "parts_first", "parts_second"])
def _add_parts(
    parts_a, parts_b, first, second, num_first, num_second, blocks, parts_first, parts_second, scaling,
    BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0)
    if program < blocks:
        place = program * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(parts_first):
            total += tl.load(parts_a + part * num_first + place, mask=place < num_first, other=0.0)
        tl.store(first + place, total, mask=place < num_first)
    else:
        place = (program - blocks) * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros([BLOCK], tl.float32)
        for part in range(parts_second):
            total += tl.load(parts_b + part * num_second + place, mask=place < num_second, other=0.0)
        tl.store(second + place, total * scaling, mask=place < num_second)
