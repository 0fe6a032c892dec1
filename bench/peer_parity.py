"""The same weights, clips and objective through a peer and through our step: loss and gradients must agree.

Small towers, dropout off, one term a clip (with two, the peers' objective takes the first for the only positive, ours
both). The peers leave the mask of the 30 s padding away; here it is given, as the published model has it.
"""

from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor
from transformers import WhisperFeatureExtractor

from bench.drawn import as_batch, draw, on_device
from bench.ours import Shapes, Training, build, wake_adapters, without_dropout
from data.batches import Batch
from model.build import Built

if TYPE_CHECKING:
    from bench.peers import Peer

NUM_CLIPS = 6
# Largest relative difference of the loss, least cosine of all gradients as one vector.
TOLERANCE = {torch.float32: (1e-4, 0.99999), torch.bfloat16: (3e-2, 0.98)}


def compare(kind: Literal["stock", "tuned"], device: torch.device) -> dict[str, dict[str, float]]:
    """Loss difference and gradient cosine by dtype. Raises RuntimeError where they are beyond the tolerance."""
    dtypes = [torch.float32, torch.bfloat16] if device.type == "cuda" else [torch.float32]
    found = {}
    for dtype in dtypes:
        difference, cosine = _compare(kind, device, dtype)
        found[str(dtype).removeprefix("torch.")] = {"loss_difference": difference, "gradient_cosine": cosine}
        most, least = TOLERANCE[dtype]
        if not (difference <= most and cosine >= least):
            raise RuntimeError(
                f"{kind}, {dtype}: loss differs by {difference:.2e} (allowed {most:g}), gradients have cosine "
                f"{cosine:.6f} (at least {least:g}): the two do not compute the same, so no time would compare"
            )
    return found


def _compare(kind: Literal["stock", "tuned"], device: torch.device, dtype: torch.dtype) -> tuple[float, float]:
    from bench.peers import Peer, objective

    torch.manual_seed(0)
    shapes = Shapes.of(tiny=True)
    if dtype == torch.bfloat16:
        built = build(shapes, device, without_dropout(), base_dtype="bf16")
    else:  # in torch alone: kernels that nobody trains with would be compiled for this
        built = build(shapes, device, without_dropout(), dtype, kernels="torch", attention="sdpa")
    wake_adapters(built.model)
    peer = Peer(kind, shapes, device, dtype, dropout=0.0)
    copy_weights(built, peer)

    drawn = draw(NUM_CLIPS, torch.Generator().manual_seed(1))
    one_each = torch.ones(NUM_CLIPS, dtype=torch.long)
    drawn = replace(drawn, num_terms_B=one_each, term_lengths_N=drawn.term_lengths_N[:NUM_CLIPS])
    batch = as_batch(drawn, 0, shapes.vocabulary)
    our_loss = Training(built).backward(on_device(batch, device))

    with torch.autocast(device.type, dtype=torch.bfloat16, enabled=kind == "stock" and dtype == torch.bfloat16):
        mel_BMT, tokens_BL, keys_B1LL = _padded_audio(batch, shapes, device, dtype)
        audio_BE = peer.encode_audio(mel_BMT, tokens_BL, keys_B1LL).float()
        rows_E = peer.encode_text(*_padded_ids(batch, device)).float()
        loss = objective(audio_BE, rows_E[:NUM_CLIPS], rows_E[NUM_CLIPS:], torch.arange(NUM_CLIPS, device=device))
    loss.backward()

    ours, theirs = [], []
    for name, param in built.model.named_parameters():
        if param.requires_grad:
            other = peer.get_parameter(peer_name(name))
            assert param.grad is not None, name
            assert other.grad is not None, name
            ours.append(param.grad.double().flatten())
            theirs.append(other.grad.double().flatten())
    cosine = torch.nn.functional.cosine_similarity(torch.cat(ours), torch.cat(theirs), dim=0)
    expected = float(loss.detach())
    return abs(float(our_loss) - expected) / abs(expected), float(cosine)


def peer_name(name: str) -> str:
    """Our parameter's name in the peer."""
    for leaf in ("lora_A", "lora_B"):
        if name.endswith(f".{leaf}"):
            name += ".default.weight"
    return name.replace("audio_tower.", "tower.", 1)


@torch.no_grad()
def copy_weights(built: Built, peer: "Peer") -> None:
    """Ours into the peer's; every parameter of ours has its place there."""
    for name, param in built.model.named_parameters():
        peer.get_parameter(peer_name(name)).copy_(param)


def _padded_audio(
    batch: Batch, shapes: Shapes, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    """Features [B, M, 3000], the tokens that hold sound [B, L], and the additive mask over keys [B, 1, L, L]."""
    waves = torch.from_numpy(batch.pcm_S).float().div(32768).split(batch.num_samples)
    extractor: Any = WhisperFeatureExtractor(feature_size=shapes.audio["num_mel_bins"])
    inputs = extractor(
        [wave.numpy() for wave in waves], sampling_rate=16_000, return_attention_mask=True, return_tensors="pt"
    )
    # The extractor's mask of frames is of samples at every hop: one more frame where the last hop is begun.
    frames_B = inputs["attention_mask"].sum(1)
    num_tokens = shapes.audio["max_source_positions"]
    tokens_BL = torch.arange(num_tokens) < ((frames_B - 1) // 2 + 1)[:, None]
    keys_B1LL = torch.zeros(len(waves), 1, num_tokens, num_tokens, dtype=dtype)
    keys_B1LL.masked_fill_(~tokens_BL[:, None, None, :], float("-inf"))
    return inputs["input_features"].to(device, dtype), tokens_BL.to(device), keys_B1LL.to(device)


def _padded_ids(batch: Batch, device: torch.device) -> tuple[Tensor, Tensor]:
    """All strings of the batch as one padded batch: ids and mask [N, L]."""
    rows = torch.from_numpy(batch.token_ids_P).split(batch.token_lengths)
    ids_NL = torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)
    lengths_N = torch.tensor(batch.token_lengths)
    return ids_NL.to(device), (torch.arange(ids_NL.shape[1]) < lengths_N[:, None]).long().to(device)
