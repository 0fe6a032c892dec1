"""What a resumed run needs beside the weights: optimizer, learning-rate schedule and random state, as tensors and JSON.

Settings given anew at a resume win over saved ones; only progress is restored.
"""

import logging
from collections.abc import Iterable, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ReduceLROnPlateau

from distributed.flat import FlatParameters, Piece

logger = logging.getLogger(__name__)

NamedParameters = Iterable[tuple[str, Parameter]]

PROGRESS = ("lr", "initial_lr")  # what schedules change in a parameter group
HOW_TO_COMPUTE = ("params", "foreach", "fused", "capturable", "differentiable")  # not part of the result


# --- optimizer -------------------------------------------------------------------------------------------------------


def pack_optimizer(
    optimizer: Optimizer, named_params: NamedParameters, flat: FlatParameters | None = None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(tensors named `parameter/state`, strict-JSON hyperparameters) of an optimizer whose state is tensors (AdamW).

    AdamW: step [] fp32, exp_avg and exp_avg_sq in the parameter's shape and dtype. Hyperparameters: one entry a
    parameter group, with the names of its parameters. `flat` tells what an optimizer over flat parameters holds: the
    result is the same as that of one over the parameters themselves.
    """
    held = _held(named_params, flat)
    tensors: dict[str, Tensor] = {}
    groups = []
    for group in optimizer.param_groups:
        if any(param not in held for param in group["params"]):
            raise ValueError("the optimizer holds a parameter that named_params does not name; pass all of them")
        names = [piece.name for param in group["params"] for piece in held[param]]
        groups.append({"params": names} | {k: _plain(v) for k, v in group.items() if k not in HOW_TO_COMPUTE})
        for param in group["params"]:
            for key, value in optimizer.state.get(param, {}).items():
                if not isinstance(value, Tensor):
                    raise ValueError(f"optimizer state {key} is a {type(value).__name__}; allowed: tensors")
                for piece in held[param]:
                    # A copy of its own where one number counts for all: a file holds no tensor twice.
                    own = value.clone() if key == "step" else piece.of(value)
                    tensors[f"{piece.name}/{key}"] = own.detach()
    return tensors, {"class": type(optimizer).__name__, "groups": groups, "state": sorted(tensors)}


def unpack_optimizer(
    optimizer: Optimizer,
    named_params: NamedParameters,
    tensors: Mapping[str, Tensor],
    hyper: Mapping[str, Any],
    flat: FlatParameters | None = None,
) -> None:
    """Restore what `pack_optimizer` took, bit by bit, into an optimizer over parameters of the same names, flat or not.

    The learning rate is restored as progress; other hyperparameters stay as newly given, and a change is logged. Raises
    ValueError, before anything is changed, when the optimizer's class, names, groups or shapes differ.
    """
    if hyper["class"] != type(optimizer).__name__:
        raise ValueError(f"the checkpoint is of optimizer {hyper['class']}, this run uses {type(optimizer).__name__}")
    param_of = dict(named_params)
    held = _held(param_of.items(), flat)
    ours = [
        [piece.name for param in group["params"] for piece in held.get(param, [Piece("?", param)])]
        for group in optimizer.param_groups
    ]
    saved = [group["params"] for group in hyper["groups"]]
    if [sorted(names) for names in ours] != [sorted(names) for names in saved]:
        own_names, saved_names = set(chain(*ours)), set(chain(*saved))
        raise ValueError(
            "the optimizer state is of other parameters: "
            f"missing {_few(own_names - saved_names)}, unexpected {_few(saved_names - own_names)}, "
            f"groups of {[len(n) for n in saved]} parameters, now {[len(n) for n in ours]}; "
            "resume with the settings of the saved run"
        )
    if tensors.keys() != set(hyper["state"]):
        raise ValueError(
            f"the optimizer state is not whole: missing {_few(set(hyper['state']) - tensors.keys())}, "
            f"unexpected {_few(tensors.keys() - set(hyper['state']))}"
        )
    states: dict[str, dict[str, Tensor]] = {}
    for full_name, value in tensors.items():
        name, _, key = full_name.rpartition("/")
        if value.ndim and value.shape != param_of[name].shape:
            raise ValueError(
                f"optimizer state {full_name} has shape {tuple(value.shape)}; allowed: {tuple(param_of[name].shape)}"
            )
        states.setdefault(name, {})[key] = value
    joined = {
        param: _joined(param, held[param], states, bool(group.get("fused") or group.get("capturable")))
        for group in optimizer.param_groups
        for param in group["params"]
    }

    optimizer.state.clear()
    for group, saved_group in zip(optimizer.param_groups, hyper["groups"], strict=True):
        for key, value in saved_group.items():
            if key in PROGRESS and isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            elif key in PROGRESS:
                group[key] = value
            elif key != "params" and key in group and _plain(group[key]) != value:
                logger.warning("optimizer setting %s is now %s; the checkpoint had %s", key, group[key], value)
    optimizer.state.update({param: state for param, state in joined.items() if state})


def _held(named_params: NamedParameters, flat: FlatParameters | None) -> Mapping[Parameter, list[Piece]]:
    """Which named parameters each parameter of the optimizer holds: itself, or with `flat` those of its group."""
    return flat.pieces if flat is not None else {param: [Piece(name, param)] for name, param in named_params}


def _joined(
    param: Parameter, pieces: list[Piece], states: Mapping[str, Mapping[str, Tensor]], steps_on_device: bool
) -> dict[str, Tensor]:
    """The state of one parameter of the optimizer from the states of the named ones it holds; empty: there is none."""
    saved = [states.get(piece.name, {}) for piece in pieces]
    if any(state.keys() != saved[0].keys() for state in saved):
        raise ValueError("some parameters of a group have optimizer state and some have none; use --no-flat_optimizer")
    joined = {}
    for key in saved[0]:
        if key == "step":  # AdamW reads it on the CPU, unless its kernel advances it
            steps = {float(state[key]) for state in saved}
            if len(steps) > 1:
                raise ValueError(
                    f"parameters of a group have had {min(steps):g} to {max(steps):g} updates; use --no-flat_optimizer"
                )
            joined[key] = saved[0][key].to(param.device, copy=True) if steps_on_device else saved[0][key].clone()
            continue
        joined[key] = torch.zeros_like(param, dtype=saved[0][key].dtype, requires_grad=False)
        for piece, state in zip(pieces, saved, strict=True):
            piece.of(joined[key]).copy_(state[key])
    return joined


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.item()
    return list(value) if isinstance(value, tuple) else value


def _few(names: set[str]) -> str:
    shown = ", ".join(sorted(names)[:8]) or "none"
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


# --- learning-rate schedule ------------------------------------------------------------------------------------------


def pack_plateau(scheduler: ReduceLROnPlateau) -> dict[str, Any]:
    """Progress of a ReduceLROnPlateau as strict JSON; an infinite `best` (no measurement yet) becomes null."""
    best = float(scheduler.best)
    return {
        "mode": scheduler.mode,
        "best": best if abs(best) < float("inf") else None,
        "num_bad_epochs": scheduler.num_bad_epochs,
        "cooldown_counter": scheduler.cooldown_counter,
        "last_epoch": scheduler.last_epoch,
        "last_lr": [float(lr) for lr in scheduler.get_last_lr()],
    }


def unpack_plateau(scheduler: ReduceLROnPlateau, progress: Mapping[str, Any]) -> None:
    """Restore progress alone: patience, factor, threshold and min_lr stay as newly given.

    (`load_state_dict` would overwrite them with the saved ones.) The optimizer's own learning rate is not touched.
    """
    if progress["mode"] != scheduler.mode:
        raise ValueError(
            f"the schedule's mode is {scheduler.mode!r}; the checkpoint was saved with {progress['mode']!r}"
        )
    unmeasured = float("inf") if scheduler.mode == "min" else float("-inf")
    scheduler.best = unmeasured if progress["best"] is None else progress["best"]
    scheduler.num_bad_epochs = progress["num_bad_epochs"]
    scheduler.cooldown_counter = progress["cooldown_counter"]
    scheduler.last_epoch = progress["last_epoch"]
    scheduler._last_lr = list(progress["last_lr"])


# --- random state ----------------------------------------------------------------------------------------------------


def pack_rng() -> dict[str, Tensor]:
    """torch's random state of this process: `cpu` and, with a GPU in use, `cuda` (its current device), uint8."""
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def restore_rng(states: Mapping[str, Tensor]) -> None:
    """Set what `pack_rng` took. A CUDA state without a GPU here is left out, with a warning."""
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        if torch.cuda.is_available():
            torch.cuda.set_rng_state(states["cuda"])
        else:
            logger.warning("the checkpoint has a CUDA random state but there is no GPU here; dropout will differ")
