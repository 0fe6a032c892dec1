"""Packed batches, and the index tables that every layer of a tower shares.

Everything is computed on the CPU from host integers and moved to the device in one copy, so that no layout ever
makes the host wait for the device.

Shapes: S samples, B clips or strings, T mel frame slots, P packed tokens, Q packed tokens after pooling, L longest
length.

The slots of two clips, with n = 3 and n = 4 valid frames (x: kept frame, .: zeroed gap). A clip keeps n + 2 frames, at
least two gap slots follow it, and it starts at an even slot so that the stride-2 convolution meets its frame 0:

    slot    0 1 2 3 4 5 6 7 | 8 9 10 11 12 13 14 15
    clip 0  x x x x x . . . |
    clip 1                    x x x  x  x  x  .  .
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from model.kernels import uses_triton
from model.logmel import HOP, SAMPLE_RATE
from model.sizes import SizeClass
from model.tables import Tables, sequence_tables

TAIL_FRAMES = 2
"""Frames kept after the clip: the reach of the two convolutions beyond its last token."""
GAP_FRAMES = 2
"""Least slots between two clips: a 400-sample window (2.5 hops) must not see the next clip from a kept frame."""
# A padded batch may hold this many times the attention scores that its sequences need before it is split.
_MAX_PADDING = 4


@dataclass(frozen=True, eq=False)
class AudioPack:
    """Clips one after another: `pcm_S` is int16, or float in [-1, 1], 16 kHz mono; `num_samples` are host integers."""

    pcm_S: Tensor
    num_samples: list[int]

    def __post_init__(self) -> None:
        if sum(self.num_samples) != self.pcm_S.numel():
            raise ValueError(f"num_samples: they sum to {sum(self.num_samples)}, but pcm_S holds {self.pcm_S.numel()}")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "AudioPack":
        return replace(self, pcm_S=self.pcm_S.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "AudioPack":
        return replace(self, pcm_S=self.pcm_S.pin_memory())


@dataclass(frozen=True, eq=False)
class TextPack:
    """Strings one after another: `ids_P` int64 token ids; `lengths` are host integers, each at least 1."""

    ids_P: Tensor
    lengths: list[int]

    def __post_init__(self) -> None:
        if sum(self.lengths) != self.ids_P.numel():
            raise ValueError(f"lengths: they sum to {sum(self.lengths)}, but ids_P holds {self.ids_P.numel()} ids")

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "TextPack":
        return replace(self, ids_P=self.ids_P.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> "TextPack":
        return replace(self, ids_P=self.ids_P.pin_memory())


@dataclass(frozen=True, eq=False)
class DenseGroup:
    """Some of a pack's sequences as one padded batch [batch, max_len]."""

    batch: int
    max_len: int
    tokens_P: Tensor | None
    """int64, the group's rows of the pack; None: all of them."""
    rows_P: Tensor | None
    """int64, these tokens' rows of the flattened batch; None: the same, since all lengths are equal."""
    key_mask_BL: Tensor | None
    """bool, True where the batch holds a token; None: everywhere."""


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """Where each packed token sits: tables for attention, positions and means. Build with `SequenceLayout.build`."""

    lengths: list[int]
    max_len: int
    """Longest length, or a bound on it where the pack is filled up to a size class with dummies, some of them empty."""
    cu_seqlens: Tensor
    """int32 [B + 1], as the variable-length kernels want it."""
    owner_P: Tensor
    """int64, the sequence that a token belongs to."""
    place_P: Tensor
    """int64, the token's position in its sequence, from 0."""

    @classmethod
    def build(
        cls, lengths: Sequence[int], device: torch.device | str, size: SizeClass | None = None
    ) -> "SequenceLayout":
        """`size` fills the pack up to a class. Raises ValueError for an empty batch or an empty sequence."""
        tables, lengths = cls.tables(lengths, size), list(lengths) if size is None else size.filled(lengths)
        return cls.of(tables.to(device), lengths, size)

    @classmethod
    def tables(cls, lengths: Sequence[int], size: SizeClass | None = None) -> "Tables":
        """Everything of a layout that goes to the device."""
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: got {lengths[:8]}, need at least one sequence and one token in each")
        return Tables.join(sequence_tables(lengths if size is None else size.filled(lengths)))

    @classmethod
    def of(cls, tables: "Tables", lengths: list[int], size: SizeClass | None = None) -> "SequenceLayout":
        """The layout that `tables` were made for. With a size class the lengths may be any that fill it."""
        return cls._of_parts(tables.parts(), lengths, None if size is None else size.max_len)

    @classmethod
    def _of_parts(cls, parts: Sequence[Tensor], lengths: list[int], max_len: int | None) -> "SequenceLayout":
        cu, owner_P, place_P = parts
        bound = max(lengths) if max_len is None else max_len
        return cls(lengths, bound, cu.to(torch.int32), owner_P, place_P)

    @cached_property
    def dense_groups(self) -> "list[DenseGroup]":
        """The pack as padded batches, for dense attention: one batch, or one for each factor of two in length.

        A single clip of 30 s among short ones would otherwise pad them all to 30 s.
        """
        lengths_B = torch.tensor(self.lengths)
        _, owner_P, place_P = sequence_tables(self.lengths)
        longest, num_sequences = int(lengths_B.max()), int((lengths_B > 0).sum())
        octave_B = torch.log2(longest / lengths_B.clamp(min=1)).long()
        if num_sequences * longest**2 <= _MAX_PADDING * int(lengths_B.square().sum()):
            octave_B = torch.zeros_like(lengths_B)
        octave_B[lengths_B == 0] = -1  # in no batch
        groups = []
        for octave in octave_B[lengths_B > 0].unique().tolist():
            members_B = octave_B == octave
            batch, max_len = int(members_B.sum()), int(lengths_B[members_B].max())
            tokens_P = members_B[owner_P].nonzero()[:, 0]
            rank_B = members_B.cumsum(0) - 1
            rows_P = rank_B[owner_P[tokens_P]] * max_len + place_P[tokens_P]
            mask_BL = torch.arange(max_len) < lengths_B[members_B][:, None]
            tables = Tables.join([tokens_P, rows_P, mask_BL.flatten().long()]).to(self.owner_P.device)
            tokens_P, rows_P, mask = tables.parts()
            is_padded = batch * max_len > len(tokens_P)
            groups.append(
                DenseGroup(
                    batch=batch,
                    max_len=max_len,
                    tokens_P=None if batch == num_sequences else tokens_P,
                    rows_P=rows_P if is_padded else None,
                    key_mask_BL=mask.bool().view(batch, max_len) if is_padded else None,
                )
            )
        return groups

    def mean(self, x_PD: Tensor, kernels: str = "auto") -> Tensor:
        """Mean over each sequence's tokens, [B, D], summed in fp32 (fp64 for fp64 input); zero for an empty dummy."""
        if uses_triton(kernels, x_PD):
            from model.mean_kernels import sequence_mean

            return sequence_mean(x_PD, self.cu_seqlens)
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        sums_BD = x_PD.new_zeros(len(self.lengths), x_PD.shape[1], dtype=wide).index_add(0, self.owner_P, x_PD.to(wide))
        return sums_BD / self.cu_seqlens.diff().clamp(min=1)[:, None].to(wide)


