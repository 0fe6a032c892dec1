"""The training step with the towers as CUDA graphs and without: the same results? and how long does each take?

    python bench/graphs.py parity --clips 32             gradients and loss curves; exit code 1 when they differ
    python bench/graphs.py speed --clips 16 64           ms a step, captures, memory
    python bench/graphs.py speed --clips 16 --shapes tiny --device cpu      does it run at all

Random weights at the true 7B shapes, LoRA r16 on q/k/v of both towers, the flat optimizer with clipping; clips of about
1.6 s (log-normal, 0.3 to 4 s), their text, 1.3 terms each. A few different batches take turns, so that several size
classes come up; each is seen once before anything is timed.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import gc
import json
import math
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import tyro

from bench.random_checkpoint import PUBLISHED_AUDIO, PUBLISHED_TEXT, TINY_AUDIO, TINY_TEXT
from bin.feed import FedBatch
from bin.optimizer import parameter_groups
from bin.step import loss_share
from bin.update import FlatUpdate
from data.batches import Batch
from distributed.processes import World
from lora.inject import inject_lora
from lora.layers import LoraLinear
from lora.settings import LoraSettings
from losses.settings import LossSettings
from losses.temperature import Temperature
from model.build import build_model
from model.graphs import TowerGraphs
from model.settings import ModelSettings

LEAST_COSINE, MOST_CURVE_GAP = 0.9999, 0.02
TEXT_DEFAULTS = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
Mode = Literal["eager", "padded", "graphed"]


@dataclass
class GraphBenchSettings:
    """Compare graphed and eager training steps."""

    part: tyro.conf.Positional[Literal["parity", "speed"]]
    """What to look at."""
    clips: tuple[int, ...] = (16, 64, 128, 256)
    """Clips a step; parity takes the first."""
    shapes: Literal["full", "tiny"] = "full"
    """Towers as published, or small ones."""
    device: Literal["cuda", "cpu"] = "cuda"
    """On the CPU nothing is captured: packs are only filled up."""
    batches: int = 4
    """Different batches that take turns."""
    steps: int = 20
    """Steps timed, or of a curve."""
    seed: int = 0
    """Of weights and batches."""


def draw_batch(num_clips: int, rng: np.random.Generator) -> Batch:
    """Lengths as in real data, contents random. Every text and term is its own."""
    seconds_B = np.exp(rng.normal(math.log(1.5), 0.45, num_clips)).clip(0.3, 4.0)
    num_samples = (seconds_B * 16_000).astype(int).tolist()
    num_terms_B = 1 + (rng.random(num_clips) < 0.3).astype(np.int64)
    num_terms = int(num_terms_B.sum())
    text_lengths = (seconds_B * 3.2).round().clip(2, 16).astype(int).tolist()
    lengths = [*text_lengths, *rng.integers(2, 6, num_terms).tolist()]
    starts = np.concatenate([[0], num_terms_B.cumsum()]).astype(np.int64)
    keys = rng.permutation(1 << 20)[: num_clips + 2 * num_terms].astype(np.int64) + 1
    return Batch(
        clip_ids=[str(i) for i in range(num_clips)],
        clip_index_B=np.arange(num_clips),
        is_no_term_B=np.zeros(num_clips, bool),
        pcm_S=rng.normal(0, 3000, sum(num_samples)).astype(np.int16),
        num_samples=num_samples,
        token_ids_P=rng.integers(0, 250, sum(lengths)).astype(np.int64),
        token_lengths=lengths,
        num_texts=num_clips,
        text_row_B=np.arange(num_clips),
        text_keys_B=keys[:num_clips],
        terms=[str(i) for i in range(num_terms)],
        term_keys_N=keys[num_clips : num_clips + num_terms],
        term_groups_N=keys[num_clips + num_terms :],
        pos_indptr_B1=starts,
        pos_terms=np.arange(num_terms),
        ign_indptr_B1=np.zeros(num_clips + 1, np.int64),
        ign_groups=np.zeros(0, np.int64),
    )


class Trainee:
    """A model, its optimizer, and the same start again for each curve."""

    def __init__(self, settings: GraphBenchSettings) -> None:
        self.device = torch.device(settings.device)
        torch.manual_seed(settings.seed)
        is_tiny = settings.shapes == "tiny"
        configs = (
            PUBLISHED_AUDIO | (TINY_AUDIO if is_tiny else {}),
            PUBLISHED_TEXT | {"tokenizer": "bytes"} | (TINY_TEXT | {"vocab_size": 320} if is_tiny else TEXT_DEFAULTS),
        )
        with tempfile.TemporaryDirectory() as folder:
            paths = [Path(folder) / name for name in ("audio.json", "text.json")]
            for path, config in zip(paths, configs, strict=True):
                path.write_text(json.dumps(config))
            towers = ModelSettings(audio_model=str(paths[0]), text_model=str(paths[1]))
            built = build_model(towers, self.device)
        self.model = built.model.train()
        inject_lora(self.model, LoraSettings())
        with torch.no_grad():  # adapters that do something: B starts at zero
            for name, param in self.model.named_parameters():
                if name.endswith("lora_B"):
                    param.normal_(0.0, 0.01)
        self.temperature = Temperature().to(self.device)
        named = [(name, param) for name, param in self.model.named_parameters() if param.requires_grad]
        self.update = FlatUpdate(parameter_groups(named, built.sources, 0.01, 1.0), named, 1e-4, 0.999)
        self.world = World(0, 1, 0, self.device, "none", 0)
        self._start = [group.detach().clone() for group in self.update.flat.groups]

    def begin(self, mode: Mode, dropout: float, seed: int = 0) -> TowerGraphs | None:
        """The first weights again, no moments, and this way of running the towers."""
        with torch.no_grad():
            for group, start in zip(self.update.flat.groups, self._start, strict=True):
                group.copy_(start)
        self.update.optimizer.state.clear()
        for module in self.model.modules():
            if isinstance(module, LoraLinear):
                module.dropout = dropout
        graphs = None if mode == "eager" else TowerGraphs(self.model, mode == "graphed" and self.device.type == "cuda")
        if graphs is not None:
            graphs.start()
        self.model.graphs = graphs
        gc.collect()  # the graphs before, and their memory
        torch.manual_seed(seed)
        return graphs

    def loss(self, batch: FedBatch) -> torch.Tensor:
        self.update.zero()
        share, _, _ = loss_share(self.model, self.temperature, batch, LossSettings(), self.world, None)
        share.backward()
        return share.detach()

    def step(self, number: int, batch: FedBatch) -> list[float]:
        """Losses that have become known."""
        self.update.apply(number, {"loss": self.loss(batch)}, False, 1.0)
        return [outcome.losses["loss"] for outcome in self.update.outcomes(now=False)]

    def curve(self, batches: Sequence[FedBatch], steps: int) -> list[float]:
        losses = [loss for i in range(steps) for loss in self.step(i, batches[i % len(batches)])]
        return losses + [outcome.losses["loss"] for outcome in self.update.outcomes(now=True)]

    def feed(self, num_clips: int, count: int, seed: int) -> list[FedBatch]:
        """Batches whose packs lie on the device, as the loader's do when a step begins."""
        rng = np.random.default_rng((seed, num_clips))
        fed = [FedBatch.of(draw_batch(num_clips, rng)) for _ in range(count)]
        return [FedBatch(f.batch, f.audio and f.audio.to(self.device), f.text and f.text.to(self.device)) for f in fed]

    def synchronize(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def parity(trainee: Trainee, settings: GraphBenchSettings) -> bool:
    """Whether graphs give the gradients and loss curves of eager steps."""
    batches = trainee.feed(settings.clips[0], settings.batches, settings.seed)
    gradients = {}
    modes: tuple[Mode, ...] = ("eager", "graphed")
    for mode in modes:
        trainee.begin(mode, dropout=0.0)
        for batch in (batches[0], batches[-1], batches[0]):  # captured, another class in between, replayed
            trainee.loss(batch)
        gradients[mode] = trainee.update.flat.gradients_F.clone()
    own, expected = gradients["graphed"].double(), gradients["eager"].double()
    cosine = float(torch.nn.functional.cosine_similarity(own, expected, dim=0))
    ratio = float(own.norm() / expected.norm())
    print(
        f"gradient at {settings.clips[0]} clips, dropout off: cosine {cosine:.7f}, norm ratio {ratio:.5f}", flush=True
    )
    is_good = cosine >= LEAST_COSINE
    # Dropout's masks depend on the padded shape, so the eager curve to compare with is that of padded packs.
    pairs: list[tuple[float, Mode]] = [(0.0, "eager"), (0.1, "padded")]
    for dropout, mode in pairs:
        curves = []
        ways: tuple[Mode, ...] = (mode, "graphed")
        for way in ways:
            trainee.begin(way, dropout, seed=1)
            curves.append(trainee.curve(batches, settings.steps))
        gap = max(abs(a - b) for a, b in zip(*curves, strict=True))
        shown = "  ".join(
            f"{a:.4f}/{b:.4f}" for a, b in list(zip(*curves, strict=True))[:: max(1, settings.steps // 5)]
        )
        print(f"loss, dropout {dropout}, {mode}/graphed: {shown}; largest difference {gap:.5f}", flush=True)
        is_good &= gap <= MOST_CURVE_GAP
    return is_good


def speed(trainee: Trainee, settings: GraphBenchSettings) -> None:
    """One line a number of clips and mode."""
    print(f"{'clips':>5s} {'mode':8s} {'ms/step':>8s} {'host ms':>8s} {'clips/s':>8s} {'captures':>8s} {'in s':>6s} "
          f"{'peak GiB':>8s} {'reserved':>8s} {'waste %':>8s}")  # fmt: skip
    for num_clips in settings.clips:
        batches = trainee.feed(num_clips, settings.batches, settings.seed)
        modes: tuple[Mode, ...] = ("graphed", "eager")
        for mode in modes:
            graphs = trainee.begin(mode, dropout=0.1)
            if trainee.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.cuda.reset_peak_memory_stats()
            trainee.curve(batches, len(batches))  # each seen once
            trainee.synchronize()
            host, num_steps = [], settings.steps if mode == "graphed" else max(5, settings.steps // 3)
            began = time.perf_counter()
            for i in range(num_steps):  # as in training: the host may be a step ahead
                asked = time.perf_counter()
                trainee.step(i, batches[i % len(batches)])
                host.append(time.perf_counter() - asked)
            trainee.synchronize()
            ms, host_ms = (time.perf_counter() - began) / num_steps * 1e3, statistics.median(host) * 1e3
            trainee.update.outcomes(now=True)
            is_cuda = trainee.device.type == "cuda"
            peak = torch.cuda.max_memory_allocated() / 2**30 if is_cuda else 0.0
            reserved = torch.cuda.max_memory_reserved() / 2**30 if is_cuda else 0.0
            counts = (
                (graphs.num_captures, graphs.capture_s, graphs.waste * 100) if graphs is not None else (0, 0.0, 0.0)
            )
            print(f"{num_clips:5d} {mode:8s} {ms:8.1f} {host_ms:8.1f} {num_clips / ms * 1e3:8.0f} {counts[0]:8d} "
                  f"{counts[1]:6.1f} {peak:8.1f} {reserved:8.1f} {counts[2]:8.1f}", flush=True)  # fmt: skip
            trainee.model.graphs = graphs = None


def main(argv: Sequence[str] | None = None) -> int:
    settings = tyro.cli(GraphBenchSettings, args=argv, use_underscores=True, prog="bench/graphs.py")
    began = time.perf_counter()
    trainee = Trainee(settings)
    name = torch.cuda.get_device_name() if settings.device == "cuda" else "CPU"
    print(f"{name}, torch {torch.__version__}; model ready in {time.perf_counter() - began:.1f} s", flush=True)
    if settings.part == "parity":
        return 0 if parity(trainee, settings) else 1
    speed(trainee, settings)
    return 0


if __name__ == "__main__":
    sys.exit(main())
