"""Products with frozen weights in fp8 (e4m3), both ways: about 1.7 times bf16's rate on chips that have it.

    y = q(x) q(W)^T * scale_x scale_W + bias          grad_x = q(grad_y) q(W') * scale_g scale_W'

Each row of x and of grad_y has its own scale, found as it is quantised (amax / 448), so nothing is calibrated or kept
from step to step. W is quantised once, with a scale for each output; W' is a second copy with a scale for each input,
for the product backwards sums over outputs. Together they take what the bf16 weight took, which is dropped. Nothing of
x is kept. The format: Micikevicius et al. 2022 (https://arxiv.org/abs/2209.05433). Gradients are e4m3 too: with a scale
for each row, e5m2's range is of no use, and e4m3 rounds finer.

Without a GPU the same numbers are multiplied in fp32, for tests, and come back in the dtype of x.

Shapes: P rows, I in_features, O out_features.
"""

import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from model.kernels import uses_triton

logger = logging.getLogger(__name__)

LARGEST = 448.0
"""Of e4m3."""
MULTIPLE = 16
"""What widths must be divisible by, and what rows are filled up to."""
LEAST_AMAX = 1e-30
"""Rows of zeros have a scale, too."""
LEAST_ADAPTED_WIDTH = 2048
"""q, k and v of a narrower attention stay as they are: adapters are one product with a bf16 weight (lora/joint.py), but
another pass over the output beside an fp8 one, which costs a narrow product all that fp8 saves."""
_JOINT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
_ALONE = ("out_proj", "fc1", "fc2", "o_proj", "down_proj")
_TOWERS = ("audio_tower.", "language_model.")


def quantise_rows(x_PI: Tensor, kernels: str = "auto") -> tuple[Tensor, Tensor]:
    """(e4m3 [P', I], scale fp32 [P', 1]) with x close to their product; P' is P filled up to a multiple of 16 with rows
    of zeros. NaN stays NaN, and a row with an infinity becomes NaN in places."""
    x_PI = x_PI.contiguous()
    if uses_triton(kernels, x_PI):
        from model.fp8_kernels import quantise_rows as fused

        return fused(x_PI)
    num_rows = filled(len(x_PI))
    x = torch.nn.functional.pad(x_PI.float(), (0, 0, 0, num_rows - len(x_PI)))
    amax_P1 = x.abs().amax(dim=1, keepdim=True).clamp(min=LEAST_AMAX)
    return (x * (LARGEST / amax_P1)).to(torch.float8_e4m3fn), amax_P1 / LARGEST


def filled(num_rows: int) -> int:
    return -(-num_rows // MULTIPLE) * MULTIPLE


@dataclass(frozen=True, eq=False)
class Fp8Product:
    """A frozen weight's two copies. Called with [..., I] it gives [..., O], in bf16, and lets gradients through."""

    weight_OI: Tensor
    scale_1O: Tensor
    weight_IO: Tensor
    scale_1I: Tensor
    bias_O: Tensor | None
    kernels: str = "auto"

    @classmethod
    @torch.no_grad()
    def of(cls, weight_OI: Tensor, bias_O: Tensor | None, kernels: str = "auto") -> "Fp8Product":
        """Quantises a weight; `bias_O` in bf16, or None."""
        forth, scale_O1 = quantise_rows(weight_OI, kernels)
        back, scale_I1 = quantise_rows(weight_OI.T, kernels)
        return cls(forth, scale_O1.reshape(1, -1), back, scale_I1.reshape(1, -1), bias_O, kernels)

    def rows(self, first: int, end: int) -> "Fp8Product":
        """The product with some of the weight's rows alone; backwards it copies them at each use."""
        if (first, end) == (0, len(self.weight_OI)):
            return self
        return replace(
            self,
            weight_OI=self.weight_OI[first:end],
            scale_1O=self.scale_1O[:, first:end],
            weight_IO=self.weight_IO[:, first:end],
            bias_O=None if self.bias_O is None else self.bias_O[first:end],
        )

    def __call__(self, x: Tensor) -> Tensor:
        return _Product.apply(x, self)

    def forward(self, x_PI: Tensor) -> Tensor:
        """[P, O], without a history."""
        return self.forward_quantised(*quantise_rows(x_PI, self.kernels), x_PI)

    def input_gradient(self, grad_PO: Tensor) -> Tensor:
        """[P, I]."""
        return self.input_gradient_quantised(*quantise_rows(grad_PO, self.kernels), grad_PO)

    def forward_quantised(self, rows_PI: Tensor, scale_P1: Tensor, like: Tensor) -> Tensor:
        """`forward` of what `quantise_rows` gives; as many rows as `like`, and on a CPU in its dtype."""
        return _multiply(rows_PI, scale_P1, self.weight_OI, self.scale_1O, self.bias_O, like)

    def input_gradient_quantised(self, rows_PO: Tensor, scale_P1: Tensor, like: Tensor) -> Tensor:
        """Likewise."""
        return _multiply(rows_PO, scale_P1, self.weight_IO, self.scale_1I, None, like)


def _multiply(
    rows_PK: Tensor, scale_P1: Tensor, weight_NK: Tensor, scale_1N: Tensor, bias_N: Tensor | None, like: Tensor
) -> Tensor:
    if not len(like):
        return like.new_empty(0, len(weight_NK))
    if rows_PK.device.type != "cuda":
        product = rows_PK.float() @ weight_NK.float().T * scale_P1 * scale_1N
        product = product if bias_N is None else product + bias_N
        return product.to(like.dtype)[: len(like)]
    product = torch._scaled_mm(
        rows_PK,
        weight_NK.contiguous().t(),  # column-major, as the kernel wants it
        scale_a=scale_P1,
        scale_b=scale_1N,
        bias=bias_N,
        out_dtype=torch.bfloat16,
        use_fast_accum=True,
    )
    return product[: len(like)]


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, product: Fp8Product) -> Tensor:
        ctx.product, ctx.shape = product, x.shape
        return product.forward(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], len(product.weight_OI))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return ctx.product.input_gradient(grad.reshape(-1, grad.shape[-1])).view(ctx.shape), None


