"""The same clips and strings through our towers and through transformers, and how well the pooled features agree.

Both load the same checkpoint, one after the other on the same device, in the dtype that training uses there (bf16 on
CUDA). Ours: waveforms -> our log-mel -> packed towers. Theirs: WhisperFeatureExtractor to 30 s -> the published forward
pass of Qwen2AudioForConditionalGeneration with `feature_attention_mask`, sdpa. Three features a checkpoint:

    tower  mean over the audio tower's frames
    lm     the same frames through projector and language model, mean over its last hidden states
    text   mean over a string's tokens of the language model's last hidden states

Features of a transformer share one large direction, so that any two have a high cosine. Three figures guard against
taking that for agreement: the cosine of features of *different* inputs, the cosine after the mean over all inputs is
taken off, and whether each feature's nearest neighbour on the other side is its own.

Shapes: N inputs, B a batch of them, L tokens, D hidden.
"""

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench.limits import free_memory, synchronize
from model.build import build_model
from model.packing import AudioLayout, AudioPack, TextPack
from model.settings import ModelSettings

TARGET_COSINE = 0.999
BATCH = 8
SAMPLE_RATE = 16_000

Features = dict[str, Tensor]


@dataclass(frozen=True)
class Agreement:
    """Cosines between features of the same inputs from two implementations."""

    num_inputs: int
    min_cosine: float
    mean_cosine: float
    min_centred_cosine: float  # after taking off each side's mean over the inputs
    mean_centred_cosine: float
    mean_unlike_cosine: float  # of different inputs: what the agreement has to stand out from
    num_nearest_is_own: int

    @property
    def is_good(self) -> bool:
        return self.min_cosine >= TARGET_COSINE

    def line(self, name: str) -> str:
        return (
            f"parity {name:5s}  {self.num_inputs} inputs"
            f"  cosine min {self.min_cosine:.6f} mean {self.mean_cosine:.6f}"
            f"  centred min {self.min_centred_cosine:.6f} mean {self.mean_centred_cosine:.6f}  "
            f"unlike inputs {self.mean_unlike_cosine:.4f}  nearest is own {self.num_nearest_is_own}/{self.num_inputs}"
            f"  {'ok' if self.is_good else f'BELOW {TARGET_COSINE}'}"
        )


def compare(ours_ND: Tensor, theirs_ND: Tensor) -> Agreement:
    """Row i of both belongs to input i; fp64 throughout. Raises ValueError for shapes that differ."""
    if ours_ND.shape != theirs_ND.shape:
        raise ValueError(f"features: ours are {tuple(ours_ND.shape)}, theirs {tuple(theirs_ND.shape)}")
    ours_ND, theirs_ND = ours_ND.double().cpu(), theirs_ND.double().cpu()
    cosine_NN = F.normalize(ours_ND, dim=1) @ F.normalize(theirs_ND, dim=1).T
    own_N = cosine_NN.diagonal()
    centred_N = F.cosine_similarity(ours_ND - ours_ND.mean(0), theirs_ND - theirs_ND.mean(0), dim=1)
    count = len(own_N)
    return Agreement(
        num_inputs=count,
        min_cosine=float(own_N.min()),
        mean_cosine=float(own_N.mean()),
        min_centred_cosine=float(centred_N.min()),
        mean_centred_cosine=float(centred_N.mean()),
        mean_unlike_cosine=float((cosine_NN.sum() - own_N.sum()) / (count * (count - 1))),
        num_nearest_is_own=int((cosine_NN.argmax(1) == torch.arange(count)).sum()),
    )


def measure(
    checkpoint: Path, waves: Sequence[np.ndarray], strings: Sequence[str], device: torch.device
) -> dict[str, Any]:
    """Agreement of `tower`, `lm` and `text`, and the seconds that each side took to load. waves: int16, 16 kHz mono."""
    ours, ours_load_s = our_features(checkpoint, waves, strings, device)
    free_memory(device)
    theirs, theirs_load_s = their_features(checkpoint, waves, strings, device)
    free_memory(device)
    agreements = {name: compare(ours[name], theirs[name]) for name in ours}
    return {
        "agreements": agreements,
        "is_good": all(one.is_good for one in agreements.values()),
        "ours_load_s": ours_load_s,
        "theirs_load_s": theirs_load_s,
    }


def as_json(measured: dict[str, Any]) -> dict[str, Any]:
    return {**measured, "agreements": {name: asdict(one) for name, one in measured["agreements"].items()}}


