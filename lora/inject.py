"""Puts adapters into a model, by full module path."""

import difflib
import re
from collections.abc import Iterator
from fnmatch import fnmatchcase

import torch
from torch import nn

from lora.joint import join_projections
from lora.layers import LoraLinear
from lora.settings import LoraSettings

NUM_SUGGESTIONS = 5


def inject_lora(model: nn.Module, settings: LoraSettings, generator: torch.Generator | None = None) -> list[str]:
    """Replaces every nn.Linear whose full path matches one of `settings.lora_targets` by a LoraLinear around it.

    Returns the paths, sorted. The wrapped layers are frozen; whatever else the model holds stays as it is. `generator`
    draws the initial weights (None: torch's own), in the order of the returned paths. Attention modules get a
    `joint_projection` (lora/joint.py) where they offer the place.
    Raises ValueError for a pattern that matches no linear layer, naming close paths, and for a model that has adapters.
    """
    present = sorted(path for path, _ in lora_layers(model))
    if present:
        raise ValueError(f"the model already has {len(present)} adapters, the first at {present[0]}; inject only once")
    modules = dict(model.named_modules())
    linears = sorted(path for path, module in modules.items() if isinstance(module, nn.Linear))
    targets: set[str] = set()
    for pattern in settings.lora_targets:
        matched = [path for path in linears if fnmatchcase(path, pattern)]
        if not matched:
            others = [path for path in modules if fnmatchcase(path, pattern)]
            raise ValueError(_no_match(pattern, others, linears, modules))
        targets.update(matched)
    for path in sorted(targets):
        parent_path, _, name = path.rpartition(".")
        layer = LoraLinear(
            modules[path],  # type: ignore[arg-type]
            settings.lora_r,
            settings.lora_alpha,
            settings.lora_dropout,
            settings.lora_fused,
            generator,
        )
        setattr(modules[parent_path], name, layer.train(modules[path].training))
    if settings.lora_fused and settings.lora_joint:
        join_projections(model)
    return sorted(targets)


def lora_layers(model: nn.Module) -> Iterator[tuple[str, LoraLinear]]:
    """(full path, layer) of every adapter, in module order."""
    for path, module in model.named_modules():
        if isinstance(module, LoraLinear):
            yield path, module


def lora_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """(full name, parameter) of every lora_A and lora_B, sorted by name: the same order on every rank."""
    return sorted(
        (f"{path}.{name}", parameter)
        for path, layer in lora_layers(model)
        for name, parameter in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
    )


def _no_match(pattern: str, others: list[str], linears: list[str], modules: dict[str, nn.Module]) -> str:
    if others:
        kinds = ", ".join(f"{path} ({type(modules[path]).__name__})" for path in others[:NUM_SUGGESTIONS])
        return f"lora_targets: {pattern!r} matches only modules that are not linear layers: {kinds}"
    # One line for all layers of a tower: layers.0, layers.1, ... read layers.*
    shapes = sorted({re.sub(r"\.\d+\.", ".*.", path) for path in linears})
    near = difflib.get_close_matches(re.sub(r"\.\d+\.", ".*.", pattern), shapes, NUM_SUGGESTIONS, cutoff=0.0)
    return f"lora_targets: {pattern!r} matches no module; the nearest linear layers: {', '.join(near) or 'none at all'}"
