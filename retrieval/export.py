"""A trained model in other forms. Nothing larger than a shard is ever in memory, and no model is built.

    merged   full checkpoint(s) in the base model's own layout, adapters folded in: plain transformers loads it
    peft     the adapter in PEFT's format, of either key scheme
    audio    audio tower and audio head alone, for machines that only listen

Each form keeps heads.safetensors and retriever_config.json beside it, so `open_model` takes it too (audio: with
audio_only=True), and the fingerprint, since it is the same embedding space: an index made before fits.

    merged, one base model        config.json model-00001-of-00004.safetensors ... tokenizer.json lm_head and all
    merged, two of them           audio_tower/  text_tower/     each a checkpoint
    audio                         audio_tower/
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, Protocol

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lora.adapter import PREFIXES, KeyScheme, copy_adapter, read_settings, read_tensors
from lora.merge import merged_weight
from model.audio_tower import AudioConfig
from model.text_tower import TextConfig
from model.weights import ALL_PARTS, Source, resolve_source, stream_tensors
from retrieval.model_files import (
    CONFIG_FILE,
    HEADS_FILE,
    TEXT_SIDE,
    TOKENIZER_FILES,
    TOKENIZER_FOLDER,
    TOWERS_FILE,
    read_config,
)

Dtype = Literal["auto", "bf16", "fp32"]
AUDIO_FOLDER, TEXT_FOLDER = "audio_tower", "text_tower"
PARTS = {
    "": ("audio_tower.", "language_model.", "multi_modal_projector."),
    AUDIO_FOLDER: ("audio_tower.",),
    TEXT_FOLDER: ("language_model.",),
}
HEAD_CLASSES = {"whisper": "WhisperEncoder", "qwen2_audio_encoder": "Qwen2AudioEncoder", "qwen2": "Qwen2Model"}
# Of a base checkpoint, besides its weights; a README would tell of another model.
COPIED = ("*.json", "*.txt", "*.model", "*.jinja", "LICENSE*", "NOTICE*")


class Trained(Protocol):
    """What training made of a tensor of the base model."""

    unused: set[str]
    """Our paths of what no tensor of the base has asked for yet."""

    def __call__(self, path: str, base: Tensor) -> Tensor: ...


def export_merged(
    model: Path, folder: Path, keys: Literal["base", "v4", "v5"], dtype: Dtype, max_shard_bytes: int, name: str | None
) -> None:
    """Write the merged form of the model folder into `folder`, which exists.

    keys: of a Qwen2-Audio checkpoint, its own or those of transformers 4 or 5, which loads both. dtype: auto keeps each
    tensor's own, and the trained one of a model that trained whole. name: where the base model lies now.
    """
    config = read_config(model)
    trained = _trained_tensors(model, config)
    sources = _sources(config, name)
    if keys != "base" and not (len(sources) == 1 and sources[0][1].model_type == "qwen2_audio"):
        raise ValueError(f"keys: got {keys!r}; allowed: base, as only a whole Qwen2-Audio has two key schemes")
    for subfolder, source in sources:
        into = folder / subfolder
        into.mkdir(exist_ok=True)
        if source.folder is None:
            _write_towers(model, config, into, subfolder, dtype, max_shard_bytes)
            continue
        for pattern in COPIED:
            for path in source.folder.glob(pattern):
                if path.name != "model.safetensors.index.json" and path.is_file():
                    shutil.copyfile(path, into / path.name)
        parts = PARTS[subfolder]
        merged = _merged(source, trained, parts, keys)
        _write_shards(into, (_cast(key, value, dtype) for key, value in merged), max_shard_bytes)
        if dtype != "auto":
            _declare_dtype(into / "config.json", dtype)
        for part in parts:
            _check_all_used(trained, part)
    names = {"model_name": ".", "audio_model": None, "text_model": None}
    if len(sources) == 2:
        names = {"model_name": ".", "audio_model": AUDIO_FOLDER, "text_model": TEXT_FOLDER}
    shutil.copyfile(model / HEADS_FILE, folder / HEADS_FILE)
    _write_json(folder / CONFIG_FILE, {**config, "trainable": "merged", "model": names, "exported": _origin(config)})


def export_audio(model: Path, folder: Path, dtype: Dtype, max_shard_bytes: int, name: str | None) -> None:
    """Write the audio tower, adapters folded in, and its head into `folder`, which exists.

    Raises ValueError for a model whose audio passes through the language model.
    """
    config = read_config(model)
    if config["audio_readout"] != "tower":
        raise ValueError("audio_readout: 'lm' sends audio through the language model, so there is no audio-only form")
    trained = _trained_tensors(model, config)
    source = _sources(config, name, with_text=False)[0][1]
    into = folder / AUDIO_FOLDER
    into.mkdir()
    if source.folder is None:
        _write_towers(model, config, into, AUDIO_FOLDER, dtype, max_shard_bytes)
    else:
        bare = (
            (path.removeprefix("audio_tower."), trained(path, value))
            for _, path, value in stream_tensors(source, ("audio_tower",))
            if path is not None and path.startswith("audio_tower.")
        )
        _write_shards(into, (_cast(key, value, dtype) for key, value in bare), max_shard_bytes)
        _check_all_used(trained, "audio_tower.")
        _write_json(into / "config.json", _tower_config(config, AUDIO_FOLDER))
    heads = {k: v for k, v in _open_tensors(model / HEADS_FILE) if not k.startswith(TEXT_SIDE)}
    safetensors.torch.save_file(heads, folder / HEADS_FILE, metadata={"format": "pt"})
    names = {"model_name": ".", "audio_model": AUDIO_FOLDER, "text_model": None}
    exported = {**_origin(config), "audio_only": True}
    _write_json(folder / CONFIG_FILE, {**config, "trainable": "merged", "model": names, "exported": exported})


def export_peft(model: Path, folder: Path, scheme: KeyScheme) -> None:
    """Write the adapter with the keys of `scheme`, and the heads, into `folder`, which exists."""
    config = read_config(model)
    if config["trainable"] != "lora":
        raise ValueError(f"to: got 'peft', but {model} has trainable={config['trainable']!r}, hence no adapter")
    both_replaced = config["model"]["audio_model"] and config["model"]["text_model"]
    base = config["model"]["audio_model"] if both_replaced else config["model"]["model_name"]
    copy_adapter(model, folder, base, scheme)
    for file in (HEADS_FILE, CONFIG_FILE):
        shutil.copyfile(model / file, folder / file)


# ------------------------------------------------------------------------------------------------- trained tensors


def _trained_tensors(model: Path, config: dict[str, Any]) -> Trained:
    if config["trainable"] == "full":
        return _TrainedWhole(model / TOWERS_FILE)
    if config["trainable"] == "lora":
        return _Adapted(model)
    raise ValueError(f"model: {model} is an export already; export the model that it was made from")


class _TrainedWhole:
    """trainable=full: every tensor of the towers as training left it."""

    def __init__(self, path: Path) -> None:
        self.reader = _open(path)
        self.unused = set(self.reader.keys())
        self.names = set(self.unused)

    def __call__(self, path: str, base: Tensor) -> Tensor:
        self.unused.discard(path)
        return self.reader.get_tensor(path) if path in self.names else base


class _Adapted:
    """trainable=lora: W + (alpha / r) B A, added in fp32 and rounded once to W's dtype, as `lora.merge` does."""

    def __init__(self, model: Path) -> None:
        settings = read_settings(model)
        self.scaling = settings.lora_alpha / settings.lora_r
        self.tensors = read_tensors(model)
        self.unused = {name.rpartition(".")[0] for name in self.tensors}

    def __call__(self, path: str, base: Tensor) -> Tensor:
        layer = path.removesuffix(".weight")
        if f"{layer}.lora_A" not in self.tensors or path == layer:
            return base
        self.unused.discard(layer)
        lora_A, lora_B = (self.tensors[f"{layer}.{name}"] for name in ("lora_A", "lora_B"))
        return merged_weight(base, (lora_B @ lora_A) * self.scaling)


