"""A feed-forward block whose two products are frozen and in fp8: y = W2 act(W1 x), as one node.

The activation, and backwards its gradient, are quantised by the kernel that computes them (model/fp8_kernels.py): in
bf16 they would be written and read again. Kept for the backward pass is the pre-activation alone.

Shapes: P rows, D width, F feed-forward width, G = F, or 2 F for gate and up side by side.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from model.activations import swiglu
from model.fp8 import Fp8Product
from model.kernels import uses_triton


def feed_forward(x_PD: Tensor, up: Fp8Product, down: Fp8Product, is_gated: bool, kernels: str = "auto") -> Tensor:
    """[P, D] -> [P, D]. is_gated: SwiGLU, of which `up` gives gate, then up; else GELU."""
    if len(x_PD) and uses_triton(kernels, x_PD):
        return _FeedForward.apply(x_PD, up, down, is_gated)
    pre_PG = up(x_PD)
    return down(swiglu(pre_PG, "torch") if is_gated else F.gelu(pre_PG))


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_PD: Tensor, up: Fp8Product, down: Fp8Product, is_gated: bool) -> Tensor:
        from model.fp8_kernels import activate

        pre_PG = up.forward(x_PD)
        ctx.save_for_backward(pre_PG)
        ctx.up, ctx.down, ctx.is_gated = up, down, is_gated
        return down.forward_quantised(*activate(pre_PG, is_gated), pre_PG)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_PD: Tensor) -> tuple[Tensor | None, ...]:
        from model.fp8_kernels import activate_backward

        (pre_PG,) = ctx.saved_tensors
        grad_PF = ctx.down.input_gradient(grad_PD)
        quantised = activate_backward(grad_PF, pre_PG, ctx.is_gated)
        return ctx.up.input_gradient_quantised(*quantised, pre_PG), None, None, None
