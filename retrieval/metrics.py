"""How well clips find their terms: Recall@k, hit@k, reciprocal rank, and how well a clip without terms is told apart.

Everything is derived from two facts about a clip: the 1-based rank of each of its positives in the whole glossary, and
its best score. Ranks are integers and are kept per clip, so parts measured on different processes can be joined in any
order and give exactly the numbers of one process: `ClipRanks.pack` turns a part into int64 values for an all-gather.

Definitions (those of trec_eval where it has one: recall.k, success.k, recip_rank):
  ranking         score descending, then term key ascending; a clip's ignored terms are not in its ranking at all
  recall@k        mean over clips with a positive of |positives in the first k| / |positives|      (sample macro)
  term_recall@k   |positives in the first k| / |positives|, both summed over all clips              (term micro)
  hit@k           share of clips with at least one positive in the first k
  mrr             mean over clips of 1 / rank of the best positive
  seen, unseen    the same with only the positives that occur, or do not occur, in training; a clip without such a
                  positive is not counted; the ranking stays that of the full glossary
  no_term_auroc   probability that a random term clip's best score is above a random no-term clip's, ties one half
                  (the Mann-Whitney U statistic over the number of pairs)

Shapes: C clips, N terms of the glossary, P positives of all clips one after another, S packed values.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

SUBSETS = ("all", "seen", "unseen")
KS = (1, 5, 10)

# Elements of the comparison table that ranks positives (64 MiB in fp32).
_TABLE_ELEMENTS = 1 << 24


@dataclass(frozen=True)
class Judgements:
    """What is right for each clip, in places of the glossary.

    A term that a clip names both as positive and as ignored (a variant of its own term) counts as positive.
    """

    positives: list[list[int]]
    ignored: list[list[int]]
    is_no_term_C: NDArray[np.bool_]
    seen_N: NDArray[np.bool_]
    order_N: NDArray[np.int64]
    """Place of each term when the term keys are sorted: what breaks ties."""

    @property
    def num_clips(self) -> int:
        return len(self.positives)

    @property
    def num_terms(self) -> int:
        return len(self.seen_N)

    @classmethod
    def from_terms(
        cls,
        term_keys: Sequence[str],
        clip_terms: Sequence[Iterable[str]],
        clip_ignored: Sequence[Iterable[str]] | None = None,
        is_no_term: Sequence[bool] | None = None,
        seen_terms: Iterable[str] = (),
    ) -> "Judgements":
        """Look terms up in the glossary.

        Args:
            term_keys: the glossary's N distinct normalised terms, in the order of the term embeddings.
            clip_terms: the normalised terms of each clip.
            clip_ignored: terms that are neither right nor wrong for the clip; those outside the glossary do not matter.
            is_no_term: which clips name no term at all; when not given, those with neither terms nor ignored terms.
            seen_terms: normalised terms that occur in training.

        Raises:
            ValueError: a term occurs twice in the glossary, a clip's term is not in it, or lengths differ.
        """
        place = {key: i for i, key in enumerate(term_keys)}
        if len(place) != len(term_keys):
            raise ValueError(f"term_keys: {len(term_keys) - len(place)} terms occur more than once; allowed: distinct")
        missing = sorted({term for terms in clip_terms for term in terms if term not in place})
        if missing:
            raise ValueError(
                f"clip_terms: {len(missing)} terms are not in the glossary of {len(place)}, for example {missing[:5]}; "
                "add them to the glossary or take them out of the clips"
            )
        num_clips = len(clip_terms)
        no_ignored: list[Iterable[str]] = [() for _ in range(num_clips)]
        ignored_terms = no_ignored if clip_ignored is None else clip_ignored
        positives = [sorted({place[term] for term in terms}) for terms in clip_terms]
        ignored = [sorted({place[term] for term in terms if term in place}) for terms in ignored_terms]
        if len(ignored) != num_clips:
            raise ValueError(f"clip_ignored: {len(ignored)} entries for {num_clips} clips; allowed: one a clip")
        if is_no_term is None:
            is_no_term = [not p and not list(i) for p, i in zip(positives, ignored_terms, strict=True)]
        if len(is_no_term) != num_clips:
            raise ValueError(f"is_no_term: {len(is_no_term)} entries for {num_clips} clips; allowed: one a clip")
        contradicting = [i for i, no_term in enumerate(is_no_term) if no_term and positives[i]]
        if contradicting:
            raise ValueError(f"is_no_term: clips {contradicting[:5]} are marked no-term and have terms")
        seen = set(seen_terms)
        order_N = np.empty(len(place), dtype=np.int64)
        order_N[sorted(range(len(place)), key=lambda i: term_keys[i])] = np.arange(len(place))
        return cls(
            positives,
            ignored,
            np.array(is_no_term, dtype=np.bool_),
            np.array([key in seen for key in term_keys], dtype=np.bool_),
            order_N,
        )


@dataclass(frozen=True)
class ClipRanks:
    """The measured facts of some clips. Arrays of one entry a clip (C) or a positive (P, clip after clip)."""

    clip_C: NDArray[np.int64]
    top_C: NDArray[np.float64]
    """Best score over the clip's ranking (cosine)."""
    is_no_term_C: NDArray[np.bool_]
    num_positives_C: NDArray[np.int64]
    rank_P: NDArray[np.int64]
    """1-based."""
    seen_P: NDArray[np.bool_]

    def pack(self) -> NDArray[np.int64]:
        """All facts as one int64 [S] vector. Packed parts put one after another unpack as their union."""
        head = np.array([len(self.clip_C), len(self.rank_P)], dtype=np.int64)
        top_bits_C = self.top_C.astype(np.float64).view(np.int64)  # the bits themselves: nothing is rounded on the way
        columns = (self.clip_C, top_bits_C, self.is_no_term_C, self.num_positives_C, self.rank_P, self.seen_P)
        return np.concatenate([head, *(column.astype(np.int64) for column in columns)])

    @classmethod
    def unpack(cls, packed_S: NDArray[np.int64]) -> "ClipRanks":
        """Inverse of `pack`, for any number of packed parts one after another, in any order."""
        parts, at = [], 0
        while at < len(packed_S):
            num_clips, num_positives = int(packed_S[at]), int(packed_S[at + 1])
            sizes = [num_clips] * 4 + [num_positives] * 2
            ends = at + 2 + np.cumsum(sizes)
            assert ends[-1] <= len(packed_S), (ends[-1], len(packed_S))
            clip, bits, no_term, count, rank, seen = (packed_S[e - n : e] for e, n in zip(ends, sizes, strict=True))
            top = np.ascontiguousarray(bits).view(np.float64)
            parts.append(cls(clip, top, no_term.astype(np.bool_), count, rank, seen.astype(np.bool_)))
            at = int(ends[-1])
        return cls.join(parts)

    @classmethod
    def join(cls, parts: Sequence["ClipRanks"]) -> "ClipRanks":
        """The parts' clips, sorted by clip. Raises ValueError for a clip that occurs in two parts."""
        clip_C = np.concatenate([np.empty(0, np.int64), *(p.clip_C for p in parts)])
        count_C = np.concatenate([np.empty(0, np.int64), *(p.num_positives_C for p in parts)])
        rank_P = np.concatenate([np.empty(0, np.int64), *(p.rank_P for p in parts)])
        seen_P = np.concatenate([np.empty(0, np.bool_), *(p.seen_P for p in parts)])
        top_C = np.concatenate([np.empty(0, np.float64), *(p.top_C for p in parts)])
        no_term_C = np.concatenate([np.empty(0, np.bool_), *(p.is_no_term_C for p in parts)])
        twice = clip_C.size - np.unique(clip_C).size
        if twice:
            raise ValueError(f"parts: {twice} clips were measured more than once; allowed: each clip on one process")
        by_clip_C = np.argsort(clip_C)
        clip_of_P = np.repeat(clip_C, count_C)
        by_clip_P = np.argsort(clip_of_P, kind="stable")
        return cls(
            clip_C[by_clip_C],
            top_C[by_clip_C],
            no_term_C[by_clip_C],
            count_C[by_clip_C],
            rank_P[by_clip_P],
            seen_P[by_clip_P],
        )


