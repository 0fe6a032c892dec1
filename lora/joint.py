"""The q, k and v projections of an attention module, base layers and adapters, as one node with two wide products:

    y = [x, low] [W, s B]^T + bias,  low = drop(x) A^T        [grad_x, grad_low] = grad_y [W, s B]

W stacks the three frozen weights, A the adapters' lora_A; the scaled lora_B stand behind W, each in its own rows and
columns. So the adapters cost a few more columns of a product that runs anyway, and thin work around it. One dropout
mask serves the three. It is computed again in the backward from a seed (lora/mask.py), as is what is as wide as x;
kept are x, which the layers' own norm makes, and `low`.

Where the three base layers offer one product of their own (`lora.layers.Product`: fp8), it takes the place of W, and
the adapters' products stand beside it: y = product(x) + low (s B)^T.

Shapes: P rows, I in_features, O out_features of the three, R ranks of the adapters and padding, E = I + R.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional

from lora.joint_steps import Spans, extend, finish, pack, uses_kernels
from lora.layers import LoraLinear, Product, product_of
from lora.mask import draw_seed

NAMES = ("q_proj", "k_proj", "v_proj")
_TAIL_MULTIPLE = 64  # keeps the rows of [W, s B] aligned for every kernel


class Attention(Protocol):
    joint_projection: Callable[[Tensor], Tensor] | None


def join_projections(model: nn.Module) -> int:
    """Gives every module that offers `joint_projection` (None) and three linear projections one; returns how many."""
    parents = [
        module
        for module in model.modules()
        if hasattr(module, "joint_projection")
        and all(isinstance(getattr(module, name, None), nn.Linear | LoraLinear) for name in NAMES)
    ]
    for module in parents:
        cast(Attention, module).joint_projection = JointProjection(module)
    return len(parents)


@dataclass(frozen=True, eq=False)
class Joined:
    """Frozen storage of three linear layers, whose own weights and biases are views of it, and the adapters' copy.

    weight_OE holds W, then the scaled lora_B; bias_O zeros for a layer without one; down_RI the stacked lora_A. Beside
    a `product`, weight_OE holds the scaled lora_B alone.
    """

    weight_OE: Tensor
    bias_O: Tensor | None
    down_RI: Tensor
    spans: Spans
    r: int
    num_in: int
    product: Product | None = None

    @classmethod
    def beside(cls, product: Product, bases: list[nn.Linear], is_adapted: list[bool], r: int) -> "Joined":
        """The adapters' copy alone, in bf16."""
        with torch.inference_mode(False), torch.no_grad():
            tail = -(-r * sum(is_adapted) // _TAIL_MULTIPLE) * _TAIL_MULTIPLE
            spans, first, column = [], 0, 0
            for base, adapted in zip(bases, is_adapted, strict=True):
                end = first + base.out_features
                spans.append((first, end, column if adapted else -1))
                first, column = end, column + r * adapted
            place: dict[str, Any] = {"device": bases[0].weight.device, "dtype": torch.bfloat16}
            up_OR, down_RI = torch.zeros(first, tail, **place), torch.zeros(tail, bases[0].in_features, **place)
            return cls(up_OR, None, down_RI, tuple(spans), r, 0, product)

    @classmethod
    def of(cls, bases: list[nn.Linear], is_adapted: list[bool], r: int) -> "Joined":
        """Moves the layers' weights into one buffer. Their names, shapes and values stay as they are."""
        # A buffer made in inference mode could not be used in training.
        with torch.inference_mode(False), torch.no_grad():
            weight, num_in = bases[0].weight, bases[0].in_features
            sizes = [base.out_features for base in bases]
            tail = -(-r * sum(is_adapted) // _TAIL_MULTIPLE) * _TAIL_MULTIPLE
            weight_OE = weight.new_zeros(sum(sizes), num_in + tail)
            bias_O = weight.new_zeros(sum(sizes)) if any(base.bias is not None for base in bases) else None
            spans, first, column = [], 0, 0
            for base, adapted in zip(bases, is_adapted, strict=True):
                end = first + base.out_features
                _move(base.weight, weight_OE[first:end, :num_in])
                if base.bias is not None and bias_O is not None:
                    _move(base.bias, bias_O[first:end])
                spans.append((first, end, column if adapted else -1))
                first, column = end, column + r * adapted
            return cls(weight_OE, bias_O, weight.new_zeros(tail, num_in), tuple(spans), r, num_in)

    def holds(self, bases: list[nn.Linear], is_adapted: list[bool], r: int) -> bool:
        """False once a layer's weight lives elsewhere: after .to(), a deep copy, or an assignment."""
        if self.product is not None or any(product_of(base) is not None for base in bases):
            is_same = all(product_of(base) is self.product for base in bases)
            return is_same and r == self.r and is_adapted == [column >= 0 for _, _, column in self.spans]
        for base, adapted, (first, _, column) in zip(bases, is_adapted, self.spans, strict=True):
            if adapted != (column >= 0) or not _is_at(base.weight, self.weight_OE[first:]):
                return False
            if base.bias is not None and (self.bias_O is None or not _is_at(base.bias, self.bias_O[first:])):
                return False
        return r == self.r or not any(is_adapted)

    @property
    def places(self) -> list[tuple[Tensor, Tensor]]:
        """Where each adapter's A and scaled B go."""
        columns = [(first, end, column) for first, end, column in self.spans if column >= 0]
        return [
            (
                self.down_RI[column : column + self.r],
                self.weight_OE[first:end, self.num_in + column : self.num_in + column + self.r],
            )
            for first, end, column in columns
        ]


class JointProjection:
    """Called as [..., I] -> [..., O]: what the projections of `module` give, side by side.

    Falls back to the three layers where one product would not be the same: trained or merged layers, unlike dtypes
    (autocast over an fp32 base), adapters of unlike rank, scale or dropout.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.joined: Joined | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"module": self.module, "joined": None}  # a copy's weights are its own: it joins them anew

    def __call__(self, x: Tensor) -> Tensor:
        layers = [getattr(self.module, name) for name in NAMES]
        adapters = [layer for layer in layers if isinstance(layer, LoraLinear)]
        bases = [layer.base_layer if isinstance(layer, LoraLinear) else layer for layer in layers]
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        if not x.numel() or not _can_join(adapters, bases, dtype):
            return torch.cat([layer(x) for layer in layers], dim=-1)
        is_adapted = [isinstance(layer, LoraLinear) for layer in layers]
        r = adapters[0].r if adapters else 0
        product = product_of(bases[0])
        if product is not None and not adapters:
            return product(x.to(dtype))
        if self.joined is None or not self.joined.holds(bases, is_adapted, r):
            self.joined = (
                Joined.of(bases, is_adapted, r) if product is None else Joined.beside(product, bases, is_adapted, r)
            )
        if not adapters:
            return functional.linear(x.to(dtype), self.joined.weight_OE[:, : self.joined.num_in], self.joined.bias_O)
        first = adapters[0]
        dropout = first.dropout if first.training else 0.0
        masters = [master for layer in adapters for master in (layer.lora_A, layer.lora_B)]
        return joint_linear(x.to(dtype), self.joined, masters, first.scaling, dropout)


def joint_linear(
    x: Tensor,
    joined: Joined,
    masters: list[nn.Parameter],
    scaling: float,
    dropout: float,
    kernels: bool | None = None,
) -> Tensor:
    """[..., I] -> [..., O]. masters: lora_A [r, I] and lora_B [O', r] of each adapted projection in turn.

    kernels: Triton for the thin work, or torch; None chooses by device.
    """
    if kernels is None:
        kernels = uses_kernels(x.device, x.dtype)
    seed_1 = draw_seed(x.device) if dropout else torch.empty(1, dtype=torch.int64, device=x.device)
    return _JointLinear.apply(x, joined, seed_1, scaling, dropout, kernels, *masters)


class _JointLinear(torch.autograd.Function):
    """Keeps x as it came, `low` [P, R], the seed and the masters; the frozen storage is not copied."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        joined: Joined,
        seed_1: Tensor,
        scaling: float,
        dropout: float,
        kernels: bool,
        *masters: Tensor,
    ) -> Tensor:
        x_PI = _rows(x)
        pack(list(zip(masters[::2], masters[1::2], strict=True)), joined.places, scaling, kernels)
        x_PE, low_PR = extend(x_PI, joined.down_RI, seed_1, dropout, kernels)
        if joined.product is None:
            y_PO = functional.linear(x_PE, joined.weight_OE, joined.bias_O)
        else:
            y_PO = joined.product.forward(x_PI).addmm_(low_PR, joined.weight_OE.T)
        # The masters are not read again: kept, they make autograd refuse a backward after they have changed.
        ctx.save_for_backward(x, low_PR, seed_1, *masters)
        ctx.joined, ctx.scaling, ctx.dropout, ctx.kernels = joined, scaling, dropout, kernels
        return y_PO.view(*x.shape[:-1], y_PO.shape[-1])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
        x, low_PR, seed_1, *_ = ctx.saved_tensors
        joined: Joined = ctx.joined
        needs_x, needs_masters = ctx.needs_input_grad[0], ctx.needs_input_grad[6:]
        needs = (needs_x, any(needs_masters[::2]), any(needs_masters[1::2]))
        grad_PO = _rows(grad_y)
        grad_PE = grad_PO @ (joined.weight_OE if needs_x else joined.weight_OE[:, joined.num_in :])
        if needs_x and joined.product is not None:
            grad_PE = torch.cat([joined.product.input_gradient(grad_PO), grad_PE], dim=1)
        grad_x, grad_A_RI, grad_B_Or = finish(
            *(grad_PE, grad_PO, _rows(x), low_PR, joined.down_RI, seed_1, ctx.dropout),
            *(joined.spans, joined.r, ctx.scaling, needs, ctx.kernels),
        )
        grads: list[Tensor | None] = []
        for first, end, column in joined.spans:
            if column >= 0:
                grads.append(None if grad_A_RI is None else grad_A_RI[column : column + joined.r])
                grads.append(None if grad_B_Or is None else grad_B_Or[first:end])
        wanted = [grad if needed else None for grad, needed in zip(grads, needs_masters, strict=True)]
        return None if grad_x is None else grad_x.view(x.shape), None, None, None, None, None, *wanted


def _can_join(adapters: list[LoraLinear], bases: list[nn.Linear], dtype: torch.dtype) -> bool:
    products = {id(product_of(base)) for base in bases}
    if product_of(bases[0]) is not None:
        if len(products) > 1 or dtype != torch.bfloat16:
            return False
    elif len(products) > 1 or any(base.weight.dtype != dtype or base.weight.requires_grad for base in bases):
        return False
    if any(base.bias is not None and (base.bias.dtype != dtype or base.bias.requires_grad) for base in bases):
        return False
    alike = {(layer.r, layer.scaling, layer.dropout, layer.training) for layer in adapters}
    return len(alike) <= 1 and not any(layer.merged for layer in adapters)


def _move(parameter: Tensor, place: Tensor) -> None:
    place.copy_(parameter)
    parameter.data = place


def _is_at(parameter: Tensor, place: Tensor) -> bool:
    return parameter.data_ptr() == place.data_ptr() and parameter.stride(0) == place.stride(0)


def _rows(x: Tensor) -> Tensor:
    """[..., D] as [rows, D] whose elements within a row are neighbours."""
    x = x.reshape(-1, x.shape[-1])
    return x if x.stride(1) == 1 else x.contiguous()