@dataclass(frozen=True, eq=False)
class AudioLayout:
    """From samples to mel slots to tokens to pooled tokens, for one pack of clips. Build with `AudioLayout.build`."""

    num_frames: list[int]
    max_frames: int
    """Frames of the padded input that the published model sees: 3000, which is 30 s."""
    owner_T: Tensor
    """int64, the clip that a mel slot belongs to."""
    place_T: Tensor
    """int64, the slot's frame number in its clip, from 0, gap slots counting on."""
    is_kept_T: Tensor
    """bool, False in gaps."""
    sample_start_B: Tensor
    num_samples_B: Tensor
    num_frames_B: Tensor
    token_slot_P: Tensor
    """int64, each token's row in the second convolution's output."""
    tokens: SequenceLayout
    pooled: SequenceLayout
    pool_first_Q: Tensor
    """int64, the first of the two tokens that a pooled token averages."""
    pool_second_Q: Tensor
    """int64, the second; the same as the first for a clip of one token."""

    @classmethod
    def build(
        cls,
        num_samples: Sequence[int],
        pool: int,
        max_frames: int,
        device: torch.device | str,
        size: SizeClass | None = None,
    ) -> "AudioLayout":
        """`pool` is 1 or 2, `max_frames` the tower's reach; `size` fills the pack up to a class.

        Raises ValueError for a clip that is empty or too long.
        """
        tables = cls.tables(num_samples, pool, max_frames, size)
        num_frames = frames_of(num_samples, max_frames)
        num_tokens = [tokens_of(frames) for frames in num_frames]
        return cls.of(tables.to(device), num_frames, num_tokens, pool, max_frames, size)

    @classmethod
    def tables(cls, num_samples: Sequence[int], pool: int, max_frames: int, size: SizeClass | None = None) -> "Tables":
        """Everything of a layout that goes to the device. Raises as `build`."""
        num_frames = frames_of(num_samples, max_frames)
        kept = [min(frames + TAIL_FRAMES, max_frames) for frames in num_frames]
        slots = [frames + GAP_FRAMES + frames % 2 for frames in kept]
        own_tokens = [tokens_of(frames) for frames in num_frames]
        own_pooled = [pooled_of(tokens, pool) for tokens in own_tokens]
        num_tokens = own_tokens if size is None else size.filled(own_tokens)
        num_pooled = own_pooled if size is None else size.filled_pooled(own_pooled)
        num_dummies, num_own, num_own_pooled = len(num_tokens) - len(kept), sum(own_tokens), sum(own_pooled)

        slot_cu, owner_T, place_T = sequence_tables(slots)
        is_kept_T = (place_T < torch.tensor(kept)[owner_T]).long()
        token_cu, token_owner_P, token_place_P = sequence_tables(num_tokens)
        pooled_cu, pooled_owner_Q, pooled_place_Q = sequence_tables(num_pooled)
        samples_B = torch.tensor(list(num_samples), dtype=torch.int64)
        token_slot_P = slot_cu[:-1][token_owner_P[:num_own]] // 2 + token_place_P[:num_own]
        owner_Q = pooled_owner_Q[:num_own_pooled]
        pool_first_Q = token_cu[:-1][owner_Q] + pooled_place_Q[:num_own_pooled] * pool
        pool_second_Q = torch.minimum(pool_first_Q + pool - 1, token_cu[1:][owner_Q] - 1)
        if size is not None:
            # Dummy tokens are what the convolutions make of gap slots, dummy pooled tokens are pairs of them; pooled
            # tokens that are left over share the last token.
            num_slots, last = size.num_slots - len(owner_T), len(token_owner_P) - 1
            owner_T = torch.cat([owner_T, torch.full((num_slots,), len(kept))])
            place_T, is_kept_T = (
                torch.cat([t, torch.zeros(num_slots, dtype=torch.int64)]) for t in (place_T, is_kept_T)
            )
            token_slot_P = torch.cat([token_slot_P, sum(slots) // 2 + torch.arange(last + 1 - num_own)])
            first_Q = num_own + pool * torch.arange(len(pooled_owner_Q) - num_own_pooled)
            pool_first_Q = torch.cat([pool_first_Q, first_Q.clamp(max=last)])
            pool_second_Q = torch.cat([pool_second_Q, (first_Q + pool - 1).clamp(max=last)])
        none_B = torch.zeros(num_dummies, dtype=torch.int64)
        return Tables.join(
            [
                owner_T,
                place_T,
                is_kept_T,
                torch.cat([samples_B.cumsum(0) - samples_B, none_B]),
                torch.cat([samples_B, none_B]),
                torch.cat([torch.tensor(num_frames), none_B + 1]),
                token_slot_P,
                token_cu,
                token_owner_P,
                token_place_P,
                pooled_cu,
                pooled_owner_Q,
                pooled_place_Q,
                pool_first_Q,
                pool_second_Q,
            ]
        )

    @classmethod
    def of(
        cls,
        tables: "Tables",
        num_frames: Sequence[int],
        num_tokens: Sequence[int],
        pool: int,
        max_frames: int,
        size: SizeClass | None = None,
    ) -> "AudioLayout":
        """The layout that `tables` were made for. With a size class, frames and tokens may be any that fit it."""
        parts = tables.parts()
        num_pooled = [pooled_of(tokens, pool) for tokens in num_tokens]
        num_frames = list(num_frames)
        if size is not None:
            num_frames += [1] * (size.num_sequences - len(num_frames))
            num_tokens, num_pooled = size.filled(num_tokens), size.filled_pooled(num_pooled)
        return cls(
            num_frames=num_frames,
            max_frames=max_frames,
            owner_T=parts[0],
            place_T=parts[1],
            is_kept_T=parts[2].bool(),
            sample_start_B=parts[3],
            num_samples_B=parts[4],
            num_frames_B=parts[5],
            token_slot_P=parts[6],
            tokens=SequenceLayout._of_parts(parts[7:10], list(num_tokens), None if size is None else size.max_len),
            pooled=SequenceLayout._of_parts(parts[10:13], num_pooled, None if size is None else size.max_pooled),
            pool_first_Q=parts[13],
            pool_second_Q=parts[14],
        )


def frames_of(num_samples: Sequence[int], max_frames: int) -> list[int]:
    """Mel frames of each clip. Raises ValueError for an empty pack, and for a clip that is empty or too long."""
    limit = max_frames * HOP
    if not num_samples:
        raise ValueError("num_samples: got an empty pack, need at least one clip")
    for i, samples in enumerate(num_samples):
        if not 1 <= samples <= limit:
            seconds = limit / SAMPLE_RATE
            raise ValueError(f"num_samples[{i}]: got {samples}, allowed are 1 to {limit} ({seconds:g} s at 16 kHz)")
    return [-(-samples // HOP) for samples in num_samples]


def tokens_of(frames: int) -> int:
    return (frames - 1) // 2 + 1


def pooled_of(tokens: int, pool: int) -> int:
    """A clip of one token has no pair to average; it keeps its token where the published code would return none."""
    return max(1, tokens // pool)
