"""Every optimisation of the training step on, all of them off, and each one off alone: the same loss curve?

    python bench/switches.py [--tiny] [--json FILE]

The same weights and batches each time, dropout off, a quarter of the published depth. Rounding differs with the order
of operations, so that curves part slowly; they must stay within MOST_GAP of the loss at every step. Milliseconds are
of this depth: what a setting buys at full depth is bench/step.py's matter.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import time
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

import torch

from bench.drawn import NUM_BATCHES
from bench.findings import Findings, run_alone
from bench.limits import Limits, bench_device, free_memory, synchronize
from bench.ours import OBJECTIVE, Shapes, Training, batches, build, without_dropout
from bin.feed import FedBatch

DEPTH, NUM_CLIPS, NUM_STEPS = 8, 64, 20
MOST_GAP = 0.02
"""Of the loss, in bf16; on the CPU, in fp32, see tests/bench/test_switches.py."""


@dataclass(frozen=True)
class Switches:
    """Each optimisation by the flag that switches it; defaults: all on."""

    kernels: str = "auto"
    attention: str = "auto"
    cuda_graphs: str = "auto"
    lora_fused: bool = True
    lora_joint: bool = True
    loss_kernels: str = "fused"
    flat_optimizer: bool = True


ALL_OFF = Switches("torch", "sdpa", "off", False, False, "dense", False)


def each_off() -> dict[str, Switches]:
    """Name of a flag -> everything on but that."""
    return {field.name: replace(Switches(), **{field.name: getattr(ALL_OFF, field.name)}) for field in fields(Switches)}


@dataclass(frozen=True)
class Curve:
    losses: list[float]
    ms: float
    """Median of a step, without the first turn over the batches."""

    def gap(self, other: "Curve") -> float:
        """Largest difference between two curves at a step, of the loss there."""
        return max(abs(a - b) / abs(b) for a, b in zip(self.losses, other.losses, strict=True))


def train(shapes: Shapes, switches: Switches, fed: list[FedBatch], num_steps: int) -> Curve:
    """A short training from the same weights over the batches in turn, dropout off."""
    device = bench_device()
    torch.manual_seed(0)
    lora = replace(without_dropout(), lora_fused=switches.lora_fused, lora_joint=switches.lora_joint)
    built = build(shapes, device, lora, kernels=switches.kernels, attention=switches.attention)
    objective = replace(OBJECTIVE, loss_kernels=switches.loss_kernels)
    training = Training(built, objective, switches.flat_optimizer, switches.cuda_graphs)
    losses, times = [], []
    for i in range(num_steps):
        synchronize(device)
        started = time.perf_counter()
        losses.append(training.step(fed[i % len(fed)]))
        synchronize(device)
        times.append(time.perf_counter() - started)
    later = sorted(times[min(len(fed) + 1, num_steps - 1) :])
    curve = Curve([float(loss) for loss in losses], later[len(later) // 2] * 1e3)
    del training, built
    free_memory(device)
    return curve


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """Loss curves with optimisations on and off."""
    shapes = Shapes.of(tiny) if tiny else Shapes.of().of_depth(DEPTH)
    clips, steps = (3, 6) if tiny else (NUM_CLIPS, NUM_STEPS)
    found = Findings(f"loss curves of {steps} steps, {clips} clips, with every optimisation on and off")
    variants = {"all on": Switches(), "all off": ALL_OFF, **each_off()}
    fed = batches(shapes, bench_device(), clips, NUM_BATCHES)
    curves = {}
    for name, switches in variants.items():
        started = time.perf_counter()
        curves[name] = curve = train(shapes, switches, fed, steps)
        print(f"{name}: {curve.ms:.1f} ms a step, {time.perf_counter() - started:.1f} s in all", flush=True)
    on, off = curves["all on"], curves["all off"]
    for name, curve in curves.items():
        found.rows.append({
            "": name if name.startswith("all") else f"{name} off", "first loss": curve.losses[0],
            "last loss": curve.losses[-1], "largest gap to all off": curve.gap(off), "ms": curve.ms,
            "times all on": curve.ms / on.ms,
        })  # fmt: skip
    widest = max(curve.gap(off) for curve in curves.values())
    found.check("largest gap between curves, of the loss", widest, MOST_GAP, "at most")
    found.check("how far the loss moves, in gaps", movement(off.losses) / max(on.gap(off), 1e-12), 3)
    return found


def movement(losses: Sequence[float]) -> float:
    """From the highest to the lowest loss, of the first: what a curve must show for a comparison to mean anything."""
    return (max(losses) - min(losses)) / losses[0]


if __name__ == "__main__":
    sys.exit(run_alone(measure))
