"""A trained model as a folder: written, read back into a model in training, or opened on its own.

    retriever_config.json       what it is: settings, sources, fingerprint, what was measured
    heads.safetensors           both heads, the temperature, and a projector that training made
    trainable=lora              adapter_model.safetensors + adapter_config.json (PEFT's format); needs the base model
    trainable=full              model.safetensors (both towers) + audio_tower.json + text_tower.json [+ tokenizer/];
                                needs nothing else
    trainable=merged            an export (retrieval/export.py): Hugging Face checkpoints with the adapters folded in

Every read is strict: missing, unexpected or mis-shaped tensors are errors that name them. Opened audio-only, a folder
needs nothing of the text side: no tensor of the language model is read, in the folder or in the base model.

The fingerprint is the SHA-256 of all trained tensors and of what they are added to; it names the embedding space, so an
index tells whose it is. It is written when a model is saved and stays with every other form of that model.
"""

import hashlib
import json
import shutil
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from lora.adapter import KeyScheme, load_adapter, read_settings, save_adapter
from lora.inject import inject_lora, lora_layers, lora_parameters
from model.build import Built, build_model
from model.settings import ModelSettings
from model.text_tower import TextConfig

FORMAT = "earmark-retriever-1"
CONFIG_FILE, HEADS_FILE, TOWERS_FILE = "retriever_config.json", "heads.safetensors", "model.safetensors"
AUDIO_FILE, TEXT_FILE, TOKENIZER_FOLDER = "audio_tower.json", "text_tower.json", "tokenizer"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
READOUT = ("audio_readout", "readout", "maxsim_windows", "maxsim_stride")  # fields of ModelSettings
NUM_SHOWN = 8
TEXT_SIDE = ("text_head.", "language_model.")


@dataclass
class OpenedModel:
    """A model that is ready to encode, and its retriever_config.json."""

    built: Built
    temperature: float
    config: dict[str, Any]
    fingerprint: str


def save_model(
    folder: Path,
    built: Built,
    settings: ModelSettings,
    log_inv_temperature: Tensor,
    info: dict[str, Any],
    key_schemes: tuple[KeyScheme, ...] = ("v5",),
) -> None:
    """Write all files of the model into `folder`, which exists (make it atomic around this call).

    info: step, epoch, metrics and the like, kept under "info". The first key scheme names the adapter's keys; a second
    one adds the folder `adapter_v4` or `adapter_v5`.
    """
    model = built.model
    heads = {name: value for name, value in _trained_state(model).items() if _is_head(name, built)}
    heads["log_inv_temperature"] = log_inv_temperature.detach()
    _write_tensors(folder / HEADS_FILE, heads)
    config = {
        "format": FORMAT,
        "trainable": settings.trainable,
        "model": {name: getattr(settings, name) for name in ("model_name", "audio_model", "text_model")},
        **{name: getattr(settings, name) for name in READOUT},
        "proj_dim": settings.proj_dim,
        "sources": built.sources,
        "audio_config": asdict(built.audio_config),
        "text_config": asdict(built.text_config),
        "info": info,
    }
    config["fingerprint"] = _fingerprint(built, log_inv_temperature, config)
    if settings.trainable == "lora":
        both_replaced = settings.audio_model is not None and settings.text_model is not None
        base = settings.audio_model if both_replaced and settings.audio_model else settings.model_name
        save_adapter(model, folder, base, key_schemes[0])
        for scheme in key_schemes[1:]:
            extra = folder / f"adapter_{scheme}"
            extra.mkdir()
            save_adapter(model, extra, base, scheme)
    else:
        towers = {name: value for name, value in _trained_state(model).items() if not _is_head(name, built)}
        _write_tensors(folder / TOWERS_FILE, towers)
        text = built.text_config.to_hf() | {"tokenizer": "bytes"}
        if built.sources["tokenizer"] != "bytes":
            text["tokenizer"] = TOKENIZER_FOLDER
            _copy_tokenizer(built.sources["tokenizer"], settings, folder / TOKENIZER_FOLDER)
        _write_json(folder / AUDIO_FILE, built.audio_config.to_hf())
        _write_json(folder / TEXT_FILE, text)
    _write_json(folder / CONFIG_FILE, config)


