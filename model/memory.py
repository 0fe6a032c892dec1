"""What a training step keeps on the device, in bytes, and how many layers to recompute so that it fits.

Counted for a layer with frozen weights, Triton kernels and joint projections, in elements a token (D width, F
feed-forward width, J = (H + 2 K) D' columns of q, k and v, C columns of the adapters' low-rank rows):

    two residual sums    2 D        which the norms' and the projections' gradients are made from
    projection           J + C      q, k, v for attention, low-rank rows for the adapters
    attention            H D', and H fp32: its result and the log-sum-exp of each row
    feed-forward         F, or 2 F of SwiGLU: the pre-activation
    statistics           2 or 4 fp32 of the norms

Plain torch keeps more, see `layer_cost`. A recomputed layer keeps the stream that goes in, D, and one layer at a time
all of the above. tests/model/test_memory.py counts the tensors that are alive.

Shapes: P packed tokens.
"""

from dataclasses import dataclass, replace

from model.audio_tower import AudioConfig
from model.parking import MOST_WAITING
from model.text_tower import TextConfig

STATISTICS = 4
"""Bytes of an fp32 number."""
AUDIO_FRONT_BYTES = 16_384
"""A token, while the clips become mel frames: spectra of two frames and the patches of the convolutions."""


@dataclass(frozen=True)
class LayerCost:
    """A layer of a tower; all but `num_layers` a token."""

    num_layers: int
    kept: int
    """Bytes kept from the forward to the backward pass."""
    kept_recomputed: int
    """Likewise, where the layer is computed again."""
    work: int
    """Bytes that its backward pass takes besides, at most."""
    operations: int
    """Multiplications of its frozen matrices, which recomputing costs."""

    @property
    def saved(self) -> int:
        return self.kept - self.kept_recomputed

    def bytes_kept(self, num_recomputed: int, num_tokens: int) -> int:
        """Between a forward and a backward pass over so many tokens."""
        return num_tokens * (self.num_layers * self.kept - num_recomputed * self.saved)

    def bytes_of(self, num_recomputed: int, num_tokens: int) -> int:
        """At the peak of a backward pass: at its start, or at the last of the layers from the first that are
        recomputed, which then is whole, while those behind it are done with."""
        recomputed = num_tokens * (num_recomputed * self.kept_recomputed + self.kept) if num_recomputed else 0
        return max(self.bytes_kept(num_recomputed, num_tokens), recomputed) + num_tokens * self.work


def layer_cost(
    config: AudioConfig | TextConfig, itemsize: int = 2, adapter_columns: int = 64, fused: bool = True
) -> LayerCost:
    """itemsize: bytes of the compute dtype. adapter_columns: columns of the low-rank rows, with padding.

    fused: without Triton the normed rows and SwiGLU's silu are kept as well, and rotary positions leave turned copies.
    """
    if isinstance(config, AudioConfig):
        width, ffn, heads, has_bias = config.d_model, config.ffn_dim, config.num_heads, True
        out, columns, turned = width, 3 * width, 0
        pre_activation, silu, matrices = ffn, 0, 4 * width**2 + 2 * width * ffn
    else:
        width, ffn, heads, has_bias = config.hidden_size, config.intermediate_size, config.num_heads, False
        out, key = heads * config.head_dim, config.num_kv_heads * config.head_dim
        columns, turned = out + 2 * key, out + key
        pre_activation, silu, matrices = 2 * ffn, ffn, 2 * width * (out + key) + 3 * width * ffn
    elements = 2 * width + columns + adapter_columns + out + pre_activation
    if not fused:
        elements += width + silu + turned
    numbers = heads + (4 if has_bias else 2)
    return LayerCost(
        num_layers=config.num_layers,
        kept=itemsize * elements + STATISTICS * numbers,
        kept_recomputed=itemsize * width,
        # Gradients of the pre-activation and of its product, or of q, k and v, beside those of the stream.
        work=itemsize * (max(pre_activation + ffn, 2 * columns) + 3 * width),
        operations=matrices,
    )


@dataclass(frozen=True)
class Plan:
    """Layers to recompute, from the first of each tower, and the bytes a step then takes besides the model."""

    num_audio: int
    num_text: int
    bytes_needed: int
    fits: bool
    parks: bool = False
    """What goes into recomputed layers waits in host memory (model/parking.py)."""


def parked(cost: LayerCost) -> LayerCost:
    """Of layers whose inputs wait in host memory: a few are on their way at a time."""
    return replace(cost, kept_recomputed=0, work=cost.work + (MOST_WAITING + 1) * cost.kept_recomputed)


def plan_layers(
    audio: LayerCost, text: LayerCost, audio_tokens: int, text_tokens: int, room: float, may_park: bool = False
) -> Plan:
    """The fewest operations that bring a step over so many tokens into `room` bytes, or all layers if nothing does.

    The tower whose layers free more bytes for an operation goes first, as far as it has to. may_park: where that does
    not do, inputs of recomputed layers go to host memory.
    """
    chosen = {"audio": 0, "text": 0}
    costs, tokens = {"audio": audio, "text": text}, {"audio": audio_tokens, "text": text_tokens}

    def needed() -> int:
        return bytes_needed(audio, text, audio_tokens, text_tokens, chosen["audio"], chosen["text"])

    for name in sorted(costs, key=lambda name: -costs[name].saved / costs[name].operations):
        while tokens[name] and needed() > room and chosen[name] < costs[name].num_layers:
            chosen[name] += 1
    if may_park and needed() > room:
        plan = plan_layers(parked(audio), parked(text), audio_tokens, text_tokens, room)
        return replace(plan, parks=True)
    return Plan(chosen["audio"], chosen["text"], needed(), needed() <= room)


def bytes_needed(
    audio: LayerCost, text: LayerCost, audio_tokens: int, text_tokens: int, num_audio: int, num_text: int
) -> int:
    """Of a step. The text tower's backward pass comes first, beside all that the audio tower keeps. With nothing
    recomputed each side may be a CUDA graph, whose memory stays its own."""
    audio_peak, text_peak = audio.bytes_of(num_audio, audio_tokens), text.bytes_of(num_text, text_tokens)
    if not num_audio and not num_text:
        return max(audio_tokens * AUDIO_FRONT_BYTES, audio_peak + text_peak)
    return max(audio_tokens * AUDIO_FRONT_BYTES, audio_peak, audio.bytes_kept(num_audio, audio_tokens) + text_peak)


def clips_in(audio: LayerCost, text: LayerCost, audio_tokens: float, text_tokens: float, room: float) -> int:
    """Clips of so many tokens each that fit without recomputing anything; 0 when not even one does."""
    a_clip = audio.bytes_of(0, 1) * audio_tokens + text.bytes_of(0, 1) * text_tokens
    return max(0, int(room / a_clip))
