"""From the loader's shared memory to the device: pinned pages, and copies on a stream of their own.

The copy of a batch is begun while the step before it computes, if the loader has that batch ready by then; the training
process itself neither copies nor waits. On the CPU a batch is used where it lies.
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.batches import Batch
from data.loader import Loader
from model.packing import AudioPack, TextPack

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class FedPart:
    """Some of a batch's clips and strings."""

    audio: AudioPack | None  # None: no clip
    text: TextPack | None  # None: no string


@dataclass(frozen=True)
class FedBatch:
    """A batch and its two packs. On a GPU the packs are copies there, and `batch` keeps the pinned memory in place."""

    batch: Batch
    audio: AudioPack | None  # None: no clip
    text: TextPack | None  # None: no string

    @classmethod
    def of(cls, batch: "Batch | FedBatch") -> "FedBatch":
        """What was fed already as it is; else the packs over the batch's own memory."""
        if isinstance(batch, FedBatch):
            return batch
        audio = AudioPack(torch.from_numpy(batch.pcm_S), list(batch.num_samples)) if batch.num_samples else None
        text = TextPack(torch.from_numpy(batch.token_ids_P), list(batch.token_lengths)) if batch.token_lengths else None
        return cls(batch, audio, text)

    def part(self, clips: tuple[int, int], strings: tuple[int, int]) -> FedPart:
        """The clips and strings with numbers from start up to stop: views of the packs."""
        audio = text = None
        if self.audio is not None and clips[0] < clips[1]:
            before, own = sum(self.audio.num_samples[: clips[0]]), self.audio.num_samples[slice(*clips)]
            audio = AudioPack(self.audio.pcm_S[before : before + sum(own)], own)
        if self.text is not None and strings[0] < strings[1]:
            before, own = sum(self.text.lengths[: strings[0]]), self.text.lengths[slice(*strings)]
            text = TextPack(self.text.ids_P[before : before + sum(own)], own)
        return FedPart(audio, text)


def feed(loader: Loader, epoch: int, start_step: int, device: torch.device) -> Iterator[FedBatch]:
    """The loader's batches, on the device. Raises what `Loader.epoch` raises."""
    batches = loader.epoch(epoch, start_step)
    if device.type != "cuda":
        yield from map(FedBatch.of, batches)
        return
    copies = torch.cuda.Stream(device)
    ahead: tuple[FedBatch, torch.cuda.Event] | None = None
    while True:
        if ahead is None:
            batch = next(batches, None)
            if batch is None:
                return
            ahead = _begin_copy(batch, copies, device)
        (current, copied), ahead = ahead, None
        if loader.has_next():
            batch = next(batches, None)
            ahead = None if batch is None else _begin_copy(batch, copies, device)
        torch.cuda.current_stream(device).wait_event(copied)
        yield current
        copied.synchronize()  # long done; a slot whose copy was under way must not be filled again
        del current


def _begin_copy(batch: Batch, copies: torch.cuda.Stream, device: torch.device) -> tuple[FedBatch, torch.cuda.Event]:
    host = FedBatch.of(batch)
    with torch.cuda.stream(copies):
        audio = host.audio and host.audio.to(device, non_blocking=True)
        text = host.text and host.text.to(device, non_blocking=True)
        copied = torch.cuda.Event()
        copied.record(copies)
    for tensor in (audio and audio.pcm_S, text and text.ids_P):
        if isinstance(tensor, Tensor):  # its memory may not be given away before the step is done with it
            tensor.record_stream(torch.cuda.current_stream(device))
    return FedBatch(batch, audio, text), copied


def pinning(device: torch.device) -> Callable[[np.ndarray], Callable[[], None]] | None:
    """What a `Loader` pins its memory with, so that copies to the device overlap; None where there is no GPU."""
    return _pin if device.type == "cuda" else None


def _pin(memory_U8: np.ndarray) -> Callable[[], None]:
    """Lock these pages for the device. Returns what unlocks them."""
    runtime = torch.cuda.cudart()
    address = memory_U8.ctypes.data
    code = int(runtime.cudaHostRegister(address, memory_U8.nbytes, 0))
    if code != 0:
        logger.warning(
            "%d bytes of the loader's memory could not be pinned (CUDA error %d): copies to the device wait for the "
            "CPU; see `ulimit -l`",
            memory_U8.nbytes, code,
        )  # fmt: skip
        return lambda: None
    return lambda: _unpin(address)


def _unpin(address: int) -> None:
    code = int(torch.cuda.cudart().cudaHostUnregister(address))
    if code != 0:
        logger.warning("the loader's memory could not be unpinned (CUDA error %d)", code)
