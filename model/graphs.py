"""The towers' training passes as CUDA graphs: one launch where there were thousands.

    eager:     pack -> tables, mel (or ids), filled up to a size class (model/sizes.py)
    replayed:  -> tower -> mean -> head -> embeddings                             forward graph of the class
    eager:     own rows cut out -> gathered -> loss -> their gradient
    replayed:  dummies' gradient zero -> tower, backwards -> added to `.grad`     backward graph of the class

Each class is captured when it first comes up, after one eager pass that lets libraries and kernels make themselves
ready. All classes of a side share one memory pool: what a forward graph leaves there is only good until the next one
runs. Dropout draws the numbers that an eager pass would draw from torch's generator; the preparations take none of
them. (Reference: PyTorch's notes on CUDA graphs.)

A tower's kernels leave parts of the device idle: few tokens all the time, many at the end of each kernel. So the two
sides' graphs run beside each other, clips on a stream of their own, from log-mel to embeddings and backwards.

Weights are read where they lie and gradients added where they lie, so neither may move: see distributed/flat.py.

Shapes: N sequences, P packed tokens, T mel frame slots, M mels, E embedding.
"""

import gc
import logging
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from model.attention import resolve_backend
from model.audio_tower import AudioAttention
from model.captures import Capture, Replay, Side, new_pool, outlive_broken_capture
from model.dual import DualEncoder
from model.packing import AudioLayout, AudioPack, SequenceLayout, TextPack, frames_of, tokens_of
from model.sizes import SizeClass
from model.tables import Tables
from model.text_tower import TextAttention

logger = logging.getLogger(__name__)

MAX_CAPTURES = 64
"""Size classes of both sides; what comes up beyond them runs eagerly."""
SHORTEST_AUDIO, SHORTEST_TEXT = 64, 16
"""Least bound of a class on its longest sequence, in tokens."""


def why_no_graphs(model: DualEncoder) -> str | None:
    """What keeps this model's training from running as CUDA graphs; None: nothing."""
    if model.device.type != "cuda":
        return f"it computes on {model.device.type}"
    if model.windows is not None:
        return "readout=maxsim counts its windows on the host"
    if model.audio_tower.num_checkpointed or model.language_model.num_checkpointed:
        return "checkpointing is on"
    if model.audio_tower.layer_norm.weight.requires_grad:
        return "trainable=full"
    for module in model.modules():
        if isinstance(module, AudioAttention | TextAttention):
            backend = resolve_backend(module.attention, model.device, model.compute_dtype, module.heads.head_dim)
            if backend == "sdpa":
                return "attention is sdpa, whose shapes follow the lengths"
    return None


def add_graphs(model: DualEncoder, wanted: str, keeps_gradients: bool) -> "TowerGraphs | None":
    """Let a model train with CUDA graphs, if it can. To be called when it has all that trains.

    wanted: auto, on or off. keeps_gradients: whether weights and `.grad` stay where they are for the whole run. Raises
    ValueError when they are `on` and cannot be.
    """
    reason = why_no_graphs(model) or (None if keeps_gradients else "gradients move with flat_optimizer off")
    if wanted == "on" and reason is not None:
        raise ValueError(f"cuda_graphs: got 'on', but {reason}; use auto or off")
    if wanted == "off" or reason is not None:
        if wanted == "auto" and model.device.type == "cuda":
            logger.info("no CUDA graphs: %s; small batches are slower", reason)
        return None
    model.graphs = TowerGraphs(model)
    return model.graphs


class _Pass(NamedTuple):
    """A pack and its size class. What goes to the device is made when it is asked for."""

    side: Side
    size: SizeClass
    lengths: Sequence[int]
    """In tokens, of the pack's own sequences."""
    tables: Callable[[], Tables]
    payload: Callable[[Tables], Tensor]
    """Mel or ids, filled up."""


