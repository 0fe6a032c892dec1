"""Adapter files that PEFT reads, and a strict reader of PEFT's.

    adapter_model.safetensors   base_model.model.<path>.lora_A.weight, ...lora_B.weight
    adapter_config.json         PEFT's LoraConfig: rank, alpha, dropout, target_modules as full module paths

transformers 5 moved Qwen2-Audio's modules, so a path is written in one of two schemes:

    ours                         v4 (transformers 4)                v5 (transformers 5)
    audio_tower.*                audio_tower.*                      model.audio_tower.*
    multi_modal_projector.*      multi_modal_projector.*            model.multi_modal_projector.*
    language_model.*             language_model.model.*             model.language_model.*

PEFT loads a file of the other scheme in part and only warns. Here anything missing, unexpected or unlike is an error.
"""

import json
import logging
import re
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from lora.inject import lora_layers, lora_parameters
from lora.layers import LoraLinear
from lora.settings import LoraSettings

logger = logging.getLogger(__name__)

KeyScheme = Literal["v4", "v5"]
WEIGHTS_FILE, CONFIG_FILE = "adapter_model.safetensors", "adapter_config.json"
PREFIXES: dict[KeyScheme, dict[str, str]] = {  # ours -> theirs
    "v4": {
        "audio_tower.": "audio_tower.",
        "multi_modal_projector.": "multi_modal_projector.",
        "language_model.": "language_model.model.",
    },
    "v5": {
        "audio_tower.": "model.audio_tower.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.": "model.language_model.",
    },
}
# PEFT's variants of LoRA that compute something else than LoraLinear; allowed: absent, or one of these values.
PLAIN_LORA = {
    "use_rslora": (False, None),
    "use_dora": (False, None),
    "fan_in_fan_out": (False, None),
    "bias": ("none", None),
    "lora_bias": (False, None),
    "rank_pattern": ({}, None),
    "alpha_pattern": ({}, None),
    "modules_to_save": ([], None),
    "layer_replication": ([], None),
    "target_parameters": ([], None),
    "trainable_token_indices": ([], {}, None),
    "alora_invocation_tokens": (None,),
    "use_qalora": (False, None),
    "use_bdlora": (False, None),
    "arrow_config": (None,),
    "kasa_config": (None,),
    "monteclora_config": (None,),
    "velora_config": (None,),
    # The others (pissa, olora, corda, loftq, lora_ga) also change the base weights.
    "init_lora_weights": (True, False, None, "gaussian", "orthogonal", "eva"),
}
NUM_SHOWN = 8


def save_adapter(
    model: nn.Module, folder: Path | str, base_model_name: str, key_scheme: KeyScheme = "v5"
) -> dict[str, Tensor]:
    """Writes both files into `folder`, which must exist; returns the tensors as named in the file.

    Weights are the masters (fp32); rank, alpha and dropout are read off the layers, hence what the model trains with.
    Raises ValueError for a model without adapters or with a layer that the scheme cannot name.
    """
    first = _first_layer(model)
    paths = sorted(path for path, _ in lora_layers(model))
    theirs = {path: _their_path(path, key_scheme) for path in paths}
    tensors = {
        f"base_model.model.{theirs[name.rpartition('.')[0]]}.{name.rpartition('.')[2]}.weight": value.detach()
        .to("cpu")
        .contiguous()
        for name, value in lora_parameters(model)
    }
    settings = LoraSettings(first.r, first.alpha, first.dropout, tuple(sorted(theirs.values())))
    _write(Path(folder), tensors, settings, base_model_name)
    return tensors


def copy_adapter(source: Path | str, folder: Path | str, base_model_name: str, key_scheme: KeyScheme) -> None:
    """Writes the adapter of the folder `source`, of either scheme, into `folder` with the keys of `key_scheme`.

    Needs no model. Raises ValueError as `read_settings` does.
    """
    settings = read_settings(source)
    tensors = {}
    for name, value in read_tensors(source).items():
        path, _, leaf = name.rpartition(".")
        tensors[f"base_model.model.{_their_path(path, key_scheme)}.{leaf}.weight"] = value
    targets = tuple(sorted(_their_path(path, key_scheme) for path in settings.lora_targets))
    _write(Path(folder), tensors, replace(settings, lora_targets=targets), base_model_name)


def _write(folder: Path, tensors: dict[str, Tensor], settings: LoraSettings, base_model_name: str) -> None:
    """Both files; the settings' targets are full paths in the file's own scheme."""
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base_model_name,
        "inference_mode": True,
        "r": settings.lora_r,
        "lora_alpha": settings.lora_alpha,
        "lora_dropout": settings.lora_dropout,
        "target_modules": list(settings.lora_targets),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "use_dora": False,
        "modules_to_save": None,
        "init_lora_weights": True,
    }
    # Through bytes: safetensors' own file writer leaves temporary files behind when killed and makes mode 0600.
    (folder / WEIGHTS_FILE).write_bytes(safetensors.torch.save(tensors, metadata={"format": "pt"}))
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, allow_nan=False) + "\n", encoding="utf-8")


