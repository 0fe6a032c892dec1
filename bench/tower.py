"""The audio tower and the log-mel alone: ours on packed clips beside transformers', which pads each clip to 30 s.

    python bench/tower.py [--tiny] [--json FILE]

Both towers hold the same random weights at the published shapes and must agree before they are timed. Frozen but for
one bias of the first layer's, so that the backward pass runs through the whole tower and no more. transformers' tower
takes its clips in groups of 16, which fill the device. The feature extractor is timed as users call it, on the CPU, and
with its own `device` option.

Shapes: B clips, L tokens, T mel frame slots, D hidden, M mels.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import WhisperFeatureExtractor
from transformers.models.qwen2_audio.configuration_qwen2_audio import Qwen2AudioEncoderConfig
from transformers.models.qwen2_audio.modeling_qwen2_audio import Qwen2AudioEncoder

from bench.drawn import SAMPLE_RATE
from bench.findings import Cell, Findings, run_alone
from bench.limits import Limits, bench_device, seconds_of
from bench.ours import Shapes
from model.audio_tower import AudioConfig, AudioTower
from model.init import init_parameters
from model.logmel import LogMel

SECONDS = (1, 2, 4, 30)
NUM_CLIPS, GROUP, LONG_CLIPS = 64, 16, 16  # as many clips of 30 s as transformers takes at once
TRAINED = "layers.0.self_attn.q_proj.bias"
LEAST_COSINE = 0.999


def our_tower(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> AudioTower:
    config = AudioConfig.from_hf(shapes.audio)
    with torch.device("meta"):
        tower = AudioTower(config)
    init_parameters(tower, config.num_layers, device, dtype)
    tower.requires_grad_(False).get_parameter(TRAINED).requires_grad_()
    return tower.train()


def their_tower(ours: AudioTower, shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Qwen2AudioEncoder:
    config: Any = Qwen2AudioEncoderConfig(**{k: v for k, v in shapes.audio.items() if k != "model_type"})
    config._attn_implementation = "sdpa"
    with torch.device("meta"):
        tower: Any = Qwen2AudioEncoder(config)
    tower = tower.to_empty(device=device).to(dtype)
    tower.load_state_dict(ours.state_dict())
    tower.requires_grad_(False).get_parameter(TRAINED).requires_grad_()
    return tower.train()


class Clips:
    """`count` clips of one length: noise, its mel as each side wants it."""

    def __init__(self, seconds: float, count: int, tower: AudioTower, device: torch.device, dtype: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(int(seconds))
        num_samples = int(seconds * SAMPLE_RATE)
        self.waves_BS = 0.1 * torch.randn(count, num_samples, generator=generator)
        self.layout = tower.layout([num_samples] * count, device)
        log_mel = LogMel(tower.config.num_mels)
        self.mel_TM = log_mel(self.waves_BS.flatten().to(device), self.layout).to(dtype)
        extractor: Any = WhisperFeatureExtractor(feature_size=tower.config.num_mels)
        group = min(count, GROUP)
        features = extractor(list(self.waves_BS[:group].numpy()), sampling_rate=SAMPLE_RATE, return_tensors="pt")
        self.mel_BMT = features["input_features"].to(device, dtype)
        self.num_groups = count // group
        self.num_tokens = (num_samples // 160 - 1) // 2 + 1


def check_parity(ours: AudioTower, theirs: nn.Module, clips: Clips) -> float:
    """Least cosine between the two sides' means over a clip. Raises RuntimeError where it is too low."""
    mel_BMT, num_positions = clips.mel_BMT, ours.config.max_positions
    with torch.no_grad():
        ours_BD = clips.layout.pooled.mean(ours(clips.mel_TM, clips.layout))[: len(mel_BMT)]
        is_padding_L = torch.arange(num_positions, device=mel_BMT.device) >= clips.num_tokens
        keys_B1LL = torch.zeros(len(mel_BMT), 1, num_positions, num_positions, device=mel_BMT.device)
        keys_B1LL = keys_B1LL.masked_fill(is_padding_L, float("-inf")).to(mel_BMT.dtype)
        theirs_BLD = theirs(mel_BMT, attention_mask=keys_B1LL).last_hidden_state
        theirs_BD = theirs_BLD[:, : clips.num_tokens // 2].float().mean(1)
    centre_D = theirs_BD.mean(0) * 0.5  # half of what all have in common: it must not hide a difference
    cosine = float(F.cosine_similarity(ours_BD.float() - centre_D, theirs_BD - centre_D, dim=1).min())
    if not cosine >= LEAST_COSINE:
        raise RuntimeError(f"towers: cosine {cosine:.5f}, at least {LEAST_COSINE}: they do not compute the same")
    return cosine


def passes(forward: Callable[[], Tensor], param: nn.Parameter) -> tuple[Callable[[], None], Callable[[], None]]:
    """Forward alone, and forward with backward."""

    def alone() -> None:
        with torch.no_grad():
            forward()

    def both() -> None:
        param.grad = None
        forward().float().sum().backward()

    return alone, both


def _last_hidden(tower: nn.Module, mel_BMT: Tensor) -> Tensor:
    return tower(mel_BMT).last_hidden_state


def measure(limits: Limits, tiny: bool = False) -> Findings:
    """The audio tower and the log-mel beside transformers'."""
    device = bench_device()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    torch.manual_seed(0)
    shapes = Shapes.of(tiny)
    ours = our_tower(shapes, device, dtype)
    theirs = their_tower(ours, shapes, device, dtype)
    found = Findings(f"audio tower ({shapes.audio['encoder_layers']} layers), {NUM_CLIPS} clips")
    counts = dict.fromkeys(SECONDS[:2], 2) if tiny else {s: LONG_CLIPS if s == 30 else NUM_CLIPS for s in SECONDS}
    num_calls = 2 if tiny else 20
    group_s: dict[str, float] = {}
    cosines, ratio_at_2 = [], None
    for seconds, count in counts.items():
        clips = Clips(seconds, count, ours, device, dtype)
        cosines.append(check_parity(ours, theirs, clips))
        our_passes = passes(partial(ours, clips.mel_TM, clips.layout), ours.get_parameter(TRAINED))
        their_passes = passes(partial(_last_hidden, theirs, clips.mel_BMT), theirs.get_parameter(TRAINED))
        row: dict[str, Cell] = {"clips": f"{count} of {seconds} s"}
        for i, name in enumerate(("forward", "both")):
            our_pass, their_pass, factor = our_passes[i], their_passes[i], i + 1
            our_s = seconds_of(our_pass, device, num_calls)
            # A group is as much work whatever its clips' length, since all are padded to 30 s: timed once.
            if name not in group_s:
                group_s[name] = seconds_of(their_pass, device, num_calls, 1)
            their_s = group_s[name] * clips.num_groups
            flops = 2 * factor * shapes.audio_parameters() * clips.num_tokens * count
            row |= {
                f"{name} ms": our_s * 1e3, f"transformers {name} ms": their_s * 1e3, f"x {name}": their_s / our_s,
                f"{name} of the matrix rate": f"{flops / our_s / limits.matrix_flops:.0%}",
            }  # fmt: skip
            if seconds == 2 and name == "both":
                ratio_at_2 = their_s / our_s
        found.rows.append(row)
        del clips
    found.check("forward and backward, times transformers at 2 s", ratio_at_2, 12)
    found.notes.append(f"least cosine between the two towers' clips: {min(cosines):.5f}")
    log_mel_findings(found, ours, device, num_calls, 2 if tiny else NUM_CLIPS)
    return found


def log_mel_findings(found: Findings, tower: AudioTower, device: torch.device, num_calls: int, count: int) -> None:
    """Our log-mel beside the feature extractor, clips of 1.6 s, from samples on the host to features on the device."""
    num_samples = int(1.6 * SAMPLE_RATE)
    pcm_BS = (3277 * torch.randn(count, num_samples, generator=torch.Generator().manual_seed(9))).to(torch.int16)
    layout, log_mel = tower.layout([num_samples] * count, device), LogMel(tower.config.num_mels)
    pcm_S = pcm_BS.flatten().pin_memory() if device.type == "cuda" else pcm_BS.flatten()
    extractor: Any = WhisperFeatureExtractor(feature_size=tower.config.num_mels)
    waves = list((pcm_BS.float() / 32768).numpy())

    def theirs(**options: Any) -> Tensor:
        features = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt", **options)["input_features"]
        return features.to(device)

    our_mel_TM = log_mel(pcm_S.to(device), layout)
    difference = float((theirs()[0, :, :40].T - our_mel_TM[:40]).abs().max())
    if difference > 1e-3:
        raise RuntimeError(f"log-mel: differs by {difference:.4f} from the feature extractor's")
    our_s = seconds_of(lambda: log_mel(pcm_S.to(device, non_blocking=True), layout), device, num_calls)
    started = time.perf_counter()
    theirs()
    their_s = time.perf_counter() - started
    on_device_s = seconds_of(lambda: theirs(device=str(device)), device, 2, 1)
    found.check("log-mel, times the feature extractor", their_s / our_s, 20)
    found.notes.append(
        f"log-mel of {count} clips of 1.6 s: {our_s * 1e3:.3f} ms; feature extractor {their_s * 1e3:.1f} ms, with its "
        f"device option {on_device_s * 1e3:.1f} ms ({on_device_s / our_s:.1f} times ours); differs by {difference:.1e}"
    )


if __name__ == "__main__":
    sys.exit(run_alone(measure))
