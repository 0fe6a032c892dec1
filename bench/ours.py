"""Our training step as bin/train.py takes it, over towers of random weights that are drawn on the device.

Speed and memory do not depend on what the weights are, so nothing is downloaded or read. The objective is the peers':
both InfoNCE losses, hard negatives off.
"""

import json
import logging
import tempfile
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bench.drawn import as_batch, draw, on_device
from bench.limits import free_memory, synchronize
from bench.random_checkpoint import make_config
from bin.feed import FedBatch
from bin.optimizer import parameter_groups
from bin.step import Encoded, add_gradients, loss_share
from bin.update import make_update
from distributed.collectives import agree
from distributed.processes import World
from lora.inject import inject_lora
from lora.settings import LoraSettings
from losses.settings import LossSettings
from losses.temperature import Temperature
from model.audio_tower import AudioConfig
from model.build import Built, build_model
from model.dual import DualEncoder
from model.graphs import TowerGraphs, add_graphs
from model.settings import ModelSettings
from model.text_tower import TextConfig

OBJECTIVE = LossSettings(enable_hard_neg=False)
LEARNING_RATE, ADAM_BETA2 = 1e-4, 0.999
TINY_VOCABULARY = 400
MOST_TURNS = 4
"""Over the batches, before steps are timed: a larger class may drop graphs that then are captured once more."""


@dataclass(frozen=True)
class Shapes:
    """Shapes of both towers, as Hugging Face configs that leave nothing to defaults."""

    audio: dict[str, Any]
    text: dict[str, Any]

    @classmethod
    def of(cls, tiny: bool = False) -> "Shapes":
        """The published 7B's, or tiny ones (whose grouped queries no peer needs, so there are none)."""
        config = make_config("tiny" if tiny else "full", "v4", TINY_VOCABULARY)
        if tiny:
            config["text_config"]["num_key_value_heads"] = config["text_config"]["num_attention_heads"]
        return cls(AudioConfig.from_hf(config).to_hf(), TextConfig.from_hf(config).to_hf())

    def of_depth(self, num_layers: int) -> "Shapes":
        """The same with fewer layers in each tower."""
        return Shapes(self.audio | {"encoder_layers": num_layers}, self.text | {"num_hidden_layers": num_layers})

    def write(self, folder: Path) -> ModelSettings:
        """The two as architecture files, and the settings that name them."""
        audio, text = folder / "audio.json", folder / "text.json"
        audio.write_text(json.dumps(self.audio), encoding="utf-8")
        text.write_text(json.dumps(self.text), encoding="utf-8")
        return ModelSettings(audio_model=str(audio), text_model=str(text))

    @property
    def vocabulary(self) -> int:
        """Ids that may be drawn."""
        return min(150_000, int(self.text["vocab_size"]))

    def audio_parameters(self) -> int:
        """Weights that a token of the audio tower is multiplied with: its layers' matrices."""
        width = self.audio["d_model"]
        return self.audio["encoder_layers"] * (4 * width**2 + 2 * width * self.audio["encoder_ffn_dim"])

    def text_parameters(self) -> int:
        """Likewise of the text tower."""
        width, heads, kv_heads = (
            self.text[key] for key in ("hidden_size", "num_attention_heads", "num_key_value_heads")
        )
        attention = 2 * width * width * (heads + kv_heads) // heads
        return self.text["num_hidden_layers"] * (attention + 3 * width * self.text["intermediate_size"])

    def operations(self, audio_tokens: float, text_tokens: float) -> float:
        """Of a training step on frozen towers: 2 N a token forward, 2 N backward (no weight has a gradient)."""
        return 4.0 * (audio_tokens * self.audio_parameters() + text_tokens * self.text_parameters())


def build(
    shapes: Shapes,
    device: torch.device,
    lora: LoraSettings | None = None,
    compute_dtype: torch.dtype | None = None,
    **settings: Any,
) -> Built:
    """The model in training mode with adapters (by default those of the peers: r 16, dropout 0.1, on q, k and v).

    compute_dtype: as of build_model. `settings`: fields of ModelSettings.
    """
    loading, level = logging.getLogger("model.build"), logging.getLogger("model.build").level
    with tempfile.TemporaryDirectory() as folder:
        loading.setLevel(logging.ERROR)  # random frozen towers are meant here
        built = build_model(replace(shapes.write(Path(folder)), **settings), device, compute_dtype)
        loading.setLevel(level)
    inject_lora(built.model, lora or LoraSettings())
    built.model.train()
    return built


