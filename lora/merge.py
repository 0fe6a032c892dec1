"""Adapters folded into their base weights: no cost at inference, and plain checkpoints for other programs."""

import torch
from torch import Tensor, nn

from lora.inject import lora_layers
from lora.layers import LoraLinear, product_of


@torch.no_grad()
def merge(model: nn.Module) -> None:
    """In place: W + (alpha / r) B A, added in fp32 and rounded once to W's dtype. Layers already merged stay.

    Each base weight is kept on the CPU meanwhile, as W + delta - delta would not come back exactly. Raises ValueError
    for a base in fp8, as all here do.
    """
    for path, layer in lora_layers(model):
        _refuse_products(path, layer)
        if not layer.merged:
            weight = layer.base_layer.weight
            original = weight.detach().to("cpu", copy=True)
            weight.copy_(merged_weight(weight, layer.delta()))
            layer.unmerged_weight = original


@torch.no_grad()
def fold(model: nn.Module) -> None:
    """In place and for good: every adapter gives way to a plain linear layer with its merged weight. For inference."""
    for path, layer in list(lora_layers(model)):
        _refuse_products(path, layer)
        weight = layer.base_layer.weight
        if not layer.merged:
            weight.copy_(merged_weight(weight, layer.delta()))
        parent_path, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent_path), name, layer.base_layer)


@torch.no_grad()
def unmerge(model: nn.Module) -> None:
    """In place: every base weight bit for bit as it was before `merge`."""
    for _, layer in lora_layers(model):
        if layer.unmerged_weight is not None:
            layer.base_layer.weight.copy_(layer.unmerged_weight)
            layer.unmerged_weight = None


@torch.no_grad()
def merged_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of the model as if it had never had adapters: plain names, merged weights, base dtype.

    The model stays as it is; tensors without an adapter are the model's own, not copies.
    """
    state = {name: value.detach() for name, value in model.state_dict().items()}
    for path, layer in lora_layers(model):
        _refuse_products(path, layer)
        del state[f"{path}.lora_A"], state[f"{path}.lora_B"]
        weight = state.pop(f"{path}.base_layer.weight")
        state[f"{path}.weight"] = weight if layer.merged else merged_weight(weight, layer.delta())
        if layer.base_layer.bias is not None:
            state[f"{path}.bias"] = state.pop(f"{path}.base_layer.bias")
    return state


def merged_weight(weight: Tensor, delta: Tensor) -> Tensor:
    """weight + delta, added in delta's dtype (fp32 or wider) and rounded once to the weight's."""
    return (weight.detach().to(delta.dtype) + delta).to(weight.dtype)


def _refuse_products(path: str, layer: LoraLinear) -> None:
    """An adapter is far finer than the steps of fp8: added to such a weight, it would be rounded away."""
    if product_of(layer.base_layer) is not None:
        raise ValueError(
            f"base_dtype: the weight under {path} is kept in fp8 alone, into which no adapter can be merged; "
            "open the model with base_dtype bf16 (or fp32) and merge there"
        )
