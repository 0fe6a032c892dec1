"""The two ways in which a user would train this model today, with transformers and PEFT.

    stock    LoRA r 16 on q, k, v of both towers with dropout 0.1, fp32 adapters under autocast, sdpa, layer
             checkpointing, AdamW; texts and terms in two padded batches; the language model's head is loaded
    tuned    what a careful user makes of it: no head, bf16 adapters without dropout, fused AdamW, one padded text
             batch, checkpointing only where memory asks for it

Both pad audio to 30 s, as transformers insists. A peer runs in a process of its own (two models of this size do not
fit beside each other) and prints one JSON line a setting:

    python bench/peers.py tuned --budget_s 30 16 32 64+ 128+        (clips; + with checkpointing)
    python bench/peers.py tuned --in_loop 16 32                     features made in the loop, between the steps

Without --in_loop a few batches lie ready on the device and take turns, as on our side: nothing but steps is done from
the first to the last, which is the peers' best. With it each step has a batch of its own, whose features the training
process makes just before: not timed either, but the steps are slower for it.

Before any timing it is compared with our model at small shapes, dropout off: see bench/peer_parity.py.

Shapes: B clips, N strings, L tokens, T mel frames, D hidden, E embedding.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.nn.functional as F
import transformers
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration, WhisperFeatureExtractor

from bench.drawn import NUM_BATCHES, SAMPLE_RATE, Drawn, draw
from bench.limits import bench_device, free_memory, synchronize
from bench.ours import Shapes, peak_gib

Kind = Literal["stock", "tuned"]

TEMPERATURE = 0.07
WARMUP, MOST_STEPS, LEAST_STEPS = 2, 20, 3


def hf_config(shapes: Shapes) -> Qwen2AudioConfig:
    text = {k: v for k, v in shapes.text.items() if k not in ("head_dim", "rope_theta")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": float(shapes.text["rope_theta"])}
    return Qwen2AudioConfig(
        audio_config=dict(shapes.audio),
        text_config=text,
        audio_token_index=min(151_646, shapes.text["vocab_size"] - 1),
    )


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Peer(nn.Module):
    """transformers' towers, PEFT's adapters, a mean and a linear head each."""

    def __init__(
        self, kind: Kind, shapes: Shapes, device: torch.device, dtype: torch.dtype, dropout: float | None = None
    ) -> None:
        super().__init__()
        self.kind = kind
        with _default_dtype(dtype), torch.device(device):
            whole = Qwen2AudioForConditionalGeneration._from_config(hf_config(shapes), attn_implementation="sdpa")
        whole.config.use_cache = False
        whole.requires_grad_(False)
        if dropout is None:
            dropout = 0.1 if kind == "stock" else 0.0
        adapters = LoraConfig(r=16, lora_alpha=32, lora_dropout=dropout, target_modules=["q_proj", "k_proj", "v_proj"])
        self.wrapped = get_peft_model(
            whole.model if kind == "tuned" else whole, adapters, autocast_adapter_dtype=kind == "stock"
        )
        core: Any = self.wrapped.base_model.model
        core = core if kind == "tuned" else core.model
        self.tower, self.language_model = core.audio_tower, core.language_model
        self.audio_head = nn.Linear(shapes.audio["d_model"], 512, device=device)
        self.text_head = nn.Linear(shapes.text["hidden_size"], 512, device=device)

    def set_checkpointing(self, wanted: bool) -> None:
        for tower in (self.tower, self.language_model):
            if wanted:
                tower.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            else:
                tower.gradient_checkpointing_disable()

    def encode_audio(self, mel_BMT: Tensor, tokens_BL: Tensor, keys_B1LL: Tensor | None = None) -> Tensor:
        """tokens_BL: which of the 1,500 tokens hold sound. keys_B1LL: an additive attention mask over them, which
        the recipes leave away; with it the values are those of packed clips."""
        hidden_BLD = self.tower(mel_BMT, attention_mask=keys_B1LL).last_hidden_state
        return F.normalize(self.audio_head(mean_of(hidden_BLD, tokens_BL[:, 1::2])), dim=-1)

    def encode_text(self, ids_NL: Tensor, tokens_NL: Tensor) -> Tensor:
        hidden_NLD = self.language_model(input_ids=ids_NL, attention_mask=tokens_NL).last_hidden_state
        return F.normalize(self.text_head(mean_of(hidden_NLD, tokens_NL)), dim=-1)

    def autocast(self) -> torch.autocast:
        """The stock recipe's; the tuned one has its adapters in bf16 and needs none."""
        device = self.audio_head.weight.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.kind == "stock" and device == "cuda")


def mean_of(hidden_BLD: Tensor, tokens_BL: Tensor) -> Tensor:
    weight_BL1 = tokens_BL[:, :, None].to(hidden_BLD.dtype)
    return ((hidden_BLD * weight_BL1).sum(1) / weight_BL1.sum(1).clamp_min(1)).float()


def objective(audio_BE: Tensor, text_BE: Tensor, term_NE: Tensor, owner_N: Tensor) -> Tensor:
    """Symmetric cross-entropies against texts and against terms, of which a clip's first is its target."""
    clips_B = torch.arange(len(audio_BE), device=audio_BE.device)
    first_B = torch.searchsorted(owner_N, clips_B)
    scores_BB, scores_BN = audio_BE @ text_BE.T / TEMPERATURE, audio_BE @ term_NE.T / TEMPERATURE
    with_text = F.cross_entropy(scores_BB, clips_B) + F.cross_entropy(scores_BB.T, clips_B)
    with_terms = F.cross_entropy(scores_BN, first_B) + F.cross_entropy(scores_BN.T, owner_N)
    return 0.3 * with_text / 2 + 0.7 * with_terms / 2


