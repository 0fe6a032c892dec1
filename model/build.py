"""From settings to a model that runs: sources, towers on the meta device, weights or random values, what trains."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import nn

from model.audio_tower import AudioConfig
from model.dual import DualEncoder
from model.fp8 import check_widths, quantise_frozen, why_no_fp8
from model.init import init_parameters
from model.kernels import resolve_kernels
from model.maxsim import WindowShape
from model.settings import ModelSettings
from model.specaugment import SpecAugment
from model.text_tower import GatedMlp, TextConfig
from model.tokenizer import AbsentTokenizer, ByteTokenizer, CheckpointTokenizer, Tokenizer
from model.weights import Source, load_parts, resolve_source

logger = logging.getLogger(__name__)

_AUDIO_TYPES = ("qwen2_audio", "qwen2_audio_encoder", "whisper")
_TEXT_TYPES = ("qwen2_audio", "qwen2")


@dataclass
class Built:
    """A model, and all that must be known about it. `sources` maps each part to a checkpoint's name, or to `random`."""

    model: DualEncoder
    tokenizer: Tokenizer
    audio_config: AudioConfig
    text_config: TextConfig
    sources: dict[str, str]


def build_model(
    settings: ModelSettings,
    device: torch.device | str = "cpu",
    compute_dtype: torch.dtype | None = None,
    absent_text: TextConfig | None = None,
) -> Built:
    """Build the towers and heads on `device`, in evaluation mode.

    compute_dtype: None takes bf16 on CUDA and fp32 elsewhere; float64 makes the whole model fp64.
    absent_text: builds a model that only hears; nothing of the text tower, whose shape this is, is looked for or read.
    `lora`: towers frozen, heads train. `full`: everything trains but the audio tower's positions, which Whisper keeps
    fixed. A projector that no checkpoint gives is random and trains. Raises ValueError for settings or weights that do
    not fit.
    """
    settings.validate()
    device = torch.device(device)
    base_dtype, compute_dtype = _choose_dtypes(settings, device, compute_dtype)
    resolve_kernels(settings.kernels, device, compute_dtype)  # what cannot run is told before weights are read
    head_dtype = torch.promote_types(compute_dtype, torch.float32)
    audio_source, text_source = _resolve_sources(settings, with_text=absent_text is None)
    audio_config = AudioConfig.from_hf(audio_source.config, use_defaults=audio_source.folder is not None)
    tokenizer: Tokenizer = AbsentTokenizer()
    text_config, tokenizer_name = absent_text, "absent"
    if text_source is not None:
        text_config = TextConfig.from_hf(text_source.config, use_defaults=text_source.folder is not None)
        tokenizer, tokenizer_name = _load_tokenizer(text_source, text_config)
    assert text_config is not None
    with torch.device("meta"):
        model = DualEncoder(
            audio_config,
            text_config,
            proj_dim=settings.proj_dim,
            audio_readout=settings.audio_readout,
            attention=settings.attention,
            checkpointing=settings.checkpointing is True,  # auto: set when the batches are known
            dropout=settings.tower_dropout,
            compute_dtype=compute_dtype,
            augment_mel=_spec_augment(settings),
            windows=window_shape(settings),
            kernels=settings.kernels,
        )
    if text_source is None:
        model.remove_text_side()
    if settings.base_dtype == "fp8":
        check_widths(model)

    # Which checkpoint fills which part. The projector joins two towers of one training: it is only taken with both.
    wanted: dict[str, tuple[Source | None, int]] = {"audio_tower": (audio_source, audio_config.num_layers)}
    if text_source is not None:
        wanted["language_model"] = (text_source, text_config.num_layers)
    if model.multi_modal_projector is not None:
        assert text_source is not None, "removing the text side is refused with a projector"
        is_joint = audio_source.model_type == "qwen2_audio" and audio_source.folder == text_source.folder
        wanted["multi_modal_projector"] = (audio_source if is_joint else None, 1)
    loaded: dict[Path, tuple[Source, dict[str, nn.Module]]] = {}
    sources: dict[str, str] = {}
    for part, (source, num_layers) in wanted.items():
        module = model.get_submodule(part)
        if source is not None and source.folder is not None:
            loaded.setdefault(source.folder, (source, {}))[1][part] = module
            sources[part] = source.name
        else:
            is_random_projector = part == "multi_modal_projector"
            init_parameters(module, num_layers, device, head_dtype if is_random_projector else base_dtype)
            sources[part] = "random"
            if settings.trainable == "lora" and not is_random_projector:
                logger.warning("%s has random weights and is frozen (trainable=lora): use trainable=full", part)
    for source, parts in loaded.values():
        load_parts(source, parts, device, base_dtype)
    for head in [model.audio_head] + ([model.text_head] if text_source is not None else []):
        init_parameters(head, 1, device, head_dtype)
    sources["heads"], sources["tokenizer"] = "random", tokenizer_name

    _choose_trainable(model, settings, sources)
    _prepare_frozen(model, settings, device)
    return Built(model.eval(), tokenizer, audio_config, text_config, sources)


