"""Clips of one known length, as the windows of a stream are, encoded with no work on the host that can be done once.

The index tables of a batch depend on its lengths alone, so they are kept. On a GPU, a single window is moreover one
CUDA graph: a tower runs hundreds of small kernels for two seconds of audio, and launching them one by one takes longer
than they do.

Shapes: S samples, B clips, E embedding.
"""

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.dual import DualEncoder
from model.packing import AudioLayout, AudioPack
from retrieval.pcm import pack_waves

logger = logging.getLogger(__name__)

MAX_LAYOUTS = 16
WARM_UP_RUNS = 3


class EqualClips:
    """Encodes batches of clips of the lengths that were prepared."""

    def __init__(self, model: DualEncoder) -> None:
        self.model = model
        self._layouts: OrderedDict[tuple[int, int], AudioLayout] = OrderedDict()
        self._alone: dict[int, Callable[[NDArray[np.int16]], Tensor] | None] = {}

    def prepare(self, num_samples: int) -> None:
        """Expect clips of this length. On a GPU this records a graph once, in about a second."""
        if num_samples in self._alone:
            return
        self._alone[num_samples] = None
        if self.model.device.type == "cuda":
            try:
                self._alone[num_samples] = _record(self.model, num_samples)
            except RuntimeError as error:
                logger.warning("no CUDA graph for windows of %d samples, they run eagerly: %s", num_samples, error)

    def knows(self, waves: Sequence[NDArray[np.int16]]) -> bool:
        """Whether these clips all have the same, prepared length."""
        return len(waves[0]) in self._alone and len({len(wave_S) for wave_S in waves}) == 1

    @torch.no_grad()
    def encode(self, waves: Sequence[NDArray[np.int16]]) -> Tensor:
        """audio_BE of int16 [S] clips that `knows` accepts, on the model's device."""
        num_samples = len(waves[0])
        replay = self._alone[num_samples]
        if len(waves) == 1 and replay is not None:
            return replay(waves[0])
        pack = AudioPack(pack_waves(list(waves)), [num_samples] * len(waves))
        if self.model.device.type == "cuda":
            pack = pack.pin_memory()
        return self.model.encode_audio(pack, self._layout(len(waves), num_samples))

    def _layout(self, num_clips: int, num_samples: int) -> AudioLayout:
        key = (num_clips, num_samples)
        if key not in self._layouts:
            self._layouts[key] = self.model.audio_tower.layout([num_samples] * num_clips, self.model.device)
            if len(self._layouts) > MAX_LAYOUTS:
                self._layouts.popitem(last=False)
        self._layouts.move_to_end(key)
        return self._layouts[key]


@torch.no_grad()
def _record(model: DualEncoder, num_samples: int) -> Callable[[NDArray[np.int16]], Tensor]:
    """One clip's whole way from samples to embedding as a graph, behind a function. RuntimeError where that fails."""
    # A little noise: a warm-up on zeros would be as good, but silence is no input that anyone should see here.
    fixed_S = torch.randint(-99, 99, (num_samples,), dtype=torch.int16, device=model.device)
    layout = model.audio_tower.layout([num_samples], model.device)
    pack = AudioPack(fixed_S, [num_samples])
    side = torch.cuda.Stream(model.device)
    side.wait_stream(torch.cuda.current_stream(model.device))
    with torch.cuda.stream(side):
        for _ in range(WARM_UP_RUNS):
            model.encode_audio(pack, layout)
    torch.cuda.current_stream(model.device).wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fixed_BE = model.encode_audio(pack, layout)
    pinned_S = torch.empty(num_samples, dtype=torch.int16, pin_memory=True)
    has_left = torch.cuda.Event()
    # A graph knows its inputs by address alone: without these references their memory would go to others.
    recorded = (graph, layout, pack)

    def replay(wave_S: NDArray[np.int16]) -> Tensor:
        has_left.synchronize()  # the samples before these
        pinned_S.copy_(torch.from_numpy(wave_S))
        fixed_S.copy_(pinned_S, non_blocking=True)
        has_left.record()
        recorded[0].replay()
        return fixed_BE.clone()

    return replay
