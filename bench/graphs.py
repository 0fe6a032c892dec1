"""CUDA graphs in the training step and eager steps: the same gradients and loss curves?

    python bench/graphs.py --clips 32                    exit code 1 when they differ
    python bench/graphs.py --clips 4 --shapes tiny --device cpu      does it run at all

The step of bench/ours.py on random weights at the true 7B shapes, with the losses of a run. A few different batches
take turns, so that several size classes come up. Speed is bench/step.py's: `--ours --clips 16 256`, and the same with
`--cuda_graphs off`.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import tyro
from torch import Tensor

from bench.ours import Shapes, Training, batches, build, put_back, trained, wake_adapters
from bin.feed import FedBatch
from distributed.processes import use_growing_segments
from lora.layers import LoraLinear
from losses.settings import LossSettings
from model.build import Built
from model.graphs import TowerGraphs

LEAST_COSINE, MOST_CURVE_GAP = 0.9999, 0.02
Mode = Literal["eager", "padded", "graphed"]


@dataclass
class GraphBenchSettings:
    """Compare graphed and eager training steps."""

    clips: int = 32
    """Clips a step."""
    shapes: Literal["full", "tiny"] = "full"
    """Towers as published, or small ones."""
    device: Literal["cuda", "cpu"] = "cuda"
    """On the CPU nothing is captured: packs are only filled up."""
    batches: int = 4
    """Different batches that take turns."""
    steps: int = 20
    """Steps of a curve."""
    seed: int = 0
    """Of weights and batches."""


def begin(built: Built, start: Mapping[str, Tensor], mode: Mode, dropout: float, seed: int = 0) -> Training:
    """A training from the weights `start` with this way of running the towers, graphs captured from its first step on.
    What was captured before must have been released."""
    put_back(built.model, start)
    for module in built.model.modules():
        if isinstance(module, LoraLinear):
            module.dropout = dropout
    training = Training(built, LossSettings(), cuda_graphs="off")
    if mode != "eager":
        training.graphs = TowerGraphs(built.model, mode == "graphed" and training.device.type == "cuda")
        training.graphs.start()
    built.model.graphs = training.graphs
    torch.manual_seed(seed)
    return training


def gradients(built: Built, start: Mapping[str, Tensor], mode: Mode, fed: Sequence[FedBatch]) -> Tensor:
    """Of the first batch in fp64, dropout off: captured, another class in between, replayed."""
    training = begin(built, start, mode, dropout=0.0)
    for batch in (fed[0], fed[-1], fed[0]):
        training.zero()
        training.backward(batch)
    found = training.gradient().double()
    training.release()
    return found


def curve(
    built: Built, start: Mapping[str, Tensor], mode: Mode, dropout: float, fed: Sequence[FedBatch], steps: int
) -> list[float]:
    """Losses of steps over the batches in turn."""
    training = begin(built, start, mode, dropout, seed=1)
    losses = training.curve(itertools.islice(itertools.cycle(fed), steps))
    training.release()
    return losses


def parity(built: Built, fed: Sequence[FedBatch], steps: int) -> bool:
    """Whether graphs give the gradients and loss curves of eager steps."""
    start = trained(built.model)
    own, expected = gradients(built, start, "graphed", fed), gradients(built, start, "eager", fed)
    cosine = float(torch.nn.functional.cosine_similarity(own, expected, dim=0))
    ratio = float(own.norm() / expected.norm())
    print(
        f"gradient at {fed[0].batch.num_clips} clips, dropout off: cosine {cosine:.7f}, norm ratio {ratio:.5f}",
        flush=True,
    )
    is_good = cosine >= LEAST_COSINE
    # Dropout's masks depend on the padded shape, so the eager curve to compare with is that of padded packs.
    pairs: list[tuple[float, Mode]] = [(0.0, "eager"), (0.1, "padded")]
    for dropout, mode in pairs:
        plain = curve(built, start, mode, dropout, fed, steps)
        graphed = curve(built, start, "graphed", dropout, fed, steps)
        both = list(zip(plain, graphed, strict=True))
        gap = max(abs(a - b) for a, b in both)
        shown = "  ".join(f"{a:.4f}/{b:.4f}" for a, b in both[:: max(1, steps // 5)])
        print(f"loss, dropout {dropout}, {mode}/graphed: {shown}; largest difference {gap:.5f}", flush=True)
        is_good &= gap <= MOST_CURVE_GAP
    return is_good


def main(argv: Sequence[str] | None = None) -> int:
    settings = tyro.cli(GraphBenchSettings, args=argv, use_underscores=True, prog="bench/graphs.py")
    began = time.perf_counter()
    use_growing_segments()
    device, shapes = torch.device(settings.device), Shapes.of(settings.shapes == "tiny")
    torch.manual_seed(settings.seed)
    built = build(shapes, device)
    wake_adapters(built.model, 0.01)
    name = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; model ready in {time.perf_counter() - began:.1f} s", flush=True)
    fed = batches(shapes, device, settings.clips, settings.batches, settings.seed)
    return 0 if parity(built, fed, settings.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
