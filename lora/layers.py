"""A frozen linear layer with a trainable low-rank correction (Hu et al. 2021, "LoRA"):

    y = x W^T + bias + (alpha / r) * dropout(x) A^T B^T

Shapes: `...` any leading dimensions, F rows of the input flattened, I in_features, O out_features, R rank.
"""

import math
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional


class Product(Protocol):
    """A frozen linear map with an arithmetic of its own, which a base layer may offer as its attribute `product`: the
    rows of that layer, or of its siblings too. Called with [..., I] it lets gradients through; the rest does not."""

    def __call__(self, x: Tensor) -> Tensor: ...

    def forward(self, x_PI: Tensor) -> Tensor: ...

    def input_gradient(self, grad_PO: Tensor) -> Tensor: ...


def product_of(base_layer: nn.Module) -> Product | None:
    """None: a plain layer, whose weight may be multiplied with."""
    return cast("Product | None", getattr(base_layer, "product", None))


class LoraLinear(nn.Module):
    """Wraps `base_layer`, which is frozen. `lora_A` [R, I] and `lora_B` [O, R] are fp32 masters; the arithmetic runs in
    the dtype of the input, or of the autocast in force. B starts at zero, so at first the layer equals its base.

    Parameters are named lora_A and lora_B under the wrapped layer's own path, the base under `base_layer`.
    """

    def __init__(
        self,
        base_layer: nn.Linear,
        r: int,
        alpha: float,
        dropout: float,
        fused: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__()
        self.in_features, self.out_features = base_layer.in_features, base_layer.out_features
        self.r, self.alpha, self.dropout, self.fused = r, alpha, dropout, fused
        self.base_layer = base_layer.requires_grad_(False)
        # fp64 models (parity tests) keep fp64 adapters.
        weight = base_layer.weight
        dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
        self.lora_A = nn.Parameter(torch.empty(r, self.in_features, dtype=dtype, device=weight.device))
        self.lora_B = nn.Parameter(torch.zeros(self.out_features, r, dtype=dtype, device=weight.device))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5), generator=generator)  # PEFT's
        self.unmerged_weight: Tensor | None = None  # the base weight, on the CPU, while the adapter is merged into it

    @property
    def scaling(self) -> float:
        return self.alpha / self.r

    @property
    def merged(self) -> bool:
        return self.unmerged_weight is not None

    def delta(self) -> Tensor:
        """What the adapter adds to the base weight, [O, I], in the masters' dtype."""
        return (self.lora_B.detach() @ self.lora_A.detach()) * self.scaling

    def forward(self, x: Tensor) -> Tensor:
        """[..., I] -> [..., O]. Raises RuntimeError when asked to train while merged."""
        if self.merged:
            if self.training and torch.is_grad_enabled():
                raise RuntimeError("adapters are merged into the base weights and cannot be trained; unmerge first")
            return _base_linear(x, self.base_layer.weight, self.base_layer.bias)
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        dropout = self.dropout if self.training else 0.0
        if product_of(self.base_layer) is not None:
            x = x.to(dtype)
            return self.base_layer(x) + _correction(
                x, self.lora_A.to(dtype), self.lora_B.to(dtype), self.scaling, dropout
            )
        linear = fused_lora_linear if self.fused else plain_lora_linear
        return linear(
            x.to(dtype),
            self.base_layer.weight,
            self.base_layer.bias,
            self.lora_A.to(dtype),
            self.lora_B.to(dtype),
            self.scaling,
            dropout,
        )

    def extra_repr(self) -> str:
        return f"r={self.r}, alpha={self.alpha}, dropout={self.dropout}, fused={self.fused}, merged={self.merged}"


def keep_mask(x: Tensor, dropout: float) -> Tensor:
    """bool like x, false with chance `dropout`. Drawn from torch's own generator, so that checkpointing, which restores
    its state, replays the very same mask."""
    return torch.empty(x.shape, dtype=torch.bool, device=x.device).bernoulli_(1.0 - dropout)


def plain_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """The formula above, step by step: the reference for the fused form."""
    return _base_linear(x, weight, bias) + _correction(x, lora_A, lora_B, scaling, dropout)


def _correction(x: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float) -> Tensor:
    if dropout:
        x = x * keep_mask(x, dropout) * (1.0 / (1.0 - dropout))
    return functional.linear(functional.linear(x, lora_A), lora_B) * scaling


def fused_lora_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, scaling: float, dropout: float
) -> Tensor:
    """The same as `plain_lora_linear`, same mask for the same generator state, as one autograd node."""
    return _FusedLoraLinear.apply(x, weight, bias, lora_A, lora_B, scaling, dropout)


class _FusedLoraLinear(torch.autograd.Function):
    """Keeps for backward: x (which the sibling projections share), the low-rank activation [F, R], the parameters, and
    one byte an element for the dropout mask. No dropped copy of x, no second [F, O] output, no gradient of the weight.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        lora_A: Tensor,
        lora_B: Tensor,
        scaling: float,
        dropout: float,
    ) -> Tensor:
        x_FI = x.reshape(-1, x.shape[-1])
        y_FO = _base_linear(x_FI, weight, bias)
        keep_FI = keep_mask(x_FI, dropout) if dropout else None
        low_FR = _drop(x_FI, keep_FI, dropout) @ lora_A.T
        y_FO.addmm_(low_FR, lora_B.T, alpha=scaling)
        # The weight is saved as it is: a cast copy, under autocast over an fp32 base, would live until backward.
        ctx.save_for_backward(x, weight, lora_A, lora_B, low_FR, keep_FI)
        ctx.scaling, ctx.dropout = scaling, dropout
        return y_FO.view(*x.shape[:-1], y_FO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, lora_A, lora_B, low_FR, keep_FI = ctx.saved_tensors
        needs_x, _, _, needs_A, needs_B, _, _ = ctx.needs_input_grad
        grad_FO = grad_y.reshape(-1, grad_y.shape[-1])
        grad_low_FR = (grad_FO @ lora_B) * ctx.scaling
        grad_x = grad_A = grad_B = None
        if needs_A:
            grad_A = grad_low_FR.T @ _drop(x.reshape(-1, x.shape[-1]), keep_FI, ctx.dropout)
        if needs_B:
            grad_B = (grad_FO.T @ low_FR) * ctx.scaling
        if needs_x:
            grad_FI = grad_FO @ weight.to(grad_FO.dtype)
            if keep_FI is None:
                grad_FI.addmm_(grad_low_FR, lora_A)
            else:
                grad_FI.add_((grad_low_FR @ lora_A).mul_(keep_FI), alpha=1.0 / (1.0 - ctx.dropout))
            grad_x = grad_FI.view(x.shape)
        return grad_x, None, None, grad_A, grad_B, None, None


def _base_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


def _drop(x_FI: Tensor, keep_FI: Tensor | None, dropout: float) -> Tensor:
    return x_FI if keep_FI is None else x_FI * keep_FI * (1.0 / (1.0 - dropout))