def trained(model: DualEncoder) -> dict[str, Tensor]:
    """Copies of the weights that train."""
    return {name: param.detach().clone() for name, param in model.named_parameters() if param.requires_grad}


@torch.no_grad()
def put_back(model: DualEncoder, weights: Mapping[str, Tensor]) -> None:
    """The weights of `trained` again, for another training from the same start."""
    for name, weight in weights.items():
        model.get_parameter(name).copy_(weight)


class Training:
    """One process's loop without data, logs and checkpoints.

    flat and cuda_graphs: as the settings flat_optimizer and cuda_graphs of a run. world: where there are several
    ranks; `wire_dtype` is what embeddings then travel in, None as they are.
    """

    def __init__(
        self,
        built: Built,
        objective: LossSettings = OBJECTIVE,
        flat: bool = True,
        cuda_graphs: str = "auto",
        world: World | None = None,
        wire_dtype: torch.dtype | None = None,
    ) -> None:
        self.built, self.model, self.objective = built, built.model, objective
        self.device = built.model.device
        self.world = world or World(0, 1, 0, self.device, "none", 0)
        self.wire_dtype = wire_dtype
        self.temperature = Temperature(objective.temperature, objective.learn_temperature).to(self.device)
        both = [*built.model.named_parameters(), *self.temperature.named_parameters()]
        self.named = [(name, param) for name, param in both if param.requires_grad]
        self.params = [param for _, param in self.named]
        groups = parameter_groups(self.named, built.sources, 0.01, 1.0)
        self.update = make_update(groups, self.named, LEARNING_RATE, ADAM_BETA2, flat)
        self._flat, self._cuda_graphs, self._num_steps = flat, cuda_graphs, 0
        self.graphs = self._make_graphs()

    def _make_graphs(self) -> TowerGraphs | None:
        return add_graphs(self.model, self._cuda_graphs, keeps_gradients=self._flat)

    def zero(self) -> None:
        self.update.zero()

    def backward(self, fed: FedBatch, clips_per_pass: int = 0, num_kept: int = 1) -> Tensor:
        """Loss and gradients of a batch, added to those that are there; the loss detached, on the device."""
        shares, _ = add_gradients(
            self.model,
            self.temperature,
            fed,
            self.objective,
            self.world,
            self.wire_dtype,
            None,
            clips_per_pass,
            1,
            num_kept,
        )
        return shares["loss"]

    def share(self, fed: FedBatch, encoded: Encoded) -> Tensor:
        """The loss of a batch whose embeddings are there."""
        return loss_share(
            self.model, self.temperature, fed, self.objective, self.world, self.wire_dtype, None, encoded
        )[0]

    def gradient(self) -> Tensor:
        """All gradients that there are, as one fp32 vector of its own."""
        return torch.cat([param.grad.float().flatten() for param in self.params if param.grad is not None])

    def step(self, fed: FedBatch, clips_per_pass: int = 0, num_kept: int = 1) -> Tensor:
        """One step; nothing here waits for the device but for what came of the step before, as in a run."""
        self.update.zero()
        loss = self.backward(fed, clips_per_pass, num_kept)
        if self.graphs is not None:
            self.graphs.start()
        self.update.apply(self._num_steps, {"loss": loss}, False, 1.0)
        self.update.outcomes(now=False)
        self._num_steps += 1
        return loss

    def curve(self, batches: Iterable[FedBatch]) -> list[float]:
        """The losses of a step on each of the batches."""
        return torch.stack([self.step(fed) for fed in batches]).tolist()

    def release(self) -> None:
        """Give back what the last batches took, CUDA graphs included, so that the next size starts even."""
        self.update.zero()
        synchronize(self.device)
        self.model.graphs = self.graphs = None
        free_memory(self.device)
        self.graphs = self._make_graphs()


