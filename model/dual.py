"""The two encoders behind one embedding space: clip -> unit vector (or one a window), string -> unit vector.

Shapes: B clips, N strings, T mel frame slots, P packed tokens, Q packed tokens after pooling, D hidden, E embedding,
M mels, W windows of all clips.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Literal, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model.audio_tower import AudioConfig, AudioTower
from model.logmel import LogMel
from model.maxsim import WindowedClips, WindowShape, WindowTable
from model.packing import AudioLayout, AudioPack, SequenceLayout, TextPack
from model.text_tower import TextConfig, TextTower

if TYPE_CHECKING:
    from model.graphs import TowerGraphs


class CastLinear(nn.Linear):
    """nn.Linear that computes in its input's dtype: trainable in fp32 behind a half-precision tower."""

    def forward(self, input: Tensor) -> Tensor:
        return F.linear(input, self.weight.to(input.dtype), None if self.bias is None else self.bias.to(input.dtype))


class MultiModalProjector(nn.Module):
    """From the audio tower's width to the language model's, as in Qwen2-Audio."""

    def __init__(self, audio_width: int, text_width: int) -> None:
        super().__init__()
        self.linear = CastLinear(audio_width, text_width)

    def forward(self, x_QD: Tensor) -> Tensor:
        return self.linear(x_QD)


@dataclass(frozen=True, eq=False)
class AudioWindows:
    """What the maxsim read-out makes of clips."""

    audio_BE: Tensor
    """The mean over each clip's frames, unit rows: what a clip is beside a whole text."""
    clips: WindowedClips
    """The windows, unit rows: what a clip is beside a term."""
    table: WindowTable