def _choose_dtypes(
    settings: ModelSettings, device: torch.device, compute_dtype: torch.dtype | None
) -> tuple[torch.dtype, torch.dtype]:
    """Storage dtype of the towers, and compute dtype."""
    if compute_dtype is None:
        compute_dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    if compute_dtype not in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"compute_dtype: got {compute_dtype}, allowed are float64, float32, bfloat16, float16")
    if settings.base_dtype == "fp8":
        reason = why_no_fp8(device, compute_dtype)
        if reason is not None:
            raise ValueError(f"base_dtype: got 'fp8', which cannot run here: {reason}; use auto, bf16 or fp32")
        return torch.bfloat16, compute_dtype
    if compute_dtype == torch.float64:
        return torch.float64, compute_dtype
    use_bf16 = settings.base_dtype == "bf16" or (settings.base_dtype == "auto" and device.type == "cuda")
    if settings.trainable == "full" or not use_bf16:
        return torch.float32, compute_dtype
    if settings.base_dtype == "auto" and compute_dtype != torch.bfloat16:
        return torch.float32, compute_dtype
    if compute_dtype != torch.bfloat16:
        raise ValueError(f"base_dtype: got 'bf16' with compute dtype {compute_dtype}; use bfloat16, or base_dtype=fp32")
    return torch.bfloat16, compute_dtype


def _resolve_sources(settings: ModelSettings, with_text: bool) -> tuple[Source, Source | None]:
    """The audio and the text tower's source: the same object when one checkpoint gives both."""
    parts = None if with_text else {"audio_tower"}
    base: Source | None = None
    found: list[Source] = []
    for field, allowed in (("audio_model", _AUDIO_TYPES), ("text_model", _TEXT_TYPES))[: 2 if with_text else 1]:
        name = getattr(settings, field)
        if name is None and base is None:
            base = resolve_source("model_name", settings.model_name, parts)
        source = resolve_source(field, name, parts) if name is not None else cast(Source, base)
        found.append(source)
        if source.model_type not in allowed:
            given = "model_name" if name is None else field
            raise ValueError(
                f"{given}: {source.name!r} is a {source.model_type} model, which has no {field.removesuffix('_model')} "
                f"tower; give {field} a checkpoint of type {', '.join(allowed)}"
            )
    return found[0], found[1] if with_text else None


def _load_tokenizer(source: Source, config: TextConfig) -> tuple[Tokenizer, str]:
    """The checkpoint's tokenizer; an architecture file names one (`"tokenizer": folder`) or means bytes. So may a
    checkpoint of ours that was trained on bytes."""
    named = source.config.get("tokenizer", "bytes" if source.folder is None else str(source.folder))
    tokenizer: Tokenizer
    if named == "bytes":
        tokenizer = ByteTokenizer()
    else:
        # A relative folder is meant from the architecture file's own place.
        folder = source.folder or Path(source.name).expanduser().parent / named
        tokenizer = CheckpointTokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"vocab_size: the text tower has {config.vocab_size} embeddings, its tokenizer {tokenizer.vocab_size} ids"
        )
    return tokenizer, named if named == "bytes" or source.folder is None else source.name


def window_shape(settings: ModelSettings) -> WindowShape | None:
    """The windows of the maxsim read-out; None for the mean."""
    return WindowShape(settings.maxsim_windows, settings.maxsim_stride) if settings.readout == "maxsim" else None


def _spec_augment(settings: ModelSettings) -> SpecAugment | None:
    if not (settings.spec_time_masks or settings.spec_freq_masks):
        return None
    return SpecAugment(
        settings.spec_time_masks,
        settings.spec_time_width_frames,
        settings.spec_freq_masks,
        settings.spec_freq_width_bins,
    )


def _prepare_frozen(model: DualEncoder, settings: ModelSettings, device: torch.device) -> None:
    """Frozen weights in fp8, or those that one product serves side by side in memory: see GatedMlp."""
    if settings.base_dtype == "fp8":
        quantise_frozen(model, kernels=settings.kernels)
        torch.cuda.empty_cache()
        return
    joinable = [m for m in model.modules() if isinstance(m, GatedMlp) and not m.gate_proj.weight.requires_grad]
    for module in joinable:
        module.join()
    if joinable and device.type == "cuda":
        torch.cuda.empty_cache()  # the parts' former places, which fit nothing that training will ask for


def _choose_trainable(model: DualEncoder, settings: ModelSettings, sources: dict[str, str]) -> None:
    for path, parameter in model.named_parameters():
        part = path.partition(".")[0]
        if settings.trainable == "full":
            is_trained = path != "audio_tower.embed_positions.weight"
        else:
            is_trained = part in ("audio_head", "text_head") or (
                part == "multi_modal_projector" and sources[part] == "random"
            )
        parameter.requires_grad_(is_trained)