@dataclass(frozen=True)
class Timed:
    """Steps of one batch size. Seconds are medians; a step is fenced, as the peers' are: the device idle before and
    after. `seconds_in_a_row`: the same steps without fences, as a run takes them."""

    clips: int
    steps: int
    seconds: float
    seconds_in_a_row: float
    first_seconds: float
    peak_gib: float | None
    audio_tokens: float  # a step
    text_tokens: float
    captures: int  # CUDA graphs, a forward and a backward one each; all before the first timed step
    capture_s: float
    waste: float  # tokens that packs are filled up with, as a share of own ones

    @property
    def clips_per_s(self) -> float:
        return self.clips / self.seconds


def batches(shapes: Shapes, device: torch.device, num_clips: int, count: int, seed: int = 0) -> list[FedBatch]:
    """The first batches of the generator that the peers draw from, on the device."""
    generator = torch.Generator().manual_seed(seed)
    drawn = [draw(num_clips, generator) for _ in range(count)]
    return [on_device(as_batch(one, i, shapes.vocabulary), device) for i, one in enumerate(drawn)]


def warm_up(training: Training, fed: list[FedBatch]) -> float:
    """Steps over the batches in turn, each at least once, until a whole turn needs no capture, on any rank. Seconds of
    the first."""
    first_seconds = 0.0
    for turn in range(MOST_TURNS):
        before = num_captures(training)
        for i, one in enumerate(fed):
            started = time.perf_counter()
            training.step(one)
            if turn == i == 0:
                synchronize(training.device)
                first_seconds = time.perf_counter() - started
        # The very first step is eager, so that a class is sure to have been captured after the second turn only.
        is_settled = training.graphs is None or (turn > 0 and num_captures(training) == before)
        if not agree(unsettled=not is_settled)["unsettled"]:
            break
    return first_seconds


def num_captures(training: Training) -> int:
    return 0 if training.graphs is None else training.graphs.num_captures


def time_steps(training: Training, fed: list[FedBatch], steps: int = 20, in_a_row: int = 8) -> Timed:
    """Time steps over the batches in turn, once all of them have been seen. RuntimeError if a graph is captured
    meanwhile."""
    device = training.device
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    first_seconds = warm_up(training, fed)
    captures = num_captures(training)
    times: list[float] = []
    for i in range(steps):
        synchronize(device)
        started = time.perf_counter()
        training.step(fed[i % len(fed)])
        synchronize(device)
        times.append(time.perf_counter() - started)
    started = time.perf_counter()
    for i in range(in_a_row):
        training.step(fed[i % len(fed)])
    synchronize(device)
    seconds_in_a_row = (time.perf_counter() - started) / in_a_row
    if num_captures(training) != captures:
        raise RuntimeError(f"{num_captures(training) - captures} CUDA graphs were captured while steps were timed")
    tokens, graphs = [count_tokens(one) for one in fed], training.graphs
    return Timed(
        clips=fed[0].batch.num_clips,
        steps=steps,
        seconds=sorted(times)[steps // 2],
        seconds_in_a_row=seconds_in_a_row,
        first_seconds=first_seconds,
        peak_gib=peak_gib(device),
        audio_tokens=sum(audio for audio, _ in tokens) / len(tokens),
        text_tokens=sum(text for _, text in tokens) / len(tokens),
        captures=captures,
        capture_s=0.0 if graphs is None else graphs.capture_s,
        waste=0.0 if graphs is None else graphs.waste,
    )


def count_tokens(fed: FedBatch) -> tuple[int, int]:
    """(audio tokens, text tokens) that the towers' layers work on."""
    frames = [-(-samples // 160) for samples in fed.batch.num_samples]
    return sum((one - 1) // 2 + 1 for one in frames), sum(fed.batch.token_lengths)


@torch.no_grad()
def wake_adapters(model: torch.nn.Module, std: float = 0.05) -> None:
    """Random values for lora_B, which is zero at the start: lora_A would have no gradient."""
    for name, param in model.named_parameters():
        if name.endswith("lora_B"):
            param.normal_(0, std)


def cap_memory(gib: float, device: torch.device) -> None:
    """Let this process's allocator take no more than so much of the device, as if it were smaller."""
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, gib * 2**30 / total), device.index)  # None: the current one


def peak_gib(device: torch.device) -> float | None:
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == "cuda" else None


def without_dropout() -> LoraSettings:
    return replace(LoraSettings(), lora_dropout=0.0)
