"""Who is a positive of whom in the global batch, worked out from int64 ids.

Each rank describes its part of the batch as `BatchIds`. The parts are exchanged as one integer vector a rank (`pack`,
`unpack`), every rank builds the same `Relations` from all of them, and takes its own rows as `LocalRelations`:

    parts = [BatchIds.unpack(vector) for vector in gathered_vectors]    # one a rank, in rank order
    local = Relations.build(parts).local(rank, device)
    term_NE = gathered_term_rows[local.first_copy_N]                    # a term held by several ranks: first copy wins
    term_UE = own_term_rows[local.own_term_rows_U]

Two ranks, first with clips {a: paris}, {b: paris, lyon}, second with {c: lyon, nice}, {d: no term}:
term rows [paris lyon | lyon nice] -> N = paris, lyon, nice; counts 2, 2, 1; rank 0 owns paris and lyon, rank 1 nice.

Everything here runs on the host, on small integers; only `local` puts masks on the device, without a device sync.

Shapes: B clips of this rank, G clips of all ranks, U unique terms owned by this rank, N unique terms of the global
batch, P (clip, term) pairs, I ignored pairs, Q (clip, group) pairs, K entries of a term bank.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import accumulate

import torch
from torch import Tensor

from losses.pairs import LocalPairs, LocalRelations, Pairs, equal_pairs, pair_mask, ship

NO_TEXT = 0  # text_key of a clip without text


@dataclass(frozen=True)
class BatchIds:
    """One rank's clips and terms as int64 vectors on the CPU. Raises ValueError where lengths do not fit together."""

    text_keys_B: Tensor  # equal keys = equal texts; NO_TEXT = the clip has none
    num_positives_B: Tensor  # positives per clip; 0 = a no-term clip
    positive_keys_P: Tensor  # their term keys, clip after clip
    num_cut_groups_B: Tensor  # variant groups of terms only partly inside the clip
    cut_groups_C: Tensor  # those groups, clip after clip
    term_keys_N: Tensor  # the terms that this rank embeds, in the order of its term rows
    term_groups_N: Tensor  # their variant groups (case, plural, punctuation, alias)

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if value.dtype != torch.int64 or value.dim() != 1:
                raise ValueError(f"{field.name} is {value.dtype} {tuple(value.shape)}; allowed: one-dimensional int64")
        num_clips = self.text_keys_B.numel()
        if not num_clips == self.num_positives_B.numel() == self.num_cut_groups_B.numel():
            raise ValueError(
                f"num_positives_B has {self.num_positives_B.numel()} and num_cut_groups_B "
                f"{self.num_cut_groups_B.numel()} entries; allowed: one for each of the {num_clips} clips"
            )
        for counts, values in (("num_positives_B", "positive_keys_P"), ("num_cut_groups_B", "cut_groups_C")):
            if int(getattr(self, counts).sum()) != getattr(self, values).numel():
                raise ValueError(f"{values} has {getattr(self, values).numel()} entries; allowed: sum of {counts}")
        if self.term_keys_N.numel() != self.term_groups_N.numel():
            raise ValueError(f"term_groups_N has {self.term_groups_N.numel()} entries; allowed: one a term")

    @classmethod
    def from_csr(
        cls,
        text_keys_B: Tensor,
        term_keys_N: Tensor,
        term_groups_N: Tensor,
        positive_indptr: Tensor,
        positive_indices: Tensor,
        cut_indptr: Tensor,
        cut_groups: Tensor,
    ) -> "BatchIds":
        """From a loader's CSR rows: `positive_indices` point into `term_keys_N`, `cut_groups` are group ids."""
        return cls(
            text_keys_B=text_keys_B.long(),
            num_positives_B=positive_indptr.long().diff(),
            positive_keys_P=term_keys_N.long()[positive_indices.long()],
            num_cut_groups_B=cut_indptr.long().diff(),
            cut_groups_C=cut_groups.long(),
            term_keys_N=term_keys_N.long(),
            term_groups_N=term_groups_N.long(),
        )

    def pack(self) -> Tensor:
        """One int64 vector: the length of each field, then the fields."""
        values = [getattr(self, field.name) for field in fields(self)]
        return torch.cat([torch.tensor([value.numel() for value in values]), *values])

    @classmethod
    def unpack(cls, packed: Tensor) -> "BatchIds":
        num_fields = len(fields(cls))
        lengths = packed[:num_fields].tolist()
        return cls(*packed[num_fields:].split(lengths))