class Fp8Linear(nn.Linear):
    """A frozen nn.Linear as some rows of a product that it may share with its siblings. Its `weight` is e4m3 without
    its scale: good for its shape and place, not for arithmetic."""

    def __init__(self, product: Fp8Product, first: int, end: int, has_bias: bool) -> None:
        super().__init__(product.weight_OI.shape[1], end - first, bias=False, device="meta")
        self.product, self.first, self.end = product, first, end
        self.weight = nn.Parameter(product.weight_OI[first:end], requires_grad=False)
        if has_bias:
            assert product.bias_O is not None
            self.bias = nn.Parameter(product.bias_O[first:end], requires_grad=False)

    def forward(self, input: Tensor) -> Tensor:
        return self.product.rows(self.first, self.end)(input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, fp8"


def shared_product(*layers: nn.Module) -> Fp8Product | None:
    """The product whose rows are those of the layers, in their order; None where there is none."""
    place, product = 0, None
    for layer in layers:
        if not isinstance(layer, Fp8Linear) or layer.first != place or product not in (None, layer.product):
            return None
        place, product = layer.end, layer.product
    return product if product is not None and place == len(product.weight_OI) else None


def why_no_fp8(device: torch.device, compute_dtype: torch.dtype) -> str | None:
    """What keeps a device from fp8 products; None: nothing."""
    if device.type != "cuda":
        return f"needs a CUDA device, not {device.type}"
    if (capability := torch.cuda.get_device_capability(device)) < (8, 9):
        name = torch.cuda.get_device_name(device)
        return f"needs compute capability 8.9 (Ada, Hopper) or more; {name} has {capability[0]}.{capability[1]}"
    if compute_dtype != torch.bfloat16:
        return f"computes in bf16, not {compute_dtype}"
    return None


def check_widths(model: nn.Module) -> None:
    """Raises ValueError for a frozen layer that fp8 cannot take; on the meta device, too."""
    for path, names in _groups(model, 0):
        for layer in _layers(model, path, names):
            width = next((w for w in (layer.in_features, layer.out_features) if w % MULTIPLE), None)
            if width is not None:
                raise ValueError(
                    f"base_dtype: got 'fp8', but {path} has a layer of width {width}; "
                    f"widths must be multiples of {MULTIPLE}; use bf16"
                )


def quantise_frozen(model: nn.Module, least_adapted_width: int = LEAST_ADAPTED_WIDTH, kernels: str = "auto") -> int:
    """In place: the towers' frozen bf16 linear layers in fp8, one after the other, so that no more memory is taken than
    the model holds already. Returns the number of products."""
    groups = list(_groups(model, least_adapted_width))
    for path, names in groups:
        _quantise_group(model, path, names, kernels)
    logger.info("%d products with frozen weights in fp8", len(groups))
    return len(groups)


def _quantise_group(model: nn.Module, path: str, names: tuple[str, ...], kernels: str) -> None:
    layers = _layers(model, path, names)
    weight_OI = torch.cat([layer.weight.detach() for layer in layers])
    bias_O = None
    if any(layer.bias is not None for layer in layers):
        zeros = [weight_OI.new_zeros(layer.out_features) for layer in layers]
        bias_O = torch.cat([z if p.bias is None else p.bias.detach() for p, z in zip(layers, zeros, strict=True)])
    product, first = Fp8Product.of(weight_OI, bias_O, kernels), 0
    for name, layer in zip(names, layers, strict=True):
        end = first + layer.out_features
        quantised = Fp8Linear(product, first, end, layer.bias is not None).train(layer.training)
        setattr(model.get_submodule(path), name, quantised)
        first = end


def _layers(model: nn.Module, path: str, names: tuple[str, ...]) -> list[nn.Linear]:
    return [cast(nn.Linear, model.get_submodule(f"{path}.{name}")) for name in names]


def _groups(model: nn.Module, least_adapted_width: int) -> Iterator[tuple[str, tuple[str, ...]]]:
    """(path of the parent, names of the layers) of what is one product each."""
    for path, module in list(model.named_modules()):
        if not path.startswith(_TOWERS):
            continue
        for names in (*_JOINT, *((name,) for name in _ALONE)):
            layers = [part for name in names if isinstance(part := getattr(module, name, None), nn.Linear)]
            if len(layers) < len(names) or (names[0] == "q_proj" and layers[0].in_features < least_adapted_width):
                continue
            yield path, names
