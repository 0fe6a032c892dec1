"""Who is a positive of whom for the rows of one rank: as pairs (for the tiled losses), and as dense masks made of them.

Pairs grow with the batch, masks with its square: at 32,768 clips and as many terms a mask is a gigabyte.

Shapes: B clips of this rank, G of all ranks, U unique terms owned by this rank, N of all ranks, P pairs.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class Pairs(NamedTuple):
    """(row, column) places, int64, in any order. A row of -1 is padding and stands for nothing
    (where there is a row and a column at all)."""

    row_P: Tensor
    col_P: Tensor

    def to(self, device: torch.device | str) -> "Pairs":
        return Pairs(*ship(torch.stack(self), device).unbind())


@dataclass(frozen=True)
class LocalRelations:
    """The rows of one rank against the columns of all, dense, on the device. Masks are bool, weights float64.

    Row weights are shares of the global mean: they sum to 1 over the rows of all ranks (or to 0, if none counts).
    """

    same_text_BG: Tensor  # clip's text equals column's text
    textless_G: Tensor
    audio_text_weight_B: Tensor  # 1 / number of clips with a text
    positives_BN: Tensor
    ignored_BN: Tensor
    audio_term_weight_B: Tensor  # 1 / number of clips with a positive
    no_term_weight_B: Tensor  # 1 / number of clips without any
    positives_UG: Tensor
    ignored_UG: Tensor
    term_audio_weight_U: Tensor  # m_j / sum of m
    term_log_count_N: Tensor  # log m_j
    first_copy_N: Tensor  # index of term j among the gathered term rows
    own_term_rows_U: Tensor  # index of the owned terms among this rank's own term rows


@dataclass(frozen=True)
class LocalPairs:
    """What `LocalRelations` says, in as many numbers as there are clips, terms and pairs. On the device; the rows of
    this rank start at `first_clip` and `first_term` among those of all."""

    first_clip: int
    first_term: int
    is_whole: bool  # this rank holds all rows there are
    text_id_G: Tensor  # int32, equal = equal texts, below G; -1: no text
    num_same_text_G: Tensor  # clips with the same text, itself included; 0 without text
    audio_text_weight_B: Tensor
    positives_BN: Pairs
    positive_share_P: Tensor  # of the pairs of positives_BN: m_j / sum of m over the clip's positives
    ignored_BN: Pairs
    audio_term_weight_B: Tensor
    no_term_weight_B: Tensor
    positives_UG: Pairs
    ignored_UG: Pairs
    term_audio_weight_U: Tensor
    term_log_count_N: Tensor
    first_copy_N: Tensor
    own_term_rows_U: Tensor

    @property
    def text_id_B(self) -> Tensor:
        return self.text_id_G[self.first_clip : self.first_clip + self.audio_text_weight_B.numel()]

    def dense(self) -> LocalRelations:
        """The same as masks."""
        num_clips, num_terms = self.text_id_G.numel(), self.term_log_count_N.numel()
        num_own_clips, num_own_terms = self.audio_text_weight_B.numel(), self.term_audio_weight_U.numel()

        def mask(pairs: Pairs, num_rows: int, num_cols: int) -> Tensor:
            return pair_mask(*pairs, num_rows, num_cols, self.text_id_G.device)

        text_id_B1 = self.text_id_B[:, None]
        return LocalRelations(
            same_text_BG=(text_id_B1 == self.text_id_G[None, :]) & (text_id_B1 >= 0),
            textless_G=self.text_id_G < 0,
            audio_text_weight_B=self.audio_text_weight_B,
            positives_BN=mask(self.positives_BN, num_own_clips, num_terms),
            ignored_BN=mask(self.ignored_BN, num_own_clips, num_terms),
            audio_term_weight_B=self.audio_term_weight_B,
            no_term_weight_B=self.no_term_weight_B,
            positives_UG=mask(self.positives_UG, num_own_terms, num_clips),
            ignored_UG=mask(self.ignored_UG, num_own_terms, num_clips),
            term_audio_weight_U=self.term_audio_weight_U,
            term_log_count_N=self.term_log_count_N,
            first_copy_N=self.first_copy_N,
            own_term_rows_U=self.own_term_rows_U,
        )


@dataclass(frozen=True)
class SortedKeys:
    """int64 keys that are asked for again and again: sorting a million takes longer than a step should."""

    keys: Tensor
    order: Tensor

    @classmethod
    def of(cls, keys: Tensor) -> "SortedKeys":
        return cls(*keys.sort(stable=True))

    def matches(self, queries: Tensor) -> tuple[Tensor, Tensor]:
        """All (i, j) with queries[i] == keys[j] (as given, unsorted), as two int64 vectors ordered by i."""
        first = torch.searchsorted(self.keys, queries)
        num_matches = torch.searchsorted(self.keys, queries, right=True) - first
        query = torch.arange(queries.numel()).repeat_interleave(num_matches)
        within = torch.arange(query.numel()) - (num_matches.cumsum(0) - num_matches).repeat_interleave(num_matches)
        return query, self.order[first.repeat_interleave(num_matches) + within]


def equal_pairs(queries: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """All (i, j) with queries[i] == keys[j], as two int64 vectors ordered by i: a sort-merge join."""
    return SortedKeys.of(keys).matches(queries)


def pair_mask(
    row_ids: Tensor, column_ids: Tensor, num_rows: int, num_columns: int, device: torch.device | str = "cpu"
) -> Tensor:
    """bool [num_rows, num_columns], true at the given pairs. Only the pairs travel to the device."""
    mask = torch.zeros(num_rows * num_columns, dtype=torch.bool, device=device)
    flat = ship(row_ids * num_columns + column_ids, device)
    return mask.index_fill_(0, flat, True).view(num_rows, num_columns)


def ship(table: Tensor, device: torch.device | str) -> Tensor:
    """A CPU tensor on the device. Pinned first, as the host waits for the device's queue when it sends other memory."""
    if torch.device(device).type == "cuda" and not table.is_cuda:
        table = table.pin_memory()
    return table.to(device, non_blocking=True)