@dataclass(frozen=True)
class Relations:
    """Relations of the global batch, sparse, on the CPU; the same on every rank."""

    clip_starts: list[int]  # clips of rank r: clip_starts[r] up to clip_starts[r + 1]
    term_row_starts: list[int]  # likewise its rows among the gathered term rows
    text_keys_G: Tensor
    term_keys_N: Tensor  # unique, in the order of their first copies
    first_copy_N: Tensor
    counts_N: Tensor  # m_j: clips of the global batch that carry term j
    positive_clip_P: Tensor
    positive_term_P: Tensor
    ignored_clip_I: Tensor
    ignored_term_I: Tensor
    clip_Q: Tensor
    group_Q: Tensor  # variant groups that concern a clip: of its positives and of its cut terms

    @classmethod
    def build(cls, parts: Sequence[BatchIds]) -> "Relations":
        """Raises ValueError when a clip's positive is not among the terms."""
        keys, num_positives, positive_keys = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("term_keys_N", "num_positives_B", "positive_keys_P")
        )
        groups, num_cut, cut_groups = (
            torch.cat([getattr(part, name) for part in parts])
            for name in ("term_groups_N", "num_cut_groups_B", "cut_groups_C")
        )
        first_copy_N = _first_copies(keys)
        term_keys_N, term_groups_N = keys[first_copy_N], groups[first_copy_N]
        num_terms = term_keys_N.numel()
        clip_ids_G = torch.arange(num_positives.numel())

        # Positive pairs. A term named twice by one clip is one pair.
        clip_P = clip_ids_G.repeat_interleave(num_positives)
        query, term_P = equal_pairs(positive_keys, term_keys_N)
        if query.numel() != positive_keys.numel():
            known = torch.zeros(positive_keys.numel(), dtype=torch.bool).index_fill_(0, query, True)
            clip = int(clip_P[~known][0])
            raise ValueError(
                f"positive_keys_P: {int((~known).sum())} keys, the first of clip {clip} of the global batch, are not "
                "in term_keys_N; every positive must be among the embedded terms"
            )
        pairs_P = torch.unique(clip_P * num_terms + term_P)
        clip_P, term_P = pairs_P // max(num_terms, 1), pairs_P % max(num_terms, 1)

        # Groups that concern a clip, then every term of those groups that is not itself a positive.
        clip_Q = torch.cat([clip_P, clip_ids_G.repeat_interleave(num_cut)])
        group_Q = torch.cat([term_groups_N[term_P], cut_groups])
        query, term_I = equal_pairs(group_Q, term_groups_N)
        pairs_I = torch.unique(clip_Q[query] * num_terms + term_I)
        pairs_I = pairs_I[~torch.isin(pairs_I, pairs_P)]

        return cls(
            clip_starts=list(accumulate((part.text_keys_B.numel() for part in parts), initial=0)),
            term_row_starts=list(accumulate((part.term_keys_N.numel() for part in parts), initial=0)),
            text_keys_G=torch.cat([part.text_keys_B for part in parts]),
            term_keys_N=term_keys_N,
            first_copy_N=first_copy_N,
            counts_N=torch.bincount(term_P, minlength=num_terms),
            positive_clip_P=clip_P,
            positive_term_P=term_P,
            ignored_clip_I=pairs_I // max(num_terms, 1),
            ignored_term_I=pairs_I % max(num_terms, 1),
            clip_Q=clip_Q,
            group_Q=group_Q,
        )

    @property
    def num_clips(self) -> int:
        return self.text_keys_G.numel()

    @property
    def num_terms(self) -> int:
        return self.term_keys_N.numel()

    @property
    def positives_GN(self) -> Tensor:
        return pair_mask(self.positive_clip_P, self.positive_term_P, self.num_clips, self.num_terms)

    @property
    def ignored_GN(self) -> Tensor:
        return pair_mask(self.ignored_clip_I, self.ignored_term_I, self.num_clips, self.num_terms)

    def clips_of(self, rank: int) -> range:
        return range(self.clip_starts[rank], self.clip_starts[rank + 1])

    def terms_of(self, rank: int) -> range:
        """Terms whose first copy the rank holds: one run, because first copies are in rank order."""
        bounds = torch.searchsorted(self.first_copy_N, torch.tensor(self.term_row_starts[rank : rank + 2]))
        return range(*bounds.tolist())

    def local(self, rank: int = 0, device: torch.device | str = "cpu") -> LocalRelations:
        """The rows of `rank` as dense masks. One process: rank 0 of a single part, whose rows are all rows."""
        return self.local_pairs(rank, device).dense()

    def local_pairs(self, rank: int = 0, device: torch.device | str = "cpu") -> LocalPairs:
        """The rows of `rank`, sparse."""
        clips, terms = self.clips_of(rank), self.terms_of(rank)
        num_positives_G = torch.bincount(self.positive_clip_P, minlength=self.num_clips)
        has_text_G, has_positive_G = self.text_keys_G != NO_TEXT, num_positives_G > 0
        own_first_copy_U = self.first_copy_N[terms.start : terms.stop]

        def share_of_mean(counts_G: Tensor, rows: range) -> Tensor:
            weight_G = counts_G.double() / max(int(counts_G.sum()), 1)
            return ship(weight_G[rows.start : rows.stop], device)

        _, text_id_G, num_same_text = torch.unique(self.text_keys_G, return_inverse=True, return_counts=True)
        m_P = self.counts_N[self.positive_term_P].double()
        total_G = torch.zeros(self.num_clips, dtype=torch.float64).index_add_(0, self.positive_clip_P, m_P)
        share_P = m_P / total_G[self.positive_clip_P]
        own_P = (self.positive_clip_P >= clips.start) & (self.positive_clip_P < clips.stop)
        return LocalPairs(
            first_clip=clips.start,
            first_term=terms.start,
            is_whole=len(self.clip_starts) == 2,
            text_id_G=ship(text_id_G.masked_fill(~has_text_G, -1).int(), device),
            num_same_text_G=ship(num_same_text[text_id_G].masked_fill(~has_text_G, 0), device),
            audio_text_weight_B=share_of_mean(has_text_G, clips),
            positives_BN=_own_rows(clips, self.positive_clip_P, self.positive_term_P).to(device),
            positive_share_P=ship(share_P[own_P], device),
            ignored_BN=_own_rows(clips, self.ignored_clip_I, self.ignored_term_I).to(device),
            audio_term_weight_B=share_of_mean(has_positive_G, clips),
            no_term_weight_B=share_of_mean(~has_positive_G, clips),
            positives_UG=_own_rows(terms, self.positive_term_P, self.positive_clip_P).to(device),
            ignored_UG=_own_rows(terms, self.ignored_term_I, self.ignored_clip_I).to(device),
            term_audio_weight_U=share_of_mean(self.counts_N, terms),
            # A term that no clip carries (a mined negative embedded with the batch) stands as one column.
            term_log_count_N=ship(self.counts_N.clamp(min=1).double().log(), device),
            first_copy_N=ship(self.first_copy_N, device),
            own_term_rows_U=ship(own_first_copy_U - self.term_row_starts[rank], device),
        )


def _own_rows(rows: range, row_ids: Tensor, column_ids: Tensor) -> Pairs:
    """The pairs of these rows, counted from the first of them."""
    mine = (row_ids >= rows.start) & (row_ids < rows.stop)
    row_P, order = row_ids[mine].sort(stable=True)
    return Pairs(row_P - rows.start, column_ids[mine][order])


def _first_copies(keys: Tensor) -> Tensor:
    """Ascending positions of the first occurrence of each distinct key."""
    unique, inverse = torch.unique(keys, return_inverse=True)
    first = torch.full((unique.numel(),), keys.numel())
    return first.scatter_reduce(0, inverse, torch.arange(keys.numel()), reduce="amin").sort().values
