"""Triton kernels between the products of the audio tower's convolutions. No gradients.

Shapes: T mel frame slots, P packed tokens, D width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024


def gather_patches(h_TD: Tensor, is_kept_T: Tensor, token_slot_P: Tensor) -> Tensor:
    """[P, 3 D]: for each token GELU of the slots 2 s - 1, 2 s, 2 s + 1 of its output slot s, zero where not kept."""
    num_tokens, width = len(token_slot_P), h_TD.shape[1]
    out = h_TD.new_empty(num_tokens, 3 * width)
    grid = (num_tokens, triton.cdiv(width, _BLOCK))
    _gather_patches[grid](h_TD, is_kept_T, token_slot_P, out, len(h_TD), WIDTH=width, BLOCK=_BLOCK)
    return out


def add_positions(h_PD: Tensor, positions_LD: Tensor, place_P: Tensor) -> Tensor:
    """GELU of h plus each token's position."""
    out_PD = torch.empty_like(h_PD)
    grid = (len(h_PD), triton.cdiv(h_PD.shape[1], _BLOCK))
    _add_positions[grid](h_PD, positions_LD, place_P, out_PD, WIDTH=h_PD.shape[1], BLOCK=_BLOCK)
    return out_PD


@triton.jit
def _gelu(x):
    return x * (0.5 * (1.0 + tl.erf(x * 0.7071067811865476)))


@triton.jit
def _gather_patches(h_ptr, kept_ptr, slot_ptr, out_ptr, num_slots, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    middle = tl.load(slot_ptr + row) * 2
    for k in tl.static_range(3):
        slot = middle + k - 1
        is_real = (slot >= 0) & (slot < num_slots)
        is_kept = tl.load(kept_ptr + slot, mask=is_real, other=0).to(tl.int1)
        x = tl.load(h_ptr + slot * WIDTH + columns, mask=is_inside & is_kept, other=0.0).to(tl.float32)
        y = _gelu(x).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * (3 * WIDTH) + k * WIDTH + columns, y, mask=is_inside)


@triton.jit
def _add_positions(h_ptr, positions_ptr, place_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    x = tl.load(h_ptr + row * WIDTH + columns, mask=is_inside, other=0.0).to(tl.float32)
    place = tl.load(place_ptr + row)
    position = tl.load(positions_ptr + place * WIDTH + columns, mask=is_inside, other=0.0).to(tl.float32)
    y = (_gelu(x) + position).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * WIDTH + columns, y, mask=is_inside)