def load_trained(folder: Path, built: Built, settings: ModelSettings, audio_only: bool = False) -> Tensor:
    """Fill a model that was built with the same settings (adapters injected) with what `save_model` wrote.

    audio_only: the model has no text side, and what the folder holds of it is left aside.

    Returns log_inv_temperature. Raises ValueError when the folder holds a model of other settings.
    """
    config = read_config(folder)
    saved_settings = {**config, **read_readout(config)}
    if config["trainable"] == "merged":
        saved_settings["trainable"] = "lora"  # frozen towers, only that no adapter is left
    for name in ("trainable", "proj_dim", *READOUT):
        ours, saved = getattr(settings, name), saved_settings.get(name)
        is_used = settings.readout == "maxsim" or not name.startswith("maxsim_")
        if is_used and ours != saved:
            raise ValueError(f"{name}: got {ours!r}, but {folder} holds a model with {saved!r}")
    for name, shape in (("audio_config", asdict(built.audio_config)), ("text_config", asdict(built.text_config))):
        saved = config[name]
        different = [f"{k} {v} (saved {saved.get(k)})" for k, v in shape.items() if v != saved.get(k)]
        if different:
            raise ValueError(f"{folder}: its {name.split('_')[0]} tower is another than the one built: {different}")
    skipped = TEXT_SIDE if audio_only else ()
    heads = _read_tensors(folder / HEADS_FILE, skipped)
    log_inv_temperature = heads.pop("log_inv_temperature", None)
    if log_inv_temperature is None:
        raise ValueError(f"{folder / HEADS_FILE}: log_inv_temperature is missing")
    state = _trained_state(built.model)
    _fill({n: v for n, v in state.items() if _is_head(n, built)}, heads, folder / HEADS_FILE)
    if settings.trainable == "lora":
        if any(True for _ in lora_layers(built.model)):
            load_adapter(built.model, folder, "audio_tower." if audio_only else "")
    else:
        towers = _read_tensors(folder / TOWERS_FILE, skipped)
        _fill({n: v for n, v in state.items() if not _is_head(n, built)}, towers, folder / TOWERS_FILE)
    return log_inv_temperature


def open_model(
    folder: Path | str,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    model_name: str | None = None,
    audio_only: bool = False,
) -> OpenedModel:
    """Build the model of a folder and fill it, ready to encode.

    model_name: where the base model of an adapter lies now, if not where it lay in training.
    audio_only: without the text side. Raises ValueError for a model whose audio passes through the language model.
    """
    folder = Path(folder)
    config = read_config(folder)
    is_merged = config["trainable"] == "merged"
    names = config["model"]
    if is_merged:
        names = {field: None if name is None else str(folder / name) for field, name in names.items()}
        if config["exported"].get("audio_only") and not audio_only:
            raise ValueError(f"{folder}: it holds the audio side alone; open it audio-only")
    settings = ModelSettings(
        **names,
        **read_readout(config),
        proj_dim=config["proj_dim"],
        trainable="lora" if is_merged else config["trainable"],
    )
    if settings.trainable == "full":
        settings = replace(settings, audio_model=str(folder / AUDIO_FILE), text_model=str(folder / TEXT_FILE))
        if model_name is not None:
            raise ValueError(f"model_name: got {model_name!r}, but {folder} is a full model, which needs no base model")
    elif is_merged and model_name is not None:
        raise ValueError(f"model_name: got {model_name!r}, but {folder} is merged and needs no base model")
    elif model_name is not None:
        settings = replace(settings, model_name=model_name)
    built = build_model(settings, device, compute_dtype, TextConfig(**config["text_config"]) if audio_only else None)
    if settings.trainable == "full":  # built at random, to be filled: what counts is where training took it from
        built.sources.update({part: name for part, name in config["sources"].items() if part != "tokenizer"})
        if built.sources["tokenizer"] not in ("bytes", "absent"):
            built.sources["tokenizer"] = str((folder / TOKENIZER_FOLDER).absolute())
    if settings.trainable == "lora" and not is_merged:
        adapters = read_settings(folder)
        targets = tuple(path for path in adapters.lora_targets if not (audio_only and path.startswith(TEXT_SIDE)))
        if targets:
            inject_lora(built.model, replace(adapters, lora_targets=targets))
        built.model.eval()
    log_inv_temperature = load_trained(folder, built, settings, audio_only)
    fingerprint = config.get("fingerprint")
    if fingerprint is None and audio_only:
        raise ValueError(f"{folder / CONFIG_FILE}: no fingerprint; without the text side it cannot be made")
    fingerprint = fingerprint or _fingerprint(built, log_inv_temperature, config)
    return OpenedModel(built, float((-log_inv_temperature.double()).exp()), config, fingerprint)


def read_readout(config: dict[str, Any]) -> dict[str, Any]:
    """How the model reads a clip out, as fields of ModelSettings; a folder that does not say so is of the mean."""
    found = {name: config[name] for name in READOUT if name in config}
    if "maxsim_windows" in found:
        found["maxsim_windows"] = tuple(found["maxsim_windows"])
    return {"readout": "mean", **found}


