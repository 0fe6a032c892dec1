"""The Triton kernel that quantises rows to fp8: largest magnitude, scale and cast in one read and one write.

Shapes: P rows, I their width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from model.fp8 import LARGEST, LEAST_AMAX, filled


def quantise_rows(x_PI: Tensor) -> tuple[Tensor, Tensor]:
    """As model.fp8.quantise_rows, for contiguous rows of at most 65,536."""
    num_rows, width = x_PI.shape
    num_filled = filled(num_rows)
    quantised_PI = torch.empty(num_filled, width, dtype=torch.float8_e4m3fn, device=x_PI.device)
    scale_P1 = torch.empty(num_filled, 1, dtype=torch.float32, device=x_PI.device)
    block = triton.next_power_of_2(width)
    _quantise_rows[(num_filled,)](
        *(x_PI, quantised_PI, scale_P1, num_rows),
        WIDTH=width,
        BLOCK=block,
        LARGEST=LARGEST,
        LEAST=LEAST_AMAX,
        num_warps=min(16, max(2, block // 1024)),
    )
    return quantised_PI, scale_P1


@triton.jit(do_not_specialize=["num_rows"])
def _quantise_rows(
    x_ptr, quantised_ptr, scale_ptr, num_rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr, LARGEST: tl.constexpr, LEAST: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    is_inside = column < WIDTH
    x = tl.load(x_ptr + row * WIDTH + column, mask=is_inside & (row < num_rows), other=0.0).to(tl.float32)
    amax = tl.maximum(tl.max(tl.abs(x), axis=0), LEAST)
    value = x * (LARGEST / amax)
    tl.store(quantised_ptr + row * WIDTH + column, value.to(quantised_ptr.dtype.element_ty), mask=is_inside)
    tl.store(scale_ptr + row, amax / LARGEST)