class TowerGraphs:
    """Stands in for `encode_audio` and `encode_text` of a model in training mode.

    Packs are filled up to size classes from the first on, without gradient too, so that numbers drawn for dropout
    depend neither on when a class is captured nor on which of two passes it is (distributed/bigbatch.py). captures:
    without, everything runs eagerly (on a CPU, or for comparison).
    """

    def __init__(self, model: DualEncoder, captures: bool = True, most: int = MAX_CAPTURES) -> None:
        self._model, self._captures, self._most = model, captures, most
        self._is_started = False
        self._params: list[nn.Parameter] = [p for p in model.parameters() if p.requires_grad]
        self._anchor = torch.zeros((), device=model.device, requires_grad=True)  # gives replays a place in the history
        self._audio = Side("audio", self._run_audio, self._blank_mel)
        self._text = Side("text", self._run_text, self._blank_ids)
        # With audio_readout=lm clips pass through the language model: both sides would add to the same gradients.
        self._sides_are_apart = model.multi_modal_projector is None
        self._capture_s, self._num_captures, self._has_told = 0.0, 0, False
        self._num_tokens = self._num_dummies = 0

    def start(self) -> None:
        """From now on capture. Before, passes are eager, so that hooks on parameters see their gradients."""
        self._is_started = True

    @property
    def num_captures(self) -> int:
        """Captures so far: a forward and a backward graph each."""
        return self._num_captures

    @property
    def capture_s(self) -> float:
        """Seconds that captures have taken."""
        return self._capture_s

    @property
    def waste(self) -> float:
        """Dummy tokens so far, as a share of own ones."""
        return self._num_dummies / max(1, self._num_tokens)

    def encode(self, audio: AudioPack | None, text: TextPack | None) -> tuple[Tensor | None, Tensor | None]:
        """Embeddings of both packs, as DualEncoder gives them one by one.

        What is new among their classes is captured before either runs: should memory not do, no graph is in use whose
        memory the eager passes would miss. Then texts, since they are ready: while the device is busy with them, the
        host makes the clips' tables and launches their log-mel. Replays go beside each other.
        """
        clips = None if audio is None else self._audio_pass(audio)
        strings = None if text is None else self._text_pass(text)
        for one in (clips, strings):
            if one is not None and self._captures and self._is_started and torch.is_grad_enabled():
                self._capture(one)
        if clips is None or strings is None or not self._can_go_beside(clips, strings):
            text_NE = None if strings is None else self._encode(strings)
            return None if clips is None else self._encode(clips), text_NE
        stream, beside = torch.cuda.current_stream(self._model.device), self._audio.stream
        assert beside is not None
        ready = stream.record_event()
        text_NE = self._encode(strings)
        with torch.cuda.stream(beside):
            beside.wait_event(ready)
            audio_BE = self._encode(clips, waiting=stream)
        stream.wait_stream(beside)
        audio_BE.record_stream(stream)
        return audio_BE, text_NE

    def _can_go_beside(self, *passes: _Pass) -> bool:
        """Whether all are replays, which share nothing that they write."""
        return self._sides_are_apart and all(one.side.ready(one.size) is not None for one in passes)

    def _audio_pass(self, pack: AudioPack) -> _Pass:
        model, config = self._model, self._model.audio_tower.config
        num_tokens = [tokens_of(count) for count in frames_of(pack.num_samples, config.max_frames)]
        size = SizeClass.of(num_tokens, SHORTEST_AUDIO, config.max_positions, config.pool)

        def tables() -> Tables:
            return AudioLayout.tables(pack.num_samples, config.pool, config.max_frames, size).to(model.device)

        @torch.no_grad()
        def mel(tables: Tables) -> Tensor:
            layout = self._audio_layout(size, tables, num_tokens)
            return model.mel(pack.to(model.device, non_blocking=True), layout)

        return _Pass(self._audio, size, num_tokens, tables, mel)

    def _text_pass(self, pack: TextPack) -> _Pass:
        model, limit = self._model, self._model.language_model.config.max_positions
        if pack.lengths and max(pack.lengths) > limit:
            raise ValueError(f"lengths: the longest is {max(pack.lengths)} tokens, the text tower takes {limit}")
        size = SizeClass.of(pack.lengths, SHORTEST_TEXT, limit)

        def tables() -> Tables:
            return SequenceLayout.tables(pack.lengths, size).to(model.device)

        def ids(_: Tables) -> Tensor:
            ids_P = pack.to(model.device, non_blocking=True).ids_P
            return nn.functional.pad(ids_P, (0, size.num_tokens - len(ids_P)))

        return _Pass(self._text, size, pack.lengths, tables, ids)

    def _blank_mel(self, size: SizeClass) -> Tensor:
        model = self._model
        return torch.zeros(size.num_slots, model.audio_tower.config.num_mels, device=model.device)

    def _blank_ids(self, size: SizeClass) -> Tensor:
        return torch.zeros(size.num_tokens, dtype=torch.int64, device=self._model.device)

    def _audio_layout(self, size: SizeClass, tables: Tables, lengths: Sequence[int]) -> AudioLayout:
        config = self._model.audio_tower.config
        return AudioLayout.of(tables, [], lengths, config.pool, config.max_frames, size)

    def _run_audio(self, size: SizeClass, tables: Tables, mel_TM: Tensor, lengths: Sequence[int]) -> Tensor:
        return self._model.embed_mel(mel_TM, self._audio_layout(size, tables, lengths))

    def _run_text(self, size: SizeClass, tables: Tables, ids_P: Tensor, lengths: Sequence[int]) -> Tensor:
        filled = size.filled(lengths)
        return self._model.embed_ids(TextPack(ids_P, filled), SequenceLayout.of(tables, filled, size))

    def _encode(self, one: _Pass, waiting: "torch.cuda.Stream | None" = None) -> Tensor:
        """waiting: see `Replay`."""
        side, size, lengths = one.side, one.size, one.lengths
        tables = one.tables()
        payload = one.payload(tables)
        self._num_tokens += sum(lengths)
        self._num_dummies += size.num_tokens - sum(lengths)
        capture = side.ready(size)
        if capture is None:
            return side.run(size, tables, payload, lengths)[: len(lengths)]
        if not torch.is_grad_enabled():  # the first of two passes: what it leaves in the memory pool is for nobody
            return capture.replay_forward(tables.flat, payload, len(lengths))
        return Replay.apply(self._anchor, capture, tables.flat, payload, len(lengths), waiting)

    def _capture(self, one: _Pass) -> None:
        """Unless it is known, or the side's memory is in use."""
        side, size = one.side, one.size
        if size in side.captures or side.is_busy():
            return
        if len(self._audio.captures) + len(self._text.captures) >= self._most:
            if not self._has_told:
                logger.warning("%d size classes are CUDA graphs; further ones run eagerly", self._most)
                self._has_told = True
            return
        began, device = time.perf_counter(), self._model.device
        side.make_room(size, device)
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_reserved(device)
        if side.pool is None:
            side.pool = new_pool()
        if side.stream is None:
            side.stream, side.generator = torch.cuda.Stream(device), torch.Generator(device)
        failure = None
        try:
            side.captures[size] = Capture(side, size, one.tables(), self._params)
        except torch.OutOfMemoryError as error:
            failure = f"{type(error).__name__}: {error}"
        except RuntimeError as error:  # something that cannot be recorded
            outlive_broken_capture()
            failure = f"{type(error).__name__}: {error}"
        if failure is not None:  # here, where no exception holds the frames and their tensors any more
            self.give_up(failure)
            return
        torch.cuda.empty_cache()
        side.num_bytes += max(0, torch.cuda.memory_reserved(device) - before)
        self._num_captures += 1
        seconds = time.perf_counter() - began
        self._capture_s += seconds
        logger.debug("captured %s %s in %.2f s: %d so far", side.name, size, seconds, self.num_captures)

    def give_up(self, reason: str) -> None:
        """Train eagerly from now on: slower, and the same numbers. Rank by rank: nothing in a graph is a collective."""
        logger.warning("CUDA graphs are off from here on, small batches are slower: %s", reason.splitlines()[0][:300])
        self._captures = False
        for side in (self._audio, self._text):
            if not side.is_busy():  # else its graphs are needed once more, and then let go with their history
                side.pool, side.num_bytes = None, 0
            side.captures.clear()
        gc.collect()  # when memory runs short, the allocator gives back what it has kept for the captures