def read_config(folder: Path) -> dict[str, Any]:
    """retriever_config.json; ValueError when the folder holds no model of this format."""
    path = folder / CONFIG_FILE
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{folder}: no {CONFIG_FILE}; give a folder such as <run>/model_best") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not JSON ({error})") from error
    if not isinstance(config, dict) or config.get("format") != FORMAT:
        raise ValueError(f"{path}: its format is not {FORMAT!r}")
    return config


def single_file_tensors(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """All tensors and settings of a model folder for a one-file copy: keys `<file>/<tensor>`, settings by file name."""
    tensors = {f"{path.name}/{name}": value for path in sorted(folder.glob("*.safetensors"))
               for name, value in _read_tensors(path).items()}  # fmt: skip
    settings = {path.name: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))
                if path.name != "MANIFEST.json"}  # fmt: skip
    return tensors, settings


def _fingerprint(built: Built, log_inv_temperature: Tensor, config: dict[str, Any]) -> str:
    """SHA-256 over the trained tensors and what they are added to: settings, and the names of frozen towers."""
    is_full = config["trainable"] == "full"
    identity = {name: config[name] for name in ("trainable", "audio_readout", "audio_config", "text_config")}
    frozen = {} if is_full else {part: config["sources"][part] for part in ("audio_tower", "language_model")}
    digest = hashlib.sha256(json.dumps(identity | frozen, sort_keys=True).encode())
    tensors = {n: p for n, p in _trained_state(built.model).items() if is_full or _is_head(n, built)}
    tensors |= dict(lora_parameters(built.model)) | {"log_inv_temperature": log_inv_temperature}
    for name, value in sorted(tensors.items()):
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _trained_state(model: nn.Module) -> dict[str, Tensor]:
    """Parameters by path, as if there were no adapters (they have their own file)."""
    adapters = {name for name, _ in lora_parameters(model)}
    return {
        name.replace(".base_layer.", "."): value for name, value in model.named_parameters() if name not in adapters
    }


def _is_head(name: str, built: Built) -> bool:
    part = name.partition(".")[0]
    return part in ("audio_head", "text_head") or (
        part == "multi_modal_projector" and built.sources.get(part) == "random"
    )


def _fill(targets: dict[str, Tensor], tensors: dict[str, Tensor], path: Path) -> None:
    missing, unexpected = sorted(targets.keys() - tensors.keys()), sorted(tensors.keys() - targets.keys())
    misshaped = [n for n in targets.keys() & tensors.keys() if targets[n].shape != tensors[n].shape]
    problems = [
        f"{len(names)} {kind} ({', '.join(names[:NUM_SHOWN])})"
        for kind, names in (("missing", missing), ("unexpected", unexpected), ("mis-shaped", sorted(misshaped)))
        if names
    ]
    if problems:
        raise ValueError(f"{path}: tensors {', '.join(problems)}; it belongs to a model of other settings")
    with torch.no_grad():
        for name, target in targets.items():
            target.copy_(tensors[name])


def _copy_tokenizer(named: str, settings: ModelSettings, folder: Path) -> None:
    source = Path(named).expanduser()
    if settings.text_model is not None and settings.text_model.endswith(".json"):
        source = Path(settings.text_model).expanduser().parent / source  # as an architecture file means it
    if not source.is_dir():
        from huggingface_hub import snapshot_download

        source = Path(snapshot_download(named, allow_patterns=list(TOKENIZER_FILES)))
    folder.mkdir()
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Through bytes: safetensors' own file writer leaves temporary files behind when killed and makes mode 0600.
    on_host = {name: value.detach().to("cpu").contiguous() for name, value in tensors.items()}
    path.write_bytes(safetensors.torch.save(on_host, metadata={"format": "pt"}))


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")


def _read_tensors(path: Path, skipped: tuple[str, ...] = ()) -> dict[str, Tensor]:
    """All tensors but those whose names start with one of `skipped`, of which nothing is read."""
    try:
        with safe_open(str(path), framework="pt", device="cpu") as reader:
            names = [name for name in reader.keys() if not name.startswith(skipped)]  # noqa: SIM118 - not a dict
            return {name: reader.get_tensor(name) for name in names}
    except FileNotFoundError:
        raise ValueError(f"{path}: missing; the folder holds no complete model") from None
    except SafetensorError as error:
        raise ValueError(f"{path}: damaged ({error}); use another checkpoint") from error