def _check_all_used(trained: Trained, part: str = "") -> None:
    unused = sorted(path for path in trained.unused if path.startswith(part))
    if unused:
        raise ValueError(f"model: {len(unused)} trained tensors find none in the base model, the first is {unused[0]}")


def _merged(source: Source, trained: Trained, parts: tuple[str, ...], keys: str) -> Iterator[tuple[str, Tensor]]:
    """The base checkpoint's tensors with the trained ones in their places; the others as they are."""
    for key, path, value in stream_tensors(source, ALL_PARTS):
        if path is not None and path.startswith(parts):
            value = trained(path, value)
        yield _renamed(key, path, keys), value


def _renamed(key: str, path: str | None, keys: str) -> str:
    if keys == "base":
        return key
    if path is None:
        if not key.endswith("lm_head.weight"):
            raise ValueError(f"keys: {key} of the base model has no known name in {keys!r}; use base")
        return "language_model.lm_head.weight" if keys == "v4" else "lm_head.weight"
    for ours, theirs in PREFIXES[keys].items():  # type: ignore[index]
        if path.startswith(ours):
            return theirs + path.removeprefix(ours)
    raise ValueError(f"keys: {path} has no name in {keys!r}; use base")


def _sources(config: dict[str, Any], name: str | None, with_text: bool = True) -> list[tuple[str, Source]]:
    """(subfolder of the export, where its base comes from): one for a base model of both towers, else two."""
    names, parts = dict(config["model"]), ALL_PARTS if with_text else ("audio_tower",)
    if name is not None:
        names["model_name"] = name
    if names["audio_model"] is None and names["text_model"] is None:
        return [("", resolve_source("model_name", names["model_name"], parts))]
    found = []
    for field, subfolder, part in (
        ("audio_model", AUDIO_FOLDER, "audio_tower"),
        ("text_model", TEXT_FOLDER, "language_model"),
    )[: 2 if with_text else 1]:
        if config["sources"][part] == "random":
            if config["trainable"] != "full":
                raise ValueError(f"{field}: its random weights were frozen in training and are kept nowhere")
            found.append((subfolder, Source("random", {"model_type": "random"}, None)))
        else:
            field_used = field if names[field] is not None else "model_name"
            found.append((subfolder, resolve_source(field_used, names[field_used], parts)))
    return found


