"""How many clips fit under 40 GiB: without recomputing anything, and with recomputed layers.

    python bench/memory.py [--tiny] [--json FILE]

The model of bench/step.py, with everything on but CUDA graphs, whose classes share memory imperfectly. The layers to
recompute are those that `--checkpointing auto` chooses (model/memory.py). One size after the other is tried until one
does not fit: what a line shows has run, a step of forward, backward and optimizer. What the peers take is in the table
of bench/step.py.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, synchronize
from bench.ours import Shapes, Training, batches, build, cap_memory, count_tokens, peak_gib
from bin.fit import costs, room_bytes
from model.memory import Plan, bytes_needed, parked, plan_layers

CAP_GIB = 40.0
WHOLE_SIZES, TINY_SIZES = (240, 248, 256, 280, 320, 360, 400), (2, 4)
RECOMPUTED_SIZES = (400, 4000)  # 4,000: inputs of layers are in host memory
PARITY_CLIPS, LEAST_COSINE = 32, 0.9999
WHOLE_TARGET, RECOMPUTED_TARGET = 400, 4000


def gradient(training: Training, fed: Any) -> Tensor:
    training.zero()
    torch.manual_seed(0)
    training.backward(fed)
    return training.gradient()


def set_plan(training: Training, num_audio: int, num_text: int, parks: bool = False) -> None:
    training.model.audio_tower.num_checkpointed = num_audio
    training.model.language_model.num_checkpointed = num_text
    training.model.audio_tower.parks_checkpoints = training.model.language_model.parks_checkpoints = parks
    training.release()


def check_gradient(training: Training, shapes: Shapes, num_clips: int) -> float:
    """Least cosine of the gradients with half of the layers recomputed, from inputs on the device and on the host, to
    those with none, dropout on."""
    fed = batches(shapes, training.device, num_clips, 1)[0]
    found = []
    towers = (training.model.audio_tower, training.model.language_model)
    halves = [len(tower.layers) // 2 for tower in towers]
    for share, parks in ((0, False), (1, False), (1, True)):
        set_plan(training, halves[0] * share, halves[1] * share, parks)
        found.append(gradient(training, fed))
    set_plan(training, 0, 0)
    cosine = min(float(F.cosine_similarity(found[0].double(), other.double(), dim=0)) for other in found[1:])
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"gradient with recomputed layers: cosine {cosine:.6f}, at least {LEAST_COSINE}")
    return cosine


@dataclass
class Tried:
    """A size, the layers that were recomputed for it, and what a step took."""

    clips: int
    plan: Plan
    fits: bool
    peak_gib: float | None
    step_gib: float | None
    """Of the peak, what was not there before the step."""
    formula_gib: float
    audio_mib: float
    """A clip, by the formula."""
    text_mib: float
    seconds: float
    """With drawing the clips, planning, and making ready what the first step of a size needs."""


def try_sizes(training: Training, shapes: Shapes, recomputes: bool, sizes: Sequence[int]) -> list[Tried]:
    """A step of each size, up to the first that does not fit."""
    device, tried = training.device, []
    for num_clips in sizes:
        started = time.perf_counter()
        fed = batches(shapes, device, num_clips, 1)[0]
        audio_tokens, text_tokens = count_tokens(fed)
        audio, text = costs(training.model)
        plan = Plan(0, 0, 0, True)
        if recomputes:
            room = room_bytes(CAP_GIB, training.model)
            assert room is not None
            plan = plan_layers(audio, text, audio_tokens, text_tokens, room, may_park=True)
        set_plan(training, plan.num_audio, plan.num_text, plan.parks)
        if plan.parks:
            audio, text = parked(audio), parked(text)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        before, fits = held_gib(device), True
        try:
            training.step(fed)
            synchronize(device)
        except torch.OutOfMemoryError:
            fits = False
        peak = peak_gib(device) if fits else None
        tried.append(Tried(
            num_clips, plan, fits, peak, None if peak is None else peak - before,
            bytes_needed(audio, text, audio_tokens, text_tokens, plan.num_audio, plan.num_text) / 2**30,
            audio.bytes_of(plan.num_audio, audio_tokens) / num_clips / 2**20,
            text.bytes_of(plan.num_text, text_tokens) / num_clips / 2**20,
            time.perf_counter() - started,
        ))  # fmt: skip
        print(tried[-1], flush=True)  # should it be stopped, this much is known
        training.release()
        if not fits:
            break
    return tried


def held_gib(device: torch.device) -> float:
    return torch.cuda.memory_allocated() / 2**30 if device.type == "cuda" else 0.0


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Clips that fit in one pass under a cap."""
    device, shapes = bench_device(), Shapes.of(tiny)
    cap_memory(CAP_GIB, device)
    torch.manual_seed(0)
    training = Training(build(shapes, device), cuda_graphs="off")
    found = Findings(f"clips in one pass under {CAP_GIB:.0f} GiB, one GPU")
    whole = try_sizes(training, shapes, False, TINY_SIZES if tiny else WHOLE_SIZES)
    cosine = check_gradient(training, shapes, 4 if tiny else PARITY_CLIPS)
    recomputed = try_sizes(training, shapes, True, TINY_SIZES if tiny else RECOMPUTED_SIZES)
    report(found, whole, recomputed, cosine)
    return found


def report(found: Findings, whole: list[Tried], recomputed: list[Tried], cosine: float) -> None:
    """Rows and checks of what was tried."""
    found.check("gradient with recomputed layers, cosine", cosine, LEAST_COSINE)
    for name, tried in (("nothing recomputed", whole), ("layers recomputed", recomputed)):
        for one in tried:
            a_clip = None if one.step_gib is None else one.step_gib * 1024 / one.clips
            found.rows.append({
                "": name + (", inputs on the host" if one.plan.parks else ""), "clips": one.clips,
                "audio layers": one.plan.num_audio, "text layers": one.plan.num_text,
                "GiB": one.peak_gib if one.fits else "out of memory", "of a step": one.step_gib,
                "formula": one.formula_gib, "MiB a clip": a_clip,
                "audio, formula": one.audio_mib, "text, formula": one.text_mib, "s in all": one.seconds,
            })  # fmt: skip
    for name, tried, target in (
        ("clips without recomputing", whole, WHOLE_TARGET),
        ("clips with recomputed layers", recomputed, RECOMPUTED_TARGET),
    ):
        found.check(name, max((one.clips for one in tried if one.fits), default=None), target)
    found.notes.append("formula: what layers keep and work in (model/memory.py); what the peers take: bench/step.py")


if __name__ == "__main__":
    sys.exit(run_alone(measure))