@torch.no_grad()
def our_features(
    checkpoint: Path, waves: Sequence[np.ndarray], strings: Sequence[str], device: torch.device
) -> tuple[Features, float]:
    """Pooled features as the heads get them, from the model as training builds it."""
    started = time.perf_counter()
    built = build_model(ModelSettings(model_name=str(checkpoint), audio_readout="lm"), device)
    synchronize(device)
    load_s = time.perf_counter() - started
    model = built.model
    found: dict[str, list[Tensor]] = {"tower": [], "lm": [], "text": []}

    def keep_tower(module: nn.Module, inputs: tuple[Tensor, AudioLayout], frames_QD: Tensor) -> None:
        found["tower"].append(inputs[1].pooled.mean(frames_QD))

    model.audio_tower.register_forward_hook(keep_tower)
    for name, head in (("lm", model.audio_head), ("text", model.text_head)):
        head.register_forward_pre_hook(lambda module, inputs, name=name: found[name].append(inputs[0]))
    for start in range(0, len(waves), BATCH):
        some = waves[start : start + BATCH]
        model.encode_audio(AudioPack(torch.from_numpy(np.concatenate(some)), [len(wave) for wave in some]))
    for start in range(0, len(strings), BATCH):
        ids = built.tokenizer(strings[start : start + BATCH])
        model.encode_text(TextPack(torch.tensor([i for one in ids for i in one]), [len(one) for one in ids]))
    return {name: torch.cat(parts).float().cpu() for name, parts in found.items()}, load_s


@torch.no_grad()
def their_features(
    checkpoint: Path, waves: Sequence[np.ndarray], strings: Sequence[str], device: torch.device
) -> tuple[Features, float]:
    """The same from transformers' own model, feature extractor and tokenizer."""
    import transformers
    from transformers import AutoTokenizer, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    started = time.perf_counter()
    model: Any = Qwen2AudioForConditionalGeneration.from_pretrained(checkpoint, dtype=dtype, attn_implementation="sdpa")
    model.to(device).eval()
    synchronize(device)
    load_s = time.perf_counter() - started
    extractor = WhisperFeatureExtractor.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    tokenizer.padding_side = "right"

    # transformers 5 keeps the towers in `model`; 4 keeps them outside, and the language model in one with a head.
    core = getattr(model, "model", model)
    language_model = getattr(core.language_model, "model", core.language_model)
    last: dict[str, Tensor] = {}
    core.audio_tower.layer_norm.register_forward_hook(lambda module, inputs, out: last.update(audio=out))
    language_model.norm.register_forward_hook(lambda module, inputs, out: last.update(text=out))

    found: dict[str, list[Tensor]] = {"tower": [], "lm": [], "text": []}
    for start in range(0, len(waves), BATCH):
        floats = [wave.astype(np.float32) / 32768 for wave in waves[start : start + BATCH]]
        inputs = extractor(floats, sampling_rate=SAMPLE_RATE, return_attention_mask=True, return_tensors="pt")
        frames_B = inputs["attention_mask"].sum(1)
        tokens_B = core.audio_tower._get_feat_extract_output_lengths(frames_B)[1]
        mask_BL = torch.arange(int(tokens_B.max())) < tokens_B[:, None]
        # A prompt of nothing but its audio: what the language model makes of it is the lm readout.
        pad = model.config.audio_token_index - 1
        ids_BL = torch.full(mask_BL.shape, pad).masked_fill(mask_BL, model.config.audio_token_index)
        model(
            input_ids=ids_BL.to(device),
            attention_mask=mask_BL.long().to(device),
            input_features=inputs["input_features"].to(device, dtype),
            feature_attention_mask=inputs["attention_mask"].to(device),
        )
        found["tower"].append(masked_mean(last["audio"][:, : mask_BL.shape[1]], mask_BL))
        found["lm"].append(masked_mean(last["text"], mask_BL))
    for start in range(0, len(strings), BATCH):
        encoded = tokenizer(
            list(strings[start : start + BATCH]), padding=True, add_special_tokens=False, return_tensors="pt"
        )
        mask_BL = encoded["attention_mask"].bool()
        model(input_ids=encoded["input_ids"].to(device), attention_mask=encoded["attention_mask"].to(device))
        found["text"].append(masked_mean(last["text"], mask_BL))
    return {name: torch.cat(parts) for name, parts in found.items()}, load_s


def masked_mean(x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the tokens of the mask, [B, D], fp32 on the CPU."""
    assert x_BLD.shape[:2] == mask_BL.shape, (x_BLD.shape, mask_BL.shape)
    weight_BL1 = mask_BL[:, :, None].float()
    return (x_BLD.float().cpu() * weight_BL1).sum(1) / weight_BL1.sum(1)