def rank_positives(scores_CN: torch.Tensor, clips: Sequence[int], judgements: Judgements) -> ClipRanks:
    """Rank the positives of some clips.

    No sort is needed: a positive's rank is one more than the number of terms before it. Runs on the scores' device.

    Args:
        scores_CN: float, one row for each entry of `clips`, one column for each term of the glossary.
        clips: which clips of `judgements` the rows are.

    Raises:
        ValueError: wrong shape, or a score that is not finite.
    """
    if tuple(scores_CN.shape) != (len(clips), judgements.num_terms):
        allowed = (len(clips), judgements.num_terms)
        raise ValueError(f"scores_CN: shape {tuple(scores_CN.shape)}; allowed: {allowed} (clips, terms)")
    if not bool(torch.isfinite(scores_CN).all()):
        raise ValueError("scores_CN: holds NaN or infinity; the embeddings that they come from are broken")
    device = scores_CN.device
    positives = [judgements.positives[c] for c in clips]
    ignored = [sorted(set(judgements.ignored[c]) - set(judgements.positives[c])) for c in clips]

    ranked_CN = scores_CN.clone()
    ignored_rows = torch.tensor([i for i, terms in enumerate(ignored) for _ in terms], dtype=torch.long, device=device)
    ignored_cols = torch.tensor([t for terms in ignored for t in terms], dtype=torch.long, device=device)
    ranked_CN[ignored_rows, ignored_cols] = -math.inf  # scores are finite, so these come before nothing

    num_positives_C = np.array([len(terms) for terms in positives], dtype=np.int64)
    row_P = torch.from_numpy(np.repeat(np.arange(len(clips)), num_positives_C)).to(device)
    col_P = torch.tensor([t for terms in positives for t in terms], dtype=torch.long, device=device)
    order_N = torch.from_numpy(judgements.order_N).to(device)
    step = max(1, _TABLE_ELEMENTS // max(1, judgements.num_terms))
    ranks = [torch.empty(0, dtype=torch.long, device=device)]
    for row_p, col_p in zip(row_P.split(step), col_P.split(step), strict=True):
        table_PN = ranked_CN[row_p]
        own_P1 = table_PN.gather(1, col_p[:, None])
        first_in_tie_PN = (table_PN == own_P1) & (order_N < order_N[col_p][:, None])
        ranks.append(1 + ((table_PN > own_P1) | first_in_tie_PN).sum(dim=1))
    top_C = ranked_CN.amax(dim=1) if judgements.num_terms else ranked_CN.new_full((len(clips),), -math.inf)

    clip_C = np.array(clips, dtype=np.int64)
    return ClipRanks(
        clip_C,
        top_C.double().cpu().numpy(),
        judgements.is_no_term_C[clip_C],
        num_positives_C,
        torch.cat(ranks).cpu().numpy(),
        judgements.seen_N[col_P.cpu().numpy()],
    )


@dataclass(frozen=True)
class SubsetMetrics:
    """Metrics over the positives of one subset. All shares lie in [0, 1]."""

    num_clips: int
    num_positives: int
    recall: dict[int, float]
    term_recall: dict[int, float]
    hit: dict[int, float]
    mrr: float


@dataclass(frozen=True)
class EvalResult:
    """Metrics of one evaluation. A subset without a clip is absent from `subsets`, never reported as 0."""

    num_clips: int
    num_no_term_clips: int
    num_terms: int
    no_term_auroc: float | None
    """None when there are no term clips or no no-term clips to tell apart."""
    subsets: dict[str, SubsetMetrics] = field(default_factory=dict)

    def recall(self, k: int, subset: str = "all") -> float:
        """Recall@k of a subset. Raises ValueError when no clip has a positive of that subset, or k was not measured."""
        if subset not in self.subsets:
            raise ValueError(f"subset: {subset!r} has no clips here; allowed: {', '.join(self.subsets) or 'none'}")
        if k not in self.subsets[subset].recall:
            raise ValueError(f"k: {k} was not measured; allowed: {sorted(self.subsets[subset].recall)}")
        return self.subsets[subset].recall[k]

    def to_json(self) -> dict[str, Any]:
        """Strict JSON; JSON keys are strings, so `from_json` makes the k of recall@k integers again."""
        return asdict(self)

    @classmethod
    def from_json(cls, saved: dict[str, Any]) -> "EvalResult":
        by_k = ("recall", "term_recall", "hit")
        subsets = {
            name: SubsetMetrics(**{**one, **{field: {int(k): v for k, v in one[field].items()} for field in by_k}})
            for name, one in saved["subsets"].items()
        }
        return cls(**{**saved, "subsets": subsets})

    def flat(self, prefix: str = "eval/") -> dict[str, float | int]:
        """Slash-keyed numbers for metrics.jsonl: `eval/recall@10`, `eval/recall@10_seen`, `eval/mrr`, ..."""
        numbers: dict[str, float | int] = {
            f"{prefix}num_clips": self.num_clips,
            f"{prefix}num_no_term_clips": self.num_no_term_clips,
            f"{prefix}num_terms": self.num_terms,
        }
        for name, metrics in self.subsets.items():
            suffix = "" if name == "all" else f"_{name}"
            for k in metrics.recall:
                numbers[f"{prefix}recall@{k}{suffix}"] = metrics.recall[k]
                numbers[f"{prefix}term_recall@{k}{suffix}"] = metrics.term_recall[k]
                numbers[f"{prefix}hit@{k}{suffix}"] = metrics.hit[k]
            numbers[f"{prefix}mrr{suffix}"] = metrics.mrr
            numbers[f"{prefix}num_term_clips{suffix}"] = metrics.num_clips
            numbers[f"{prefix}num_positives{suffix}"] = metrics.num_positives
        if self.no_term_auroc is not None:
            numbers[f"{prefix}no_term_auroc"] = self.no_term_auroc
        return numbers


def auroc(positive_A: NDArray[np.float64], negative_B: NDArray[np.float64]) -> float:
    """P(positive > negative) + P(equal) / 2 over all pairs; counted in integers, so exact. Raises on an empty side."""
    if not len(positive_A) or not len(negative_B):
        raise ValueError(
            f"auroc: {len(positive_A)} positives, {len(negative_B)} negatives; allowed: at least 1 of each"
        )
    sorted_B = np.sort(negative_B)
    below = int(np.searchsorted(sorted_B, positive_A, side="left").sum())
    below_or_equal = int(np.searchsorted(sorted_B, positive_A, side="right").sum())
    return (below + below_or_equal) / (2 * len(positive_A) * len(negative_B))


def summarise(ranks: ClipRanks, num_terms: int, ks: Sequence[int] = KS) -> EvalResult:
    """Metrics of all clips. `ranks` must hold each clip once, as `ClipRanks.join` and `unpack` make sure."""
    row_P = np.repeat(np.arange(len(ranks.clip_C)), ranks.num_positives_C)
    subsets = {}
    for name, chosen_P in zip(SUBSETS, (np.ones_like(ranks.seen_P), ranks.seen_P, ~ranks.seen_P), strict=True):
        if chosen_P.any():
            subsets[name] = _subset_metrics(row_P[chosen_P], ranks.rank_P[chosen_P], ks)
    with_term = ranks.top_C[ranks.num_positives_C > 0]
    without_term = ranks.top_C[ranks.is_no_term_C]
    return EvalResult(
        num_clips=len(ranks.clip_C),
        num_no_term_clips=len(without_term),
        num_terms=num_terms,
        no_term_auroc=auroc(with_term, without_term) if len(with_term) and len(without_term) else None,
        subsets=subsets,
    )


def _subset_metrics(row_P: NDArray[np.int64], rank_P: NDArray[np.int64], ks: Sequence[int]) -> SubsetMetrics:
    _, clip_P = np.unique(row_P, return_inverse=True)
    num_positives_C = np.bincount(clip_P)
    best_C = np.full(len(num_positives_C), np.iinfo(np.int64).max)
    np.minimum.at(best_C, clip_P, rank_P)
    num_clips = len(num_positives_C)
    found = {k: np.bincount(clip_P, weights=rank_P <= k, minlength=num_clips) for k in ks}
    # fsum is correctly rounded, so a mean does not depend on how clips were spread or in what order they came.
    return SubsetMetrics(
        num_clips=num_clips,
        num_positives=len(rank_P),
        recall={k: math.fsum(found[k] / num_positives_C) / num_clips for k in ks},
        term_recall={k: int((rank_P <= k).sum()) / len(rank_P) for k in ks},
        hit={k: int((best_C <= k).sum()) / num_clips for k in ks},
        mrr=math.fsum(1.0 / best_C) / num_clips,
    )
