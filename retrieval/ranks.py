"""Where the right terms of each clip stand among all terms, found chunk by chunk of the glossary.

A term's place in a clip's ranking follows from one int64, its *rank key*: the fp32 score in the upper half (mapped so
that integers order as the floats do), and below it the place of the term's key in alphabetical order, counted down.

    score descending, then term key ascending    =    rank key descending, and no two keys are equal

So a rank is one more than the number of larger keys, the best terms are a plain top-k, and neither depends on how the
glossary was cut into chunks. A clip's ignored terms are not in its ranking at all.

What was found is kept per clip as integers and fp32 bits, so parts measured on different processes can be joined in any
order and give exactly the numbers of one process: `ClipRanks.pack` turns a part into int64 values for an all-gather.

Shapes: B clips of a batch, C clips, N terms of the glossary, K terms of a chunk, P positives of all clips one after
another, T best terms kept, S packed values.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from retrieval.judgements import Judgements

_LOW_32 = 0xFFFFFFFF
# Of a term that is not in the ranking: below the key of any finite score.
_ABSENT = (-0x7F800001) << 32
# Elements of the comparison table that ranks positives (128 MiB of int64).
_TABLE_ELEMENTS = 1 << 24


def rank_keys(scores_BK: Tensor, order_K: Tensor) -> Tensor:
    """int64 [B, K], larger = ranked earlier. Scores are taken in fp32; order_K: `Judgements.order_N` of the columns."""
    bits_BK = (scores_BK.float() + 0.0).view(torch.int32)  # + 0.0 makes -0.0 the same as 0.0, and a copy
    bits_BK ^= (bits_BK >> 31) & 0x7FFFFFFF  # negative floats: larger bits, smaller number
    keys_BK = bits_BK.long()
    keys_BK <<= 32
    keys_BK += _LOW_32 - order_K
    return keys_BK


def scores_of(keys: Tensor) -> Tensor:
    """The fp32 scores that `rank_keys` was given, bit for bit; -inf for a term that is absent."""
    monotone = (keys >> 32).to(torch.int32)
    return torch.where(monotone < 0, monotone ^ 0x7FFFFFFF, monotone).view(torch.float32)


def places_of(keys: Tensor, by_order_N: Tensor) -> Tensor:
    """The places in the glossary of the terms that have these keys; -1 for absent ones."""
    is_absent = keys <= _ABSENT
    order = torch.where(is_absent, 0, _LOW_32 - (keys & _LOW_32))
    return torch.where(is_absent, -1, by_order_N[order])


def best_keys(keys_BK: Tensor, num_top: int) -> Tensor:
    """The `num_top` largest keys of each row, descending; absent keys where there are fewer columns."""
    best_BT = keys_BK.topk(min(num_top, keys_BK.shape[1]), dim=1).values
    return torch.nn.functional.pad(best_BT, (0, num_top - best_BT.shape[1]), value=_ABSENT)


@dataclass(frozen=True)
class ClipRanks:
    """The measured facts of some clips: arrays of one entry a clip (C) or a positive (P, clip after clip)."""

    clip_C: NDArray[np.int64]
    is_no_term_C: NDArray[np.bool_]
    num_positives_C: NDArray[np.int64]
    top_score_CT: NDArray[np.float32]
    """Scores (cosine) of the best terms of the clip's ranking, descending; -inf where there are fewer."""
    top_place_CT: NDArray[np.int64]
    """Their places in the glossary; -1 where there are fewer."""
    rank_P: NDArray[np.int64]
    """1-based."""
    score_P: NDArray[np.float32]
    place_P: NDArray[np.int64]
    seen_P: NDArray[np.bool_]

    @property
    def num_clips(self) -> int:
        return len(self.clip_C)

    @property
    def num_top(self) -> int:
        """T: how many of the best terms were kept."""
        return self.top_score_CT.shape[1]

    @property
    def top_C(self) -> NDArray[np.float64]:
        """Best score over the clip's ranking."""
        return self.top_score_CT[:, 0].astype(np.float64)

    @property
    def row_P(self) -> NDArray[np.int64]:
        """The row of each positive's clip in the arrays of one entry a clip."""
        return np.repeat(np.arange(self.num_clips), self.num_positives_C)

    @property
    def is_right_CT(self) -> NDArray[np.bool_]:
        """Which of the best terms are positives: one of rank r stands in column r - 1."""
        right_CT = np.zeros(self.top_score_CT.shape, dtype=np.bool_)
        is_kept_P = self.rank_P <= self.num_top
        right_CT[self.row_P[is_kept_P], self.rank_P[is_kept_P] - 1] = True
        return right_CT

    def pack(self) -> NDArray[np.int64]:
        """All facts as one int64 [S] vector. Packed parts put one after another unpack as their union."""
        head = np.array([self.num_clips, len(self.rank_P), self.num_top], dtype=np.int64)
        return np.concatenate([head, *(_as_int64(column) for column in vars(self).values())])

    @classmethod
    def unpack(cls, packed_S: NDArray[np.int64]) -> Self:
        """Inverse of `pack`, for any number of packed parts one after another, in any order."""
        parts, at = [], 0
        while at < len(packed_S):
            num_clips, num_positives, num_top = (int(n) for n in packed_S[at : at + 3])
            sizes = [num_clips] * 3 + [num_clips * num_top] * 2 + [num_positives] * 4
            ends = at + 3 + np.cumsum(sizes)
            assert ends[-1] <= len(packed_S), (ends[-1], len(packed_S))
            clip, no_term, count, score, place, *rest = (packed_S[e - n : e] for e, n in zip(ends, sizes, strict=True))
            shape = (num_clips, num_top)
            parts.append(
                cls(
                    clip,
                    no_term.astype(np.bool_),
                    count,
                    _as_float32(score).reshape(shape),
                    place.reshape(shape),
                    rest[0],
                    _as_float32(rest[1]),
                    rest[2],
                    rest[3].astype(np.bool_),
                )
            )
            at = int(ends[-1])
        return cls.join(parts)

    @classmethod
    def join(cls, parts: Sequence[Self]) -> Self:
        """Parts of disjoint clips as one, in ascending order of clips.

        Raises:
            ValueError: a clip is in two parts.
        """
        parts = parts or [cls.empty()]
        assert len({part.num_top for part in parts}) == 1, [part.num_top for part in parts]
        columns = {name: np.concatenate([vars(part)[name] for part in parts]) for name in vars(parts[0])}
        joined = cls(**columns)
        twice = joined.num_clips - np.unique(joined.clip_C).size
        if twice:
            raise ValueError(f"parts: {twice} clips were measured more than once; allowed: each clip on one process")
        by_clip_C = np.argsort(joined.clip_C)
        by_clip_P = np.argsort(joined.clip_C[joined.row_P], kind="stable")
        return cls(**{name: c[by_clip_P if name.endswith("_P") else by_clip_C] for name, c in columns.items()})

    @classmethod
    def empty(cls, num_top: int = 1) -> Self:
        no_ints, no_bools = np.empty(0, np.int64), np.empty(0, np.bool_)
        return cls(
            no_ints, no_bools, no_ints, np.empty((0, num_top), np.float32), np.empty((0, num_top), np.int64),
            no_ints, np.empty(0, np.float32), no_ints, no_bools,
        )  # fmt: skip


