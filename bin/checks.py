"""What is checked across rooms when a run is built, and the plan that --dry_run prints.

Rooms never import one another, so facts that two of them state are compared here.
"""

import logging

import data.audio
import model.logmel
from bin.config import Config
from bin.datasets import load_datasets
from data.loader import Loader
from distributed.health import ArrivingGradients
from distributed.processes import World
from lora.inject import inject_lora
from model.attention import resolve_backend
from model.build import build_model
from model.dual import DualEncoder

logger = logging.getLogger("earmark")


def check_rooms_agree(built: DualEncoder) -> None:
    """Sample rate and longest clip, as the data room cuts them and as the model reads them."""
    assert data.audio.SAMPLE_RATE == model.logmel.SAMPLE_RATE, (data.audio.SAMPLE_RATE, model.logmel.SAMPLE_RATE)
    reach_s = built.audio_tower.config.max_frames * model.logmel.HOP / model.logmel.SAMPLE_RATE
    if reach_s < data.audio.MAX_CLIP_S:
        logger.warning("this audio tower reads %.1f s at most; longer clips fail when they come up", reach_s)


def check_all_train(arriving: ArrivingGradients) -> None:
    """After the first backward pass. A collective; RuntimeError, on every rank, names what no gradient has reached."""
    untrained = arriving.missing()
    if untrained:
        raise RuntimeError(
            f"{len(untrained)} trainable tensors get no gradient: {', '.join(untrained[:8])}; "
            "they would never train. Check --lora_targets and the loss weights"
        )


def describe_plan(config: Config, world: World) -> None:
    """Settings, data and model checked as a run would, then one table of what would run. Nothing is written."""
    found = load_datasets(config.data, world, None)
    built = build_model(config.model, world.device)
    num_adapted = len(inject_lora(built.model, config.lora)) if config.model.trainable == "lora" else 0
    check_rooms_agree(built.model)
    resolve_backend(config.model.attention, world.device, built.model.compute_dtype)
    loader = Loader(
        found.train,
        config.train.batch_size // config.train.grad_accum_steps,
        built.tokenizer,
        config.data,
        seed=config.train.seed,
        rank=world.rank,
        world_size=world.world_size,
        windows=found.windows,
    )
    steps = loader.steps_per_epoch // config.train.grad_accum_steps
    if steps == 0:
        raise ValueError(
            f"batch_size: got {config.train.batch_size}, but an epoch has only {loader.num_items} clips; lower it"
        )
    batch = next(iter(loader.epoch(0)))
    params = list(built.model.parameters())
    trainable = sum(p.numel() for p in params if p.requires_grad)
    rows = {
        "processes": f"{world.world_size} on {world.device.type}",
        "towers": f"{built.sources['audio_tower']} | {built.sources['language_model']}",
        "parameters": f"{trainable / 1e6:.2f} M train of {sum(p.numel() for p in params) / 1e6:.2f} M",
        "adapters": f"{num_adapted} layers, r {config.lora.lora_r}" if num_adapted else "none (trainable=full)",
        "training clips": f"{len(found.train)} and {loader.num_windows} random windows an epoch",
        "test clips": f"{len(found.test)}" + ("" if found.dev is None else f", dev {len(found.dev)}"),
        "terms ranked": f"{len(found.terms)}, {len(found.seen_terms & set(found.terms))} of them seen in training",
        "dropped": found.drops.summary(),
        "steps": f"{steps} an epoch, {min(steps * config.train.epochs, config.train.max_steps or 10**12)} in all",
        "first batch": f"{batch.num_clips} clips, {batch.duration_s:.1f} s, {batch.num_terms} terms on this process",
    }
    if world.is_main:
        for name, value in rows.items():
            logger.info("%-15s %s", name, value)
        logger.info("dry run: all of this is in order; no run directory was made")