# ------------------------------------------------------------------------------------------------------- writing


def _write_towers(
    model: Path, config: dict[str, Any], into: Path, subfolder: str, dtype: Dtype, max_shard_bytes: int
) -> None:
    """A tower that was trained from nothing, as a checkpoint of its kind."""
    part = "audio_tower." if subfolder == AUDIO_FOLDER else "language_model."
    tensors = ((k.removeprefix(part), v) for k, v in _open_tensors(model / TOWERS_FILE) if k.startswith(part))
    _write_shards(into, (_cast(key, value, dtype) for key, value in tensors), max_shard_bytes)
    described = _tower_config(config, subfolder)
    if subfolder == TEXT_FOLDER:
        if (model / TOKENIZER_FOLDER).is_dir():
            for name in TOKENIZER_FILES:
                if (model / TOKENIZER_FOLDER / name).is_file():
                    shutil.copyfile(model / TOKENIZER_FOLDER / name, into / name)
        else:
            described["tokenizer"] = "bytes"
    _write_json(into / "config.json", described)


def _tower_config(config: dict[str, Any], subfolder: str) -> dict[str, Any]:
    is_audio = subfolder == AUDIO_FOLDER
    shape = AudioConfig(**config["audio_config"]) if is_audio else TextConfig(**config["text_config"])
    described = shape.to_hf()
    return {"architectures": [HEAD_CLASSES[described["model_type"]]], **described}


def _write_shards(folder: Path, tensors: Iterator[tuple[str, Tensor]], max_bytes: int) -> None:
    """model.safetensors, or model-00001-of-0000N.safetensors and an index, each of `max_bytes` or of one tensor."""
    shards: list[Path] = []
    where: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    total = size = 0

    def flush() -> None:
        shards.append(folder / f"shard-{len(shards)}.safetensors")
        safetensors.torch.save_file(held, shards[-1], metadata={"format": "pt"})
        held.clear()

    for key, value in tensors:
        num_bytes = value.numel() * value.element_size()
        if held and size + num_bytes > max_bytes:
            flush()
            size = 0
        held[key] = value.contiguous()
        where[key] = len(shards)
        size += num_bytes
        total += num_bytes
    flush()
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        index = {"metadata": {"total_size": total}, "weight_map": {key: names[i] for key, i in where.items()}}
        _write_json(folder / "model.safetensors.index.json", index)
    for shard, name in zip(shards, names, strict=True):
        shard.rename(folder / name)


def _cast(key: str, value: Tensor, dtype: Dtype) -> tuple[str, Tensor]:
    wanted = {"auto": value.dtype, "bf16": torch.bfloat16, "fp32": torch.float32}[dtype]
    return key, value.to(wanted) if value.is_floating_point() else value


def _declare_dtype(path: Path, dtype: Dtype) -> None:
    """transformers loads in the dtype that the config names, whatever the file holds."""
    config = json.loads(path.read_text(encoding="utf-8"))
    name = {"bf16": "bfloat16", "fp32": "float32"}[dtype]
    for part in (config, config.get("audio_config"), config.get("text_config")):
        for field in ("dtype", "torch_dtype"):
            if isinstance(part, dict) and field in part:
                part[field] = name
    _write_json(path, config)


def _origin(config: dict[str, Any]) -> dict[str, Any]:
    return {"from_trainable": config["trainable"], "from_model": config["model"]}


def _open(path: Path) -> Any:
    try:
        return safe_open(str(path), framework="pt", device="cpu")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path}: {error}; the folder holds no complete model") from error


def _open_tensors(path: Path) -> Iterator[tuple[str, Tensor]]:
    with _open(path) as reader:
        for name in reader.keys():  # noqa: SIM118 - not a dict
            yield name, reader.get_tensor(name)


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
