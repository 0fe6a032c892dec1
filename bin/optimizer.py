"""AdamW's parameter groups: what decays, and what learns slower because it starts from pretrained weights."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch.nn import Parameter


def parameter_groups(
    named: Iterable[tuple[str, Parameter]],
    sources: Mapping[str, str],
    weight_decay: float,
    pretrained_lr_scale: float,
) -> list[dict[str, Any]]:
    """Up to four groups, each with `weight_decay` and `lr_scale`; groups without a parameter are left out.

    Matrices decay; biases, norms and the temperature do not (decay would pull 1/tau towards 1). Parameters of a tower
    that `sources` (of model.build.Built) names a checkpoint for get `pretrained_lr_scale`, adapters excepted: they are
    new, whatever they are attached to.
    """
    groups: dict[tuple[float, float], list[Parameter]] = {}
    for name, parameter in named:
        part, leaf = name.partition(".")[0], name.rpartition(".")[2]
        is_pretrained = sources.get(part, "random") != "random" and leaf not in ("lora_A", "lora_B")
        decay = weight_decay if parameter.ndim >= 2 else 0.0
        groups.setdefault((decay, pretrained_lr_scale if is_pretrained else 1.0), []).append(parameter)
    return [{"params": p, "weight_decay": decay, "lr_scale": scale} for (decay, scale), p in groups.items()]
