"""Triton kernel of SwiGLU: one pass each way, arithmetic in fp32, the pre-activation kept and nothing else.

Shapes: P packed tokens, F feed-forward width.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.autograd.function import once_differentiable

_BLOCK = 2048
_NUM_WARPS = 4


def swiglu(gate_up_P2F: Tensor) -> Tensor:
    """silu(gate) * up, [P, F]; its gradient comes as one buffer [P, 2 F]."""
    return _Swiglu.apply(gate_up_P2F)


class _Swiglu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate_up_P2F: Tensor) -> Tensor:
        gate_up_P2F = gate_up_P2F.contiguous()
        num_rows, width = gate_up_P2F.shape[0], gate_up_P2F.shape[1] // 2
        out_PF = gate_up_P2F.new_empty(num_rows, width)
        grid = (num_rows, triton.cdiv(width, _BLOCK))
        _swiglu_forward[grid](gate_up_P2F, out_PF, WIDTH=width, BLOCK=_BLOCK, num_warps=_NUM_WARPS)
        ctx.save_for_backward(gate_up_P2F)
        return out_PF

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PF: Tensor) -> Tensor:
        (gate_up_P2F,) = ctx.saved_tensors
        grad_P2F = torch.empty_like(gate_up_P2F)
        num_rows, width = grad_PF.shape
        grid = (num_rows, triton.cdiv(width, _BLOCK))
        _swiglu_backward[grid](
            grad_PF.contiguous(), gate_up_P2F, grad_P2F, WIDTH=width, BLOCK=_BLOCK, num_warps=_NUM_WARPS
        )
        return grad_P2F


@triton.jit
def _swiglu_forward(gate_up_ptr, out_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    gate_at = gate_up_ptr + row * (2 * WIDTH) + columns
    gate = tl.load(gate_at, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_at + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + row * WIDTH + columns, out.to(out_ptr.dtype.element_ty), mask=is_inside)


@triton.jit
def _swiglu_backward(grad_ptr, gate_up_ptr, grad_gate_up_ptr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    is_inside = columns < WIDTH
    gate_at = row * (2 * WIDTH) + columns
    gate = tl.load(gate_up_ptr + gate_at, mask=is_inside, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + gate_at + WIDTH, mask=is_inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + row * WIDTH + columns, mask=is_inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    silu = gate * sigmoid
    grad_gate = grad * up * (sigmoid + silu * (1.0 - sigmoid))
    dtype = grad_gate_up_ptr.dtype.element_ty
    tl.store(grad_gate_up_ptr + gate_at, grad_gate.to(dtype), mask=is_inside)
    tl.store(grad_gate_up_ptr + gate_at + WIDTH, (grad * silu).to(dtype), mask=is_inside)