class Ranker:
    """Ranks some clips against a glossary that comes in chunks of columns. Runs on the scores' device.

    First `note_positives` with the chunks that hold positives, then `add` with each chunk once. `ranks` may be asked
    for in between: it is the ranking among the terms added so far, all positives of the clips included.
    """

    def __init__(
        self, clips: Sequence[int], judgements: Judgements, num_top: int = 1, device: torch.device | str = "cpu"
    ) -> None:
        assert num_top >= 1, num_top
        self.clips, self.judgements = list(clips), judgements
        positives = [judgements.positives[c] for c in clips]
        ignored = [sorted(set(judgements.ignored[c]) - set(judgements.positives[c])) for c in clips]
        self._num_positives_B = np.array([len(terms) for terms in positives], dtype=np.int64)
        row_P = torch.from_numpy(np.repeat(np.arange(len(clips)), self._num_positives_B))
        self._place_P = torch.tensor([t for terms in positives for t in terms], dtype=torch.long)
        self._row_P = row_P.to(device)
        rows = torch.tensor([row for row, terms in enumerate(ignored) for _ in terms], dtype=torch.long)
        places = torch.tensor([t for terms in ignored for t in terms], dtype=torch.long)
        by_place = places.argsort()
        self._ignored_rows, self._ignored_places = rows[by_place], places[by_place]
        self._order_N = torch.from_numpy(judgements.order_N)
        self._own_P = torch.full((len(row_P),), _ABSENT, device=device)
        self._num_before_P = torch.zeros(len(row_P), dtype=torch.long, device=device)
        self._top_BT = torch.full((len(clips), num_top), _ABSENT, device=device)

    def note_positives(self, scores_BK: Tensor, first_term: int) -> None:
        """Remember the keys of those positives that lie in these columns."""
        keys_BK = self._keys(scores_BK, first_term)
        column_P = self._place_P - first_term
        here_P = ((column_P >= 0) & (column_P < keys_BK.shape[1])).nonzero()[:, 0]
        columns, here_P = column_P[here_P].to(keys_BK.device), here_P.to(keys_BK.device)
        self._own_P[here_P] = keys_BK[self._row_P[here_P], columns]

    def add(self, scores_BK: Tensor, first_term: int) -> None:
        """Count the terms first_term, first_term + 1, ... with their scores (float, finite).

        Raises:
            ValueError: wrong shape, or a score that is not finite.
        """
        assert bool((self._own_P > _ABSENT).all()), "note_positives comes before add, with all chunks of positives"
        keys_BK = self._keys(scores_BK, first_term)
        num_top = self._top_BT.shape[1]
        self._top_BT = best_keys(torch.cat([self._top_BT, best_keys(keys_BK, num_top)], dim=1), num_top)
        step = max(1, _TABLE_ELEMENTS // max(1, keys_BK.shape[1]))
        for part in range(0, len(self._row_P), step):
            rows_p, own_p = self._row_P[part : part + step], self._own_P[part : part + step]
            self._num_before_P[part : part + step] += (keys_BK[rows_p] > own_p[:, None]).sum(dim=1)

    def ranks(self) -> ClipRanks:
        """The facts of these clips, as of the terms added so far."""
        clip_C = np.array(self.clips, dtype=np.int64)
        by_order_N = torch.from_numpy(self.judgements.by_order_N)
        top_BT, own_P, place_P = self._top_BT.cpu(), self._own_P.cpu(), self._place_P.numpy()
        return ClipRanks(
            clip_C,
            self.judgements.is_no_term_C[clip_C],
            self._num_positives_B,
            scores_of(top_BT).numpy(),
            places_of(top_BT, by_order_N).numpy(),
            (self._num_before_P + 1).cpu().numpy(),
            scores_of(own_P).numpy(),
            place_P,
            self.judgements.seen_N[place_P],
        )

    def _keys(self, scores_BK: Tensor, first_term: int) -> Tensor:
        num_clips, stop = len(self.clips), first_term + scores_BK.shape[-1]
        if scores_BK.ndim != 2 or len(scores_BK) != num_clips or stop > self.judgements.num_terms:
            allowed = f"({num_clips}, up to {self.judgements.num_terms - first_term})"
            raise ValueError(f"scores_BK: shape {tuple(scores_BK.shape)}; allowed: {allowed} (clips, terms)")
        if not bool(torch.isfinite(scores_BK).all()):
            raise ValueError("scores_BK: holds NaN or infinity; the embeddings that they come from are broken")
        keys_BK = rank_keys(scores_BK, self._order_N[first_term:stop].to(scores_BK.device))
        low, high = torch.searchsorted(self._ignored_places, torch.tensor([first_term, stop])).tolist()
        if high > low:
            rows = self._ignored_rows[low:high].to(keys_BK.device)
            keys_BK[rows, (self._ignored_places[low:high] - first_term).to(keys_BK.device)] = _ABSENT
        return keys_BK


def rank_positives(scores_CN: Tensor, clips: Sequence[int], judgements: Judgements, num_top: int = 1) -> ClipRanks:
    """Rank the positives of some clips, given their scores against the whole glossary at once.

    Args:
        scores_CN: float, one row for each entry of `clips`, one column for each term of the glossary.
        clips: which clips of `judgements` the rows are.
    """
    if tuple(scores_CN.shape) != (len(clips), judgements.num_terms):
        allowed = (len(clips), judgements.num_terms)
        raise ValueError(f"scores_CN: shape {tuple(scores_CN.shape)}; allowed: {allowed} (clips, terms)")
    ranker = Ranker(clips, judgements, num_top, scores_CN.device)
    if scores_CN.numel():
        ranker.note_positives(scores_CN, 0)
        ranker.add(scores_CN, 0)
    return ranker.ranks()


def _as_int64(column: NDArray) -> NDArray[np.int64]:
    """Floats travel as their bits: nothing is rounded on the way."""
    if column.dtype == np.float32:
        column = np.ascontiguousarray(column).view(np.int32)
    return column.astype(np.int64).ravel()


def _as_float32(bits: NDArray[np.int64]) -> NDArray[np.float32]:
    return np.ascontiguousarray(bits.astype(np.int32)).view(np.float32)
