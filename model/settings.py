"""What the user may choose about the model."""

from dataclasses import dataclass
from typing import Literal

AudioReadout = Literal["tower", "lm"]
Readout = Literal["mean", "maxsim"]
Trainable = Literal["lora", "full"]
BaseDtype = Literal["auto", "bf16", "fp32", "fp8"]
AttentionName = Literal["auto", "tile", "flash", "varlen", "sdpa"]
KernelsName = Literal["auto", "triton", "torch"]
GraphsName = Literal["auto", "on", "off"]


@dataclass
class ModelSettings:
    """Which towers, where their weights come from, and how they are run."""

    model_name: str = "Qwen/Qwen2-Audio-7B-Instruct"
    """Checkpoint that gives both towers: a folder or a Hugging Face hub name."""
    audio_model: str | None = None
    """Replaces the audio tower: a Qwen2-Audio or Whisper checkpoint (folder or hub name), or an architecture .json for random weights."""  # noqa: E501
    text_model: str | None = None
    """Replaces the text tower: a Qwen2-Audio or Qwen2/2.5 checkpoint (folder or hub name), or an architecture .json for random weights."""  # noqa: E501
    audio_readout: AudioReadout = "tower"
    """tower: mean over the audio tower's frames; lm: these frames first pass through the language model."""
    readout: Readout = "mean"
    """mean: a clip is the mean of its frames; maxsim: it is many windows of frames, and the best one scores a term."""
    maxsim_windows: tuple[int, ...] = (2, 4, 8, 12, 16, 24)
    """maxsim: sizes of the windows in tower frames (40 ms each in Qwen2-Audio, 20 ms in Whisper)."""
    maxsim_stride: int = 2
    """maxsim: frames from one window to the next of the same size."""
    proj_dim: int = 512
    """Size of the shared embedding space."""
    trainable: Trainable = "lora"
    """lora: towers frozen, adapters and heads train; full: everything trains, on fp32 masters."""
    base_dtype: BaseDtype = "auto"
    """Storage type of frozen towers; auto: bf16 on CUDA, fp32 on the CPU. fp8: their products in e4m3, faster and less exact, on chips that have it. `full` always keeps fp32."""  # noqa: E501
    attention: AttentionName = "auto"
    """Attention kernel; auto takes our tiles for packs of short sequences, else flash_attn, else torch's varlen, else scaled_dot_product_attention."""  # noqa: E501
    kernels: KernelsName = "auto"
    """Memory-bound steps of the towers as Triton kernels, which keep less for the backward pass; auto takes them on CUDA. torch: plain operations."""  # noqa: E501
    cuda_graphs: GraphsName = "auto"
    """Towers train as CUDA graphs, one for each size of batch: no waiting for launches. auto: where they can be."""
    checkpointing: bool | Literal["auto"] = False
    """Recompute each layer in the backward pass: less memory, about half as much time again. auto: as few layers as memory_cap_gib asks for."""  # noqa: E501
    memory_cap_gib: float = 0.0
    """Device memory that `auto` (checkpointing, clips_per_pass) plans with, the model included; 0: all that is free."""
    tower_dropout: float = 0.0
    """Dropout on the residual branches of both towers, for small towers trained from nothing."""
    spec_time_masks: int = 0
    """SpecAugment: time masks a clip in training; 0 turns them off."""
    spec_time_width_frames: int = 20
    """SpecAugment: widest time mask, in 10 ms frames (never more than a quarter of the clip)."""
    spec_freq_masks: int = 0
    """SpecAugment: frequency masks a clip in training; 0 turns them off."""
    spec_freq_width_bins: int = 15
    """SpecAugment: widest frequency mask, in mel bins."""

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        choices = {
            "audio_readout": ("tower", "lm"),
            "readout": ("mean", "maxsim"),
            "trainable": ("lora", "full"),
            "base_dtype": ("auto", "bf16", "fp32", "fp8"),
            "attention": ("auto", "tile", "flash", "varlen", "sdpa"),
            "kernels": ("auto", "triton", "torch"),
            "cuda_graphs": ("auto", "on", "off"),
        }
        for field, allowed in choices.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}: got {getattr(self, field)!r}, allowed are {', '.join(allowed)}")
        sizes = self.maxsim_windows
        if not sizes or min(sizes) < 1 or len(set(sizes)) < len(sizes):
            raise ValueError(f"maxsim_windows: got {sizes}, allowed are one or more different sizes of 1 frame or more")
        if not 1 <= self.maxsim_stride <= max(sizes):
            raise ValueError(
                f"maxsim_stride: got {self.maxsim_stride}, allowed are 1 to {max(sizes)}, the largest window; "
                "a longer stride would leave frames out"
            )
        if self.checkpointing not in (True, False, "auto"):
            raise ValueError(f"checkpointing: got {self.checkpointing!r}, allowed are True, False, auto")
        if not 0.0 <= self.memory_cap_gib < float("inf"):
            raise ValueError(f"memory_cap_gib: got {self.memory_cap_gib}, must be 0 (no cap) or more")
        if self.proj_dim < 1:
            raise ValueError(f"proj_dim: got {self.proj_dim}, must be at least 1")
        if not 0.0 <= self.tower_dropout < 1.0:
            raise ValueError(f"tower_dropout: got {self.tower_dropout}, must be in [0, 1)")
        for field in ("spec_time_masks", "spec_time_width_frames", "spec_freq_masks", "spec_freq_width_bins"):
            if getattr(self, field) < 0:
                raise ValueError(f"{field}: got {getattr(self, field)}, must be 0 or more")
        if self.trainable == "full" and self.base_dtype in ("bf16", "fp8"):
            raise ValueError(
                f"base_dtype: got {self.base_dtype!r} with trainable='full', which keeps fp32 masters; use auto or fp32"
            )