@torch.no_grad()
def load_adapter(model: nn.Module, folder: Path | str, part: str = "") -> None:
    """Fills the adapters of `model`, already injected, from a folder written by `save_adapter` or by PEFT, of either
    scheme. All or nothing: the model changes only if every check passes.

    part: only adapters whose path starts so, as in "audio_tower."; the file's others are left aside.

    Raises ValueError when rank, alpha, layers or shapes differ, a key is missing or unexpected, the file mixes
    schemes or is damaged, an adapter is merged, or the config asks for a variant of LoRA that is not implemented.
    """
    first, settings = _first_layer(model), read_settings(folder)
    weights_path = Path(folder) / WEIGHTS_FILE
    for field, ours, saved in (("lora_r", first.r, settings.lora_r), ("lora_alpha", first.alpha, settings.lora_alpha)):
        if ours != saved:
            raise ValueError(f"{field} is {ours} but {folder} was saved with {saved}; build the model with {saved}")
    if first.dropout != settings.lora_dropout:
        logger.warning("lora_dropout is %s; the adapter in %s used %s", first.dropout, folder, settings.lora_dropout)
    if any(layer.merged for _, layer in lora_layers(model)):
        raise ValueError("adapters are merged into the base weights; unmerge before loading others")

    found = {name: value for name, value in read_tensors(folder).items() if name.startswith(part)}
    expected = dict(lora_parameters(model))
    missing, unexpected = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    if missing or unexpected:
        raise ValueError(
            f"{weights_path} does not fit the model's adapters: {_named('missing', missing)}; "
            f"{_named('unexpected', unexpected)}; build the model with the lora_targets that it was saved with"
        )
    unlike = [
        f"{name} {tuple(found[name].shape)} for {tuple(value.shape)}"
        for name, value in expected.items()
        if found[name].shape != value.shape
    ]
    if unlike:
        raise ValueError(f"{weights_path} is of another model size: {_named('mis-shaped', unlike)}")
    for name, value in expected.items():
        value.copy_(found[name])


def read_settings(folder: Path | str) -> LoraSettings:
    """The settings that an adapter folder describes, its targets as exact paths of ours: inject with these, then load.

    Raises ValueError naming the field for anything but plain LoRA.
    """
    config_path = Path(folder) / CONFIG_FILE
    try:
        config: dict[str, Any] = json.loads(config_path.read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError) as error:
        raise ValueError(f"{config_path}: {error}; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}") from error
    if config.get("peft_type") != "LORA":
        raise ValueError(f"{config_path}: peft_type is {config.get('peft_type')!r}; allowed: 'LORA'")
    for field, allowed in PLAIN_LORA.items():
        if config.get(field) not in allowed:
            raise ValueError(f"{config_path}: {field} is {config[field]!r}; allowed: {allowed[0]!r}")
    for field in ("r", "lora_alpha", "lora_dropout"):
        if isinstance(config.get(field), bool) or not isinstance(config.get(field), int | float):
            raise ValueError(f"{config_path}: {field} is {config.get(field)!r}; allowed: a number")
    names = read_tensors(folder)
    return LoraSettings(
        lora_r=config["r"],
        lora_alpha=config["lora_alpha"],
        lora_dropout=config["lora_dropout"],
        lora_targets=tuple(sorted({name.rpartition(".")[0] for name in names})),
    )


def _first_layer(model: nn.Module) -> LoraLinear:
    layers = dict(lora_layers(model))
    if not layers:
        raise ValueError("the model has no adapters; inject_lora comes first")
    first = next(iter(layers.values()))
    assert all(
        (layer.r, layer.alpha, layer.dropout) == (first.r, first.alpha, first.dropout) for layer in layers.values()
    )
    return first


def _their_path(path: str, scheme: KeyScheme) -> str:
    for ours, theirs in PREFIXES[scheme].items():
        if path.startswith(ours):
            return theirs + path.removeprefix(ours)
    raise ValueError(f"{path} has no name in the {scheme} key scheme; it names layers of {', '.join(PREFIXES[scheme])}")


def _our_path(path: str) -> tuple[str, KeyScheme] | None:
    for scheme, prefixes in PREFIXES.items():
        for ours, theirs in prefixes.items():
            if path.startswith(theirs):
                return ours + path.removeprefix(theirs), scheme
    return None


def read_tensors(folder: Path | str) -> dict[str, Tensor]:
    """An adapter folder's tensors by our parameter names: <our path>.lora_A. Raises ValueError for a file that is
    missing or damaged, or holds anything else."""
    path = Path(folder) / WEIGHTS_FILE
    try:
        tensors = safetensors.torch.load_file(path)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}; an adapter folder holds {CONFIG_FILE} and {WEIGHTS_FILE}") from error
    found, examples = {}, {}
    strangers = []
    for key, value in tensors.items():
        parts = re.fullmatch(r"base_model\.model\.(.+)\.(lora_[AB])\.weight", key)
        named = parts and _our_path(parts[1])
        if not parts or not named:
            strangers.append(key)
            continue
        examples[named[1]] = key
        found[f"{named[0]}.{parts[2]}"] = value
    if strangers:
        raise ValueError(f"{path}: {_named('unexpected', sorted(strangers))}; allowed: lora_A and lora_B of the towers")
    if len(examples) > 1:
        raise ValueError(f"{path} mixes key schemes: {' and '.join(f'{key} ({s})' for s, key in examples.items())}")
    if not found:
        raise ValueError(f"{path} holds no tensors")
    return found


def _named(what: str, names: list[str]) -> str:
    more = f" and {len(names) - NUM_SHOWN} more" if len(names) > NUM_SHOWN else ""
    return f"{len(names)} {what}" + (f" ({', '.join(names[:NUM_SHOWN])}{more})" if names else "")