class DualEncoder(nn.Module):
    """Both towers, a mean over each one's tokens, and a linear head each.

    With `windows` the clips of `encode_windows` are many windows of frames (the maxsim read-out).
    With `audio_readout="lm"` the audio tower's frames also pass through the projector and the language model.
    `compute_dtype` bf16 or fp16 over fp32 weights opens torch.autocast here, so callers need none.
    """

    def __init__(
        self,
        audio_config: AudioConfig,
        text_config: TextConfig,
        proj_dim: int = 512,
        audio_readout: Literal["tower", "lm"] = "tower",
        attention: str = "auto",
        checkpointing: bool = False,
        dropout: float = 0.0,
        compute_dtype: torch.dtype = torch.float32,
        augment_mel: Callable[[Tensor, AudioLayout], Tensor] | None = None,
        windows: WindowShape | None = None,
        kernels: str = "auto",
    ) -> None:
        super().__init__()
        self.kernels = kernels
        self.windows = windows
        self.graphs: TowerGraphs | None = None
        """Runs the training passes of `encode_audio` and `encode_text`, where they are CUDA graphs."""
        self.compute_dtype = compute_dtype
        self.augment_mel = augment_mel
        self.log_mel = LogMel(audio_config.num_mels)
        self.audio_tower = AudioTower(audio_config, attention, checkpointing, dropout, kernels)
        self.language_model = TextTower(text_config, attention, checkpointing, dropout, kernels)
        self.multi_modal_projector: MultiModalProjector | None = None
        audio_width = audio_config.d_model
        if audio_readout == "lm":
            self.multi_modal_projector = MultiModalProjector(audio_config.d_model, text_config.hidden_size)
            audio_width = text_config.hidden_size
        self.audio_head = nn.Linear(audio_width, proj_dim)
        self.text_head = nn.Linear(text_config.hidden_size, proj_dim)

    @property
    def device(self) -> torch.device:
        return self.audio_head.weight.device

    def remove_text_side(self) -> None:
        """Give up the language model and its head, for a model that only hears: `encode_text` then raises."""
        if self.multi_modal_projector is not None:
            raise ValueError("audio_readout: 'lm' sends audio through the language model, so it cannot be left out")
        del self.language_model, self.text_head

    def encode_audio(self, pack: AudioPack, layout: AudioLayout | None = None) -> Tensor:
        """Return audio_BE, fp32 (fp64 for an fp64 model), L2-normed. ValueError for an empty or too long clip.

        `layout` may be given where the caller has it: then nothing here works on the host.
        """
        if self.graphs is not None and layout is None and self.training:
            return cast(Tensor, self.graphs.encode(pack, None)[0])
        x_QD, pooled = self._audio_frames(pack, layout)
        return self._embed(x_QD, pooled, self.audio_head)

    def embed_mel(self, mel_TM: Tensor, layout: AudioLayout) -> Tensor:
        """The part of `encode_audio` from mel slots on. Of dummies the rows mean nothing, but are finite."""
        return self._embed(self._frames(mel_TM, layout), layout.pooled, self.audio_head)

    def encode_windows(self, pack: AudioPack) -> AudioWindows:
        """Clips as windows, for a model with the maxsim read-out; dtypes and errors as in `encode_audio`."""
        assert self.windows is not None, "a model with readout='mean' has no windows"
        x_QD, layout = self._audio_frames(pack)
        table = WindowTable.build(layout.lengths, self.windows)
        starts = list(accumulate(layout.lengths, initial=0))
        with torch.autocast(x_QD.device.type, enabled=False):
            # The head is linear, so the mean of its outputs is its output for the mean, and there are fewer frames.
            y_QE = self.audio_head(x_QD.to(self.audio_head.weight.dtype))
            window_WE = F.normalize(table.mean(y_QE, starts), dim=-1)
            audio_BE = F.normalize(layout.mean(y_QE, self.kernels), dim=-1)
        return AudioWindows(audio_BE, WindowedClips(window_WE, table.counts), table)

    def _audio_frames(self, pack: AudioPack, layout: AudioLayout | None = None) -> tuple[Tensor, SequenceLayout]:
        pack = pack.to(self.device, non_blocking=True)
        layout = layout or self.audio_tower.layout(pack.num_samples, self.device)
        return self._frames(self.mel(pack, layout), layout), layout.pooled

    def _frames(self, mel_TM: Tensor, layout: AudioLayout) -> Tensor:
        """x_QD: what a clip's embedding is the mean of."""
        with self._autocast():
            x_QD = self.audio_tower(mel_TM, layout)
            if self.multi_modal_projector is not None:
                x_QD = self.multi_modal_projector(x_QD)
                x_QD = self.language_model.forward_embeds(x_QD, layout.pooled.lengths, layout.pooled)
        return x_QD

    def encode_text(self, pack: TextPack) -> Tensor:
        """Return text_NE, fp32 (fp64 for an fp64 model), L2-normed. ValueError for an empty or too long string."""
        if "language_model" not in self._modules:
            raise ValueError("encode_text: this model was opened audio-only; open it whole to encode terms")
        if self.graphs is not None and self.training:
            return cast(Tensor, self.graphs.encode(None, pack)[1])
        pack = pack.to(self.device, non_blocking=True)
        return self.embed_ids(pack, SequenceLayout.build(pack.lengths, self.device))

    def encode_both(self, audio: AudioPack | None, text: TextPack | None) -> tuple[Tensor | None, Tensor | None]:
        """`encode_audio` and `encode_text` of what is there."""
        if self.graphs is not None and self.training:
            return self.graphs.encode(audio, text)
        return None if audio is None else self.encode_audio(audio), None if text is None else self.encode_text(text)

    def embed_ids(self, pack: TextPack, layout: SequenceLayout) -> Tensor:
        """`encode_text` where pack and layout are on the device. Of dummies the rows mean nothing, but are finite."""
        with self._autocast():
            x_PD = self.language_model(pack, layout)
        return self._embed(x_PD, layout, self.text_head)

    def mel(self, pack: AudioPack, layout: AudioLayout) -> Tensor:
        """mel_TM of a pack on the device, augmented in training. No gradient."""
        is_fp64 = self.audio_head.weight.dtype == torch.float64
        mel_TM = self.log_mel(pack.pcm_S, layout, torch.float64 if is_fp64 else torch.float32)
        if self.training and self.augment_mel is not None:
            mel_TM = self.augment_mel(mel_TM, layout)
        return mel_TM

    def _embed(self, x_PD: Tensor, layout: SequenceLayout, head: nn.Linear) -> Tensor:
        with torch.autocast(x_PD.device.type, enabled=False):
            mean_BD = layout.mean(x_PD, self.kernels)
            return F.normalize(head(mean_BD.to(head.weight.dtype)), dim=-1)

    def _autocast(self) -> AbstractContextManager[object]:
        weight = self.audio_tower.layer_norm.weight  # both towers are stored alike
        if self.compute_dtype in (torch.bfloat16, torch.float16) and weight.dtype == torch.float32:
            return torch.autocast(weight.device.type, dtype=self.compute_dtype)
        return nullcontext()
