"""Fits a training step into the device's memory: how many layers to recompute, or how many clips to embed at once.

What a clip takes is counted from the first batches (model/memory.py); nothing is tried out.
"""

import itertools
import logging
from collections.abc import Iterable
from dataclasses import dataclass

import torch

from bin.config import Config
from data.batches import Batch
from model.dual import DualEncoder
from model.kernels import resolve_kernels
from model.memory import LayerCost, Plan, clips_in, layer_cost, plan_layers
from model.packing import frames_of, pooled_of, tokens_of

logger = logging.getLogger("earmark")

NUM_LOOKED_AT = 4
"""Batches from which the tokens of a batch are taken."""
SPREAD = 1.1
"""Tokens of the largest batch to come, as a multiple of the largest of these."""
RESERVE_BYTES, FRAGMENTS = 2**30, 0.03
"""Left free: libraries' workspaces and the loss, and a share of the cap that lies in pieces too small."""
ADAM_BYTES = 8
"""A trainable parameter: the two moments, which the first step makes."""
GRAPHS_SPREAD = 1.3
"""What CUDA graphs of many size classes hold in the pool that they share, of what the largest one needs alone."""
STEP_OF_CLIPS = 8


@dataclass(frozen=True)
class Fitted:
    """What was chosen. `clips_per_pass` 0: all clips at once."""

    clips_per_pass: int
    plan: Plan | None
    cuda_graphs: str
    """As the setting, but off where the step fits and its graphs would not."""


def fit_memory(config: Config, model: DualEncoder, batches: Iterable[Batch]) -> Fitted:
    """Set the layers that each tower recomputes where `checkpointing` is auto; clips of a pass and graphs are told.

    batches: this rank's, of which a few are read if there is something to choose. Nothing is chosen on a CPU without a
    `memory_cap_gib`. Ranks may choose differently. Raises ValueError where nothing fits.
    """
    wants_layers, clips_per_pass = config.model.checkpointing == "auto", config.train.clips_per_pass
    if not wants_layers and clips_per_pass != "auto":
        return Fitted(int(clips_per_pass), None, config.model.cuda_graphs)
    room = room_bytes(config.model.memory_cap_gib, model)
    if room is None:
        logger.info("memory: unlimited on %s (memory_cap_gib 0), so nothing is recomputed", model.device.type)
        return Fitted(0 if clips_per_pass == "auto" else clips_per_pass, None, config.model.cuda_graphs)
    looked_at = list(itertools.islice(batches, NUM_LOOKED_AT))
    fitted = choose(config, model, looked_at, room)
    if fitted.plan is not None:
        model.audio_tower.num_checkpointed = fitted.plan.num_audio
        model.language_model.num_checkpointed = fitted.plan.num_text
        model.audio_tower.parks_checkpoints = model.language_model.parks_checkpoints = fitted.plan.parks
    return fitted


def room_bytes(cap_gib: float, model: DualEncoder) -> float | None:
    """Bytes that a step may take beside model, gradients and optimizer; None where there is no cap."""
    device = model.device
    parameters = list(model.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    if device.type != "cuda":
        held = sum(p.numel() * p.element_size() for p in parameters) + sum(
            p.numel() * p.element_size() for p in parameters if p.requires_grad
        )
        cap = cap_gib * 2**30
    else:
        held = torch.cuda.memory_allocated(device)
        cap = cap_gib * 2**30 or torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    if not cap:
        return None
    return cap * (1 - FRAGMENTS) - RESERVE_BYTES - held - trainable * ADAM_BYTES


def costs(model: DualEncoder) -> tuple[LayerCost, LayerCost]:
    """Of both towers' layers, as they compute here."""
    audio, text = model.audio_tower, model.language_model
    fused = resolve_kernels(audio.kernels, model.device, model.compute_dtype) == "triton"
    itemsize = model.compute_dtype.itemsize
    return layer_cost(audio.config, itemsize, fused=fused), layer_cost(text.config, itemsize, fused=fused)


def graphs_spread(config: Config, model: DualEncoder) -> float:
    """By how much more room to leave where nothing is recomputed, and both towers may be CUDA graphs."""
    return GRAPHS_SPREAD if model.device.type == "cuda" and config.model.cuda_graphs != "off" else 1.0


def count_tokens(model: DualEncoder, batch: Batch) -> tuple[int, int]:
    """(audio tokens, text tokens) that the towers' layers work on; audio_readout=lm sends clips through both."""
    config = model.audio_tower.config
    frames = frames_of(batch.num_samples, config.max_frames) if batch.num_samples else []
    lengths, text_tokens = [tokens_of(count) for count in frames], sum(batch.token_lengths)
    if model.multi_modal_projector is not None:
        text_tokens += sum(pooled_of(length, config.pool) for length in lengths)
    return sum(lengths), text_tokens


def choose(config: Config, model: DualEncoder, batches: list[Batch], room: float) -> Fitted:
    """The choice for batches like these. Layers first; passes only where they are auto and layers do not do."""
    audio, text = costs(model)
    counts = [count_tokens(model, batch) for batch in batches]
    audio_tokens, text_tokens = (int(SPREAD * max(column)) for column in zip(*counts, strict=True))
    gib, spread, cuda_graphs = room / 2**30, graphs_spread(config, model), config.model.cuda_graphs
    if config.model.checkpointing == "auto":
        may_park = model.device.type == "cuda" and config.train.clips_per_pass != "auto"  # passes are faster
        plan = plan_layers(audio, text, audio_tokens, text_tokens, room, may_park)
        if not plan.num_audio and not plan.num_text and plan.bytes_needed * spread > room and cuda_graphs == "auto":
            # Recomputing would turn them off as well, and be slower; large batches hardly need them.
            most_gib = plan.bytes_needed * spread / 2**30
            logger.info("memory: no CUDA graphs, with which a step would take up to %.1f GiB", most_gib)
            cuda_graphs = "off"
        if plan.fits or config.train.clips_per_pass != "auto":
            logger.info(
                "memory: %d of %d audio and %d of %d text layers are recomputed%s; a step takes %.1f of %.1f GiB",
                plan.num_audio, audio.num_layers, plan.num_text, text.num_layers,
                ", from inputs in host memory" if plan.parks else "", plan.bytes_needed / 2**30, gib,
            )  # fmt: skip
            if not plan.fits:
                logger.warning("memory: even so a step may not fit; lower batch_size, or use --clips_per_pass auto")
            clips_per_pass = 0 if config.train.clips_per_pass == "auto" else int(config.train.clips_per_pass)
            return Fitted(clips_per_pass, plan, cuda_graphs)
    num_clips = max(batch.num_clips for batch in batches)
    fitting = clips_in(audio, text, audio_tokens / max(1, num_clips), text_tokens / max(1, num_clips), room / spread)
    if fitting >= num_clips:
        logger.info("memory: all %d clips at once fit in %.1f GiB", num_clips, gib)
        return Fitted(0, Plan(0, 0, 0, True), cuda_graphs)
    if fitting < 1:
        raise ValueError(
            f"memory_cap_gib: {gib:.1f} GiB are left for a step, too little for one clip; raise it (0: all of the "
            "device's), or take a smaller model"
        )
    fitting = max(1, fitting // STEP_OF_CLIPS * STEP_OF_CLIPS)
    logger.info("memory: %d of %d clips are embedded at once, in two passes (%.1f GiB)", fitting, num_clips, gib)
    return Fitted(fitting, Plan(0, 0, 0, True), cuda_graphs)