def pad_ids(lengths_N: Tensor, vocabulary: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Random ids and their mask."""
    longest = int(lengths_N.max())
    ids_NL = torch.randint(0, vocabulary, (len(lengths_N), longest), device=device)
    return ids_NL, (torch.arange(longest) < lengths_N[:, None]).long().to(device)


def mel_of(drawn: Drawn, extractor: WhisperFeatureExtractor, device: torch.device, dtype: torch.dtype) -> Tensor:
    waves = [wave.numpy() for wave in drawn.waves]
    features = extractor(waves, sampling_rate=SAMPLE_RATE, return_tensors="pt")["input_features"]
    return features.to(device, dtype)


@dataclass(frozen=True)
class Prepared:
    """A batch as a peer wants it, on the device."""

    mel_BMT: Tensor
    tokens_BL: Tensor
    strings: list[tuple[Tensor, Tensor]]
    owner_N: Tensor
    """The clip of each term."""


def prepare(drawn: Drawn, peer: Peer, shapes: Shapes, extractor: WhisperFeatureExtractor) -> Prepared:
    device, dtype = peer.audio_head.weight.device, next(peer.tower.parameters()).dtype
    tokens_B = torch.tensor([(len(wave) // 160 - 1) // 2 + 1 for wave in drawn.waves])
    tokens_BL = (torch.arange(shapes.audio["max_source_positions"]) < tokens_B[:, None]).to(device)
    owner_N = torch.repeat_interleave(torch.arange(drawn.num_clips), drawn.num_terms_B).to(device)
    lengths = [drawn.text_lengths_B, drawn.term_lengths_N]
    if peer.kind == "tuned":
        lengths = [torch.cat(lengths)]
    strings = [pad_ids(one, shapes.vocabulary, device) for one in lengths]
    return Prepared(mel_of(drawn, extractor, device, dtype), tokens_BL, strings, owner_N)


def measure_peer(
    peer: Peer, shapes: Shapes, num_clips: int, checkpointing: bool, budget_s: float, in_loop: bool = False
) -> dict[str, float | int | bool | str | None]:
    """Median step over as many steps as fit the budget, at most 20. Features lie on the device before the clock
    starts; log-mel is not in the peers' time. in_loop: made before each step, for a batch of its own."""
    device = peer.audio_head.weight.device
    peer.train()
    peer.set_checkpointing(checkpointing)
    params = [param for param in peer.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=1e-4, fused=peer.kind == "tuned")
    extractor = WhisperFeatureExtractor(feature_size=shapes.audio["num_mel_bins"])
    generator = torch.Generator().manual_seed(0)

    def next_batch() -> Prepared:
        return prepare(draw(num_clips, generator), peer, shapes, extractor)

    ready = [] if in_loop else [next_batch() for _ in range(NUM_BATCHES)]
    times: list[float] = []
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    begun = time.perf_counter()
    for step in range(WARMUP + MOST_STEPS):
        is_late = time.perf_counter() - begun > budget_s
        if is_late and len(times) >= LEAST_STEPS:
            break
        batch = next_batch() if in_loop else ready[step % NUM_BATCHES]
        synchronize(device)
        started = time.perf_counter()
        with peer.autocast():
            audio_BE = peer.encode_audio(batch.mel_BMT, batch.tokens_BL).float()
            rows_E = torch.cat([peer.encode_text(*one) for one in batch.strings]).float()
            loss = objective(audio_BE, rows_E[:num_clips], rows_E[num_clips:], batch.owner_N)
        loss.backward()
        nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronize(device)
        if step >= WARMUP:
            times.append(time.perf_counter() - started)
    median = sorted(times)[len(times) // 2]
    return {
        "peer": peer.kind, "clips": num_clips, "checkpointing": checkpointing, "steps": len(times),
        "seconds": median, "clips_per_s": num_clips / median, "peak_gib": peak_gib(device),
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Time a peer; one JSON line a setting.")
    parser.add_argument("kind", choices=("stock", "tuned"))
    parser.add_argument("settings", nargs="+", help="clips a step; + after it with checkpointing")
    parser.add_argument("--budget_s", type=float, default=20.0, help="seconds a setting")
    parser.add_argument("--in_loop", action="store_true", help="make each batch just before its step, not timed")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    from bench.peer_parity import compare  # which needs this module

    warnings.filterwarnings("ignore", category=FutureWarning)  # names that both versions of transformers know
    transformers.utils.logging.set_verbosity_error()

    device = bench_device()
    print(json.dumps({"parity": compare(args.kind, device)}), flush=True)
    started = time.perf_counter()
    shapes, dtype = Shapes.of(args.tiny), torch.bfloat16 if device.type == "cuda" else torch.float32
    peer = Peer(args.kind, shapes, device, dtype)
    synchronize(device)
    print(json.dumps({"build_s": time.perf_counter() - started}), flush=True)
    for setting in args.settings:
        clips, checkpointing = int(setting.rstrip("+")), setting.endswith("+")
        found: dict[str, Any] = {"peer": args.kind, "clips": clips, "checkpointing": checkpointing}
        try:
            found = measure_peer(peer, shapes, clips, checkpointing, args.budget_s, args.in_loop)
        except torch.OutOfMemoryError:
            found["out_of_memory"] = True
        print(json.dumps(found), flush=True)
        peer.zero_grad(set_to_none=True)
        free_memory(device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
