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
    cu_seqlens: Tensor
    """int32 [B + 1], as the variable-length kernels want it."""
    owner_P: Tensor
    """int64, the sequence that a token belongs to."""
    place_P: Tensor
    """int64, the token's position in its sequence, from 0."""

    @classmethod
    def build(cls, lengths: Sequence[int], device: torch.device | str) -> "SequenceLayout":
        """Raises ValueError for an empty batch or an empty sequence."""
        lengths = [int(length) for length in lengths]
        if not lengths or min(lengths) < 1:
            raise ValueError(f"lengths: got {lengths[:8]}, need at least one sequence and one token in each")
        return cls._from_tables(lengths, _ship(dict(zip(_TABLE_NAMES, _tables(lengths), strict=True)), device))

    @classmethod
    def _from_tables(cls, lengths: list[int], tables: dict[str, Tensor], prefix: str = "") -> "SequenceLayout":
        cu, owner_P, place_P = (tables[prefix + name] for name in _TABLE_NAMES)
        return cls(lengths, max(lengths), cu.to(torch.int32), owner_P, place_P)

    @cached_property
    def dense_groups(self) -> "list[DenseGroup]":
        """The pack as padded batches, for dense attention: one batch, or one for each factor of two in length.

        A single clip of 30 s among short ones would otherwise pad them all to 30 s.
        """
        lengths_B = torch.tensor(self.lengths)
        _, owner_P, place_P = _tables(self.lengths)
        octave_B = torch.log2(self.max_len / lengths_B).long()
        if len(self.lengths) * self.max_len**2 <= _MAX_PADDING * int(lengths_B.square().sum()):
            octave_B = torch.zeros_like(lengths_B)
        groups = []
        for octave in octave_B.unique().tolist():
            members_B = octave_B == octave
            batch, max_len = int(members_B.sum()), int(lengths_B[members_B].max())
            tokens_P = members_B[owner_P].nonzero()[:, 0]
            rank_B = members_B.cumsum(0) - 1
            rows_P = rank_B[owner_P[tokens_P]] * max_len + place_P[tokens_P]
            mask_BL = torch.arange(max_len) < lengths_B[members_B][:, None]
            moved = _ship({"tokens": tokens_P, "rows": rows_P, "mask": mask_BL.flatten().long()}, self.owner_P.device)
            is_padded = batch * max_len > len(tokens_P)
            groups.append(
                DenseGroup(
                    batch=batch,
                    max_len=max_len,
                    tokens_P=None if batch == len(self.lengths) else moved["tokens"],
                    rows_P=moved["rows"] if is_padded else None,
                    key_mask_BL=moved["mask"].bool().view(batch, max_len) if is_padded else None,
                )
            )
        return groups

    def mean(self, x_PD: Tensor, kernels: str = "auto") -> Tensor:
        """Mean over each sequence's tokens, [B, D], accumulated in fp32 (fp64 for fp64 input)."""
        if uses_triton(kernels, x_PD):
            from model.mean_kernels import sequence_mean

            return sequence_mean(x_PD, self.cu_seqlens, self.owner_P)
        wide = torch.promote_types(x_PD.dtype, torch.float32)
        sums_BD = x_PD.new_zeros(len(self.lengths), x_PD.shape[1], dtype=wide).index_add(0, self.owner_P, x_PD.to(wide))
        return sums_BD / self.cu_seqlens.diff()[:, None].to(wide)


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
    def build(cls, num_samples: Sequence[int], pool: int, max_frames: int, device: torch.device | str) -> "AudioLayout":
        """`pool` is 1 or 2, `max_frames` the tower's reach. Raises ValueError for a clip that is empty or too long."""
        limit = max_frames * HOP
        if not num_samples:
            raise ValueError("num_samples: got an empty pack, need at least one clip")
        for i, samples in enumerate(num_samples):
            if not 1 <= samples <= limit:
                seconds = limit / SAMPLE_RATE
                raise ValueError(f"num_samples[{i}]: got {samples}, allowed are 1 to {limit} ({seconds:g} s at 16 kHz)")
        num_frames = [-(-samples // HOP) for samples in num_samples]
        kept = [min(frames + TAIL_FRAMES, max_frames) for frames in num_frames]
        slots = [frames + GAP_FRAMES + frames % 2 for frames in kept]
        num_tokens = [(frames - 1) // 2 + 1 for frames in num_frames]
        # A clip of one token has no pair to average; it keeps its token where the published code would return none.
        num_pooled = [max(1, tokens // pool) for tokens in num_tokens]

        slot_cu, owner_T, place_T = _tables(slots)
        token_cu, token_owner_P, token_place_P = _tables(num_tokens)
        pooled_cu, pooled_owner_Q, pooled_place_Q = _tables(num_pooled)
        samples_B = torch.tensor(list(num_samples), dtype=torch.int64)
        pool_first_Q = token_cu[:-1][pooled_owner_Q] + pooled_place_Q * pool
        tables = _ship(
            {
                "owner_T": owner_T,
                "place_T": place_T,
                "is_kept_T": (place_T < torch.tensor(kept)[owner_T]).long(),
                "sample_start_B": samples_B.cumsum(0) - samples_B,
                "num_samples_B": samples_B,
                "num_frames_B": torch.tensor(num_frames),
                "token_slot_P": slot_cu[:-1][token_owner_P] // 2 + token_place_P,
                "token_cu": token_cu,
                "token_owner": token_owner_P,
                "token_place": token_place_P,
                "pooled_cu": pooled_cu,
                "pooled_owner": pooled_owner_Q,
                "pooled_place": pooled_place_Q,
                "pool_first_Q": pool_first_Q,
                "pool_second_Q": torch.minimum(pool_first_Q + pool - 1, token_cu[1:][pooled_owner_Q] - 1),
            },
            device,
        )
        return cls(
            num_frames=num_frames,
            max_frames=max_frames,
            owner_T=tables["owner_T"],
            place_T=tables["place_T"],
            is_kept_T=tables["is_kept_T"].bool(),
            sample_start_B=tables["sample_start_B"],
            num_samples_B=tables["num_samples_B"],
            num_frames_B=tables["num_frames_B"],
            token_slot_P=tables["token_slot_P"],
            tokens=SequenceLayout._from_tables(num_tokens, tables, "token_"),
            pooled=SequenceLayout._from_tables(num_pooled, tables, "pooled_"),
            pool_first_Q=tables["pool_first_Q"],
            pool_second_Q=tables["pool_second_Q"],
        )


_TABLE_NAMES = ("cu", "owner", "place")


def _tables(lengths: Sequence[int]) -> list[Tensor]:
    """Cumulative lengths [B + 1], owner and place of each packed element, int64 on the CPU."""
    lengths_B = torch.tensor(list(lengths), dtype=torch.int64)
    cu = torch.zeros(len(lengths_B) + 1, dtype=torch.int64)
    torch.cumsum(lengths_B, 0, out=cu[1:])
    owner = torch.repeat_interleave(torch.arange(len(lengths_B)), lengths_B)
    return [cu, owner, torch.arange(len(owner)) - cu[:-1][owner]]


def _ship(tables: dict[str, Tensor], device: torch.device | str) -> dict[str, Tensor]:
    """Move int64 tables to the device in one asynchronous copy."""
    flat = torch.cat(list(tables.values()))
    if torch.device(device).type == "cuda":
        flat = flat.pin_memory()
    moved = flat.to(device, non_blocking=True).split([len(table) for table in tables.values()])
    return dict(zip(tables, moved, strict=True))
