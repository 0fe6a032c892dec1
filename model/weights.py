"""Hugging Face weights in: from a name to a folder, from its safetensors to our parameters, one tensor at a time.

Every key of a checkpoint either has a parameter, or is skipped by name (heads, decoders, a tower that another
checkpoint replaces). All else is an error, raised before a byte of weights is read. Nothing is ever unpickled.
"""

import json
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

SUPPORTED_TYPES = ("qwen2_audio", "qwen2_audio_encoder", "whisper", "qwen2")

# Checkpoint prefix -> our part, first match wins; None: skipped by name. The empty prefix takes bare keys.
_PREFIXES: dict[str, tuple[tuple[str, str | None], ...]] = {
    "qwen2_audio": (
        # transformers 5
        ("model.audio_tower.", "audio_tower"),
        ("model.multi_modal_projector.", "multi_modal_projector"),
        ("model.language_model.", "language_model"),
        ("lm_head.", None),
        # transformers 4, and the published checkpoints
        ("audio_tower.", "audio_tower"),
        ("multi_modal_projector.", "multi_modal_projector"),
        ("language_model.lm_head.", None),
        ("language_model.model.", "language_model"),
        # transformers 5's model without its head
        ("language_model.", "language_model"),
    ),
    "qwen2_audio_encoder": (("audio_tower.", "audio_tower"), ("", "audio_tower")),
    "whisper": (
        ("model.encoder.", "audio_tower"),
        ("encoder.", "audio_tower"),
        ("model.decoder.", None),
        ("decoder.", None),
        ("proj_out.", None),
        ("", "audio_tower"),
    ),
    "qwen2": (("model.", "language_model"), ("lm_head.", None), ("", "language_model")),
}
# A table that old versions stored; it follows from the config.
_DERIVED_SUFFIX = ".rotary_emb.inv_freq"
_DESCRIPTIONS = ("*.json", "*.txt")
_NAMED_KEYS = 8


@dataclass(frozen=True)
class Source:
    """Where a tower comes from. `folder` is None for an architecture file, which means random weights."""

    name: str
    config: dict[str, Any]
    folder: Path | None

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])


def resolve_source(field: str, name: str, parts: Collection[str | None] | None = None) -> Source:
    """A folder, an architecture .json or a hub name becomes a Source; ValueError names `field` and the remedy.

    parts: what will be read of it (None: all that is ours); other shards of a checkpoint on the hub are not fetched.
    """
    path = Path(name).expanduser()
    if path.suffix == ".json":
        return Source(name, _read_config(field, path), None)
    if not path.is_dir():
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            raise ValueError(f"{field}: got {name!r}, which is no folder, no .json file and no hub name (owner/model)")
        path = _download(field, name, _DESCRIPTIONS)
        source = Source(name, _read_config(field, path / "config.json"), path)
        shards = _list_shards(source, set(_PARTS) if parts is None else parts)
        return replace(source, folder=_download(field, name, (*_DESCRIPTIONS, *(shards or ("*.safetensors",)))))
    return Source(name, _read_config(field, path / "config.json"), path)


def _download(field: str, name: str, patterns: tuple[str, ...]) -> Path:
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:  # the hub client raises a dozen unrelated kinds; each means the same to the user
        raise ValueError(
            f"{field}: {name!r} is no local folder and could not be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no detail'}); "
            "download it, give its folder, or set HF_TOKEN if it is gated"
        ) from error


def _read_config(field: str, path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{field}: no file {path}")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{field}: {path} is not JSON ({error})") from error
    model_type = config.get("model_type") if isinstance(config, dict) else None
    if model_type not in SUPPORTED_TYPES:
        raise ValueError(f"{field}: {path} has model_type {model_type!r}, allowed are {', '.join(SUPPORTED_TYPES)}")
    return config


