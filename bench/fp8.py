"""The frozen towers' products in fp8 beside bf16: speed of a training step, embeddings, and the curve of training.

    python bench/fp8.py [--tiny] [--json FILE]

The published 7B's shapes; both ways the same random weights, adapters, clips and random state, one model after the
other in this process. Speed is bench/step.py's: the step of bin/train.py with CUDA graphs. Embeddings are compared in
evaluation, adapters in place (their B is zero, so they add nothing). Of random towers all embeddings have much in
common; so their cosine is also given after the mean over the clips (terms) is taken off, which hides nothing.

The task: the same clips and terms at each step, which adapters and heads of both models learn from the same start.
Noise is the difference between two bf16 runs that drop out other elements. What pretrained towers would say about fp8
cannot be measured here: no checkpoint is read.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import itertools
import time
from dataclasses import dataclass, field

import torch
from torch import Tensor

from bench.findings import Cell, Findings, run_alone
from bench.limits import Limits, bench_device, free_memory, synchronize
from bench.ours import Shapes, Timed, Training, batches, build, put_back, time_steps, trained
from bin.feed import FedBatch
from model.fp8 import quantise_frozen, why_no_fp8

SIZES, TINY_SIZES = (384,), (2,)
NUM_BATCHES, STEPS = 1, 20
TASK_CLIPS, TASK_STEPS = 64, 20
SEEDS = (7, 8)
"""Of dropout in the task; the second for the noise."""


@dataclass
class Side:
    """What one storage type gave."""

    name: str
    built_s: float = 0.0
    audio_BE: Tensor | None = None
    text_NE: Tensor | None = None
    curves: list[list[float]] = field(default_factory=list)
    timed: dict[int, Timed | None] = field(default_factory=dict)


def embed(training: Training, fed: FedBatch) -> tuple[Tensor, Tensor]:
    """(audio, terms) of a batch in evaluation, on the CPU."""
    model = training.model
    assert fed.audio is not None
    assert fed.text is not None
    model.eval()
    with torch.no_grad():
        audio_BE, text_NE = model.encode_audio(fed.audio), model.encode_text(fed.text)
    model.train()
    return audio_BE.cpu(), text_NE.cpu()


def run_side(name: str, shapes: Shapes, device: torch.device, tiny: bool) -> Side:
    side, started = Side(name), time.perf_counter()
    torch.manual_seed(0)
    is_cuda = device.type == "cuda"
    built = build(shapes, device, base_dtype=name if is_cuda else "auto")
    if name == "fp8" and not is_cuda:  # which the settings refuse; for a test of this program
        quantise_frozen(built.model)
    start = trained(built.model)
    synchronize(device)
    side.built_s = time.perf_counter() - started
    task = batches(shapes, device, 2 if tiny else TASK_CLIPS, 1, seed=1)[0]
    for seed in SEEDS if name == "bf16" else SEEDS[:1]:
        put_back(built.model, start)
        training = Training(built)
        if not side.curves:
            side.audio_BE, side.text_NE = embed(training, batches(shapes, device, 4 if tiny else SIZES[0], 1)[0])
        torch.manual_seed(seed)
        side.curves.append(training.curve(itertools.repeat(task, TASK_STEPS)))
        training.release()
    for num_clips in TINY_SIZES if tiny else SIZES:
        try:
            fed = batches(shapes, device, num_clips, NUM_BATCHES)
            side.timed[num_clips] = time_steps(training, fed, 3 if tiny else STEPS, in_a_row=2)
        except torch.OutOfMemoryError:
            side.timed[num_clips] = None
        training.release()
    return side


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """A training step with frozen products in fp8 beside bf16."""
    device, shapes = bench_device(), Shapes.of(tiny)
    reason = why_no_fp8(device, torch.bfloat16)
    if reason is not None and not tiny:
        raise RuntimeError(f"fp8 {reason}")
    sides = []
    for name in ("bf16", "fp8"):
        sides.append(run_side(name, shapes, device, tiny))
        free_memory(device)
    found = Findings("frozen products in fp8 beside bf16, LoRA r 16 on q, k, v of both towers, one GPU")
    compare(found, shapes, limits, *sides)
    return found


def compare(found: Findings, shapes: Shapes, limits: Limits, plain: Side, ours: Side) -> None:
    """Rows, checks and remarks of what both sides gave."""
    best: dict[str, float] = {}
    for side in (plain, ours):
        for num_clips, timed in side.timed.items():
            row: dict[str, Cell] = {"products": side.name, "clips": num_clips}
            if timed is None:
                found.rows.append(row | {"ms": "out of memory"})
                continue
            beside = plain.timed.get(num_clips)
            flops = shapes.operations(timed.audio_tokens, timed.text_tokens) / timed.seconds
            best[side.name] = max(best.get(side.name, 0.0), timed.clips_per_s)
            found.rows.append(
                row
                | {
                    "ms": timed.seconds * 1e3, "clips/s": timed.clips_per_s, "GiB": timed.peak_gib,
                    "x bf16": None if beside is None else beside.seconds / timed.seconds,
                    "TFLOP/s": flops / 1e12, "of the bf16 matrix rate": f"{flops / limits.matrix_flops:.0%}",
                    "steps": timed.steps, "graphs": timed.captures,
                }
            )  # fmt: skip
    ratio = best["fp8"] / best["bf16"] if len(best) == 2 else None
    found.check("best batch, times bf16's best", ratio, 1.3)
    for name, one, other in (("audio", plain.audio_BE, ours.audio_BE), ("terms", plain.text_NE, ours.text_NE)):
        assert one is not None
        assert other is not None
        cosines = torch.cosine_similarity(one, other)
        own = torch.cosine_similarity(one - one.mean(0), other - one.mean(0))
        found.check(f"{name}: least cosine of an embedding to bf16's", float(cosines.min()), 0.995)
        found.notes.append(
            f"{name}: cosine {float(cosines.mean()):.5f} in the mean of {len(one)}, {float(cosines.min()):.5f} at "
            f"least; with the mean embedding taken off {float(own.mean()):.5f} and {float(own.min()):.5f}"
        )
    first, second, in_fp8 = (torch.tensor(one) for one in (*plain.curves, *ours.curves))
    noise, off = (float((one - first).abs().mean()) for one in (second, in_fp8))
    for name, one in (("bf16", first), ("bf16, other dropout", second), ("fp8", in_fp8)):
        found.notes.append(f"loss, {name}: {' '.join(f'{value:.3f}' for value in one.tolist())}")
    fall = float(first[0] - first[-1])
    found.notes.append(
        f"mean distance to bf16's loss, which fell by {fall:.3f}: fp8 {off:.4f}, other dropout {noise:.4f}"
    )
    found.notes.append(f"built in {plain.built_s:.1f} s (bf16), {ours.built_s:.1f} s (fp8)")


if __name__ == "__main__":
    sys.exit(run_alone(measure))