def load_parts(source: Source, parts: Mapping[str, nn.Module], device: torch.device | str, dtype: torch.dtype) -> None:
    """Fill `parts` (audio_tower, multi_modal_projector, language_model) from the source's safetensors, cast to `dtype`.

    Host memory holds one tensor at a time. One ValueError names all missing, unexpected and mis-shaped keys.
    """
    assert source.folder is not None, "an architecture file has no weights"
    files = _list_files(source, set(parts))
    targets = {f"{part}.{path}": p for part, module in parts.items() for path, p in module.named_parameters()}
    found: dict[str, tuple[Path, str]] = {}
    unexpected, misshaped = [], []
    for file in files:
        with _open(file) as reader:
            for key in reader.keys():  # noqa: SIM118 - not a dict
                part, target = _map_key(source.model_type, key)
                if part is None or (part in _PARTS and part not in parts):
                    continue
                if target not in targets or target in found:
                    unexpected.append(key)
                    continue
                found[target] = (file, key)
                shape = list(reader.get_slice(key).get_shape())
                if shape != list(targets[target].shape):
                    misshaped.append(f"{key} {shape}, expected {list(targets[target].shape)}")
    missing = sorted(targets.keys() - found.keys())
    kinds = {"missing": missing, "unexpected": unexpected, "mis-shaped": misshaped}
    problems = [_describe(kind, keys) for kind, keys in kinds.items() if keys]
    if problems:
        raise ValueError(
            f"{source.name}: {source.folder} does not hold the {source.model_type} model that its config.json tells "
            f"of: {'; '.join(problems)}. Fetch the checkpoint again, or use the config.json that belongs to it"
        )
    by_file: dict[Path, list[tuple[str, str]]] = {}
    for target, (file, key) in found.items():
        by_file.setdefault(file, []).append((target, key))
    for file, pairs in by_file.items():
        with _open(file) as reader:
            for target, key in pairs:
                part, _, path = target.partition(".")
                tensor = reader.get_tensor(key)
                if not tensor.is_floating_point():
                    raise ValueError(f"{file}: {key} is {tensor.dtype}; quantised weights cannot be loaded")
                # An own copy: the reader's tensor is a view of the mapped file.
                value = torch.empty(tensor.shape, dtype=dtype, device=device).copy_(tensor)
                place_parameter(parts[part], path, value)


def stream_tensors(source: Source, parts: Collection[str | None]) -> Iterator[tuple[str, str | None, Tensor]]:
    """The tensors of a checkpoint one at a time, file after file: its key, the path of our parameter (`audio_tower...`;
    None where it is none of ours), its value. `parts`: of which shards at least (ALL_PARTS: of all). Raises ValueError
    as `load_parts` does."""
    assert source.folder is not None, "an architecture file has no weights"
    for file in _list_files(source, parts):
        with _open(file) as reader:
            for key in reader.keys():  # noqa: SIM118 - not a dict
                part, path = _map_key(source.model_type, key)
                yield key, path if part else None, reader.get_tensor(key)


_PARTS = ("audio_tower", "multi_modal_projector", "language_model")
ALL_PARTS = (*_PARTS, None)
"""Ours, and what is none of ours: heads and decoders."""


def _map_key(model_type: str, key: str) -> tuple[str | None, str]:
    """Checkpoint key -> (part, `part.path`); part None: skipped by name; part "": no prefix matches."""
    if key.endswith(_DERIVED_SUFFIX):
        return None, ""
    for prefix, part in _PREFIXES[model_type]:
        if key.startswith(prefix):
            return part, f"{part}.{key[len(prefix) :]}"
    return "", key


def _list_shards(source: Source, parts: Collection[str | None]) -> list[str] | None:
    """Those shards of model.safetensors.index.json that hold a key of one of `parts`; None where there is no index.

    A key that is no part's at all is kept to be told of.
    """
    index = cast(Path, source.folder) / "model.safetensors.index.json"
    if not index.is_file():
        return None
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return sorted({listed[key] for key in listed if _map_key(source.model_type, key)[0] in {"", *parts}})
    except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
        raise ValueError(f"{index} is not a safetensors index ({type(error).__name__}: {error})") from error


def _list_files(source: Source, parts: Collection[str | None]) -> list[Path]:
    """The shards that hold a key of one of `parts`, or model.safetensors. Shards of other parts alone may be absent."""
    folder = cast(Path, source.folder)
    names, single = _list_shards(source, parts), folder / "model.safetensors"
    if names is not None:
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ValueError(f"{folder}: {_describe('missing shards', absent)}; fetch the checkpoint again")
        return [folder / name for name in names]
    if single.is_file():
        return [single]
    pickled = sorted(path.name for path in folder.glob("*.bin"))
    hint = f" ({pickled[0]} is a pickle, which is never loaded: convert it to safetensors)" if pickled else ""
    raise ValueError(f"{folder}: no model.safetensors or model.safetensors.index.json{hint}")


def _open(file: Path) -> Any:
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: not a readable safetensors file ({error}); fetch it again") from error


def _describe(kind: str, keys: Iterable[str]) -> str:
    keys = list(keys)
    more = f" and {len(keys) - _NAMED_KEYS} more" if len(keys) > _NAMED_KEYS else ""
    return f"{len(keys)} {kind}: {', '.join(keys[:_NAMED_KEYS])}{more}"


def place_parameter(module: nn.Module, path: str, value: Tensor) -> None:
    """Replace the parameter at `path` (often on the meta device) by one that holds `value`, without a gradient."""
    owner_path, _, leaf = path.rpartition(".")
    setattr(module.get_submodule(owner_path), leaf, nn.Parameter(value, requires_grad=False))
