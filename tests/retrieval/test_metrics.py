"""Metrics against ir-measures, scipy and a case worked out by hand."""

import itertools

import ir_measures
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ir_measures import RR, R, Success
from scipy.stats import mannwhitneyu

from retrieval.judgements import Judgements
from retrieval.metrics import KS, auroc, subset_metrics, summarise
from retrieval.ranks import ClipRanks, rank_positives
from tests.retrieval.cases import random_case


def measured_outside(scores_CN: torch.Tensor, judgements: Judgements, chosen_N: np.ndarray) -> dict[str, float]:
    """The same run and judgements through ir-measures; ignored terms are not in the run."""
    run: dict[str, dict[str, float]] = {}
    qrels: dict[str, dict[str, int]] = {}
    for clip, positives in enumerate(judgements.positives):
        wanted = {str(t): 1 for t in positives if chosen_N[t]}
        if wanted:
            qrels[str(clip)] = wanted
            left_out = set(judgements.ignored[clip]) - set(positives)
            run[str(clip)] = {str(t): float(s) for t, s in enumerate(scores_CN[clip]) if t not in left_out}
    measures = [RR, *(measure @ k for k in KS for measure in (R, Success))]
    return {str(m): v for m, v in ir_measures.calc_aggregate(measures, qrels, run).items()}


@pytest.mark.parametrize("seed", [0, 1])
def test_recall_hit_and_mrr_equal_ir_measures_on_every_subset(seed: int) -> None:
    scores_CN, judgements = random_case(seed)
    result = summarise(rank_positives(scores_CN, range(60), judgements), judgements.num_terms)
    everything = np.ones(40, dtype=bool)
    for subset, chosen_N in (("all", everything), ("seen", judgements.seen_N), ("unseen", ~judgements.seen_N)):
        outside, ours = measured_outside(scores_CN, judgements, chosen_N), result.subsets[subset]
        for k in KS:
            assert ours.recall[k] == pytest.approx(outside[f"R@{k}"], abs=1e-12)
            assert ours.hit[k] == pytest.approx(outside[f"Success@{k}"], abs=1e-12)
        assert ours.mrr == pytest.approx(outside["RR"], abs=1e-12)


def test_auroc_equals_scipy_with_ties() -> None:
    rng = np.random.default_rng(3)
    with_term, without = rng.integers(3, 9, 50).astype(float), rng.integers(0, 7, 31).astype(float)
    expected = mannwhitneyu(with_term, without).statistic / (50 * 31)
    assert auroc(with_term, without) == pytest.approx(expected, abs=1e-12)
    assert auroc(np.array([2.0]), np.array([1.0])) == 1.0
    with pytest.raises(ValueError, match=r"0 positives, 31 negatives; allowed: at least 1 of each"):
        auroc(np.empty(0), without)


def test_no_term_clips_are_told_apart_by_their_best_score() -> None:
    scores_CN, judgements = random_case(4)
    result = summarise(rank_positives(scores_CN, range(60), judgements), 40)
    kept_CN = scores_CN.clone()
    for clip, left_out in enumerate(judgements.ignored):
        kept_CN[clip, left_out] = -1.0
    best_C, no_term_C = kept_CN.amax(dim=1).numpy(), judgements.is_no_term_C
    assert result.num_no_term_clips == no_term_C.sum() == 9
    expected = mannwhitneyu(best_C[~no_term_C], best_C[no_term_C]).statistic / (51 * 9)
    assert result.no_term_auroc == pytest.approx(expected, abs=1e-12)


def test_worked_out_by_hand() -> None:
    judgements = Judgements.from_terms(
        ["a", "b", "c", "d"], [["a", "d"], ["b"], []], [["b"], [], []], seen_terms=["a", "b"]
    )
    scores_CN = torch.tensor([[0.5, 0.9, 0.7, 0.1], [0.1, 0.2, 0.3, 0.4], [0.0, 0.0, 0.6, 0.0]])
    ranks = rank_positives(scores_CN, [0, 1, 2], judgements)
    # Clip 0 leaves b out: c, a, d. Clip 1: d, c, b, a.
    assert ranks.rank_P.tolist() == [2, 3, 3]
    flat = summarise(ranks, 4, ks=(1, 2, 3)).flat()
    assert flat["eval/recall@1"] == 0
    assert flat["eval/recall@2"] == pytest.approx((0.5 + 0) / 2)
    assert flat["eval/recall@3"] == 1
    assert flat["eval/term_recall@2"] == pytest.approx(1 / 3)
    assert flat["eval/hit@2"] == 0.5
    assert flat["eval/mrr"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    assert flat["eval/recall@2_seen"] == 0.5  # a found, b not
    assert flat["eval/recall@2_unseen"] == 0  # d only, and clip 1 does not count
    assert (flat["eval/num_term_clips"], flat["eval/num_term_clips_unseen"], flat["eval/num_clips"]) == (2, 1, 3)
    assert flat["eval/no_term_auroc"] == pytest.approx(0.5)  # 0.7 above 0.6, 0.4 below


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 60), max_size=4), shuffle=st.randoms())
def test_parts_of_any_cut_in_any_order_give_the_same_numbers(seed: int, cuts: list[int], shuffle) -> None:  # type: ignore[no-untyped-def]
    scores_CN, judgements = random_case(seed)
    whole = summarise(rank_positives(scores_CN, range(60), judgements), 40).flat()
    clips = list(range(60))
    shuffle.shuffle(clips)
    edges = [0, *sorted(cuts), 60]
    spans = [clips[a:b] for a, b in itertools.pairwise(edges)]
    packed = [rank_positives(scores_CN[span], span, judgements).pack() for span in spans]
    shuffle.shuffle(packed)
    assert summarise(ClipRanks.unpack(np.concatenate(packed)), 40).flat() == whole


def test_an_absent_subset_is_absent_not_zero() -> None:
    judgements = Judgements.from_terms(["one", "two"], [["one"]], seen_terms=["one"])
    result = summarise(rank_positives(torch.tensor([[0.9, 0.1]]), [0], judgements), 2)
    assert "eval/recall@10_unseen" not in result.flat()
    assert result.no_term_auroc is None
    assert "eval/no_term_auroc" not in result.flat()
    assert result.recall(10) == 1.0
    with pytest.raises(ValueError, match="subset: 'unseen' has no clips here; allowed: all, seen"):
        result.recall(10, "unseen")
    with pytest.raises(ValueError, match=r"k: 7 was not measured; allowed: \[1, 5, 10, 20, 100\]"):
        result.recall(7)


def test_chosen_positives_are_those_of_a_subset() -> None:
    scores_CN, judgements = random_case(8)
    ranks = rank_positives(scores_CN, range(60), judgements)
    assert subset_metrics(ranks, ranks.seen_P) == summarise(ranks, 40).subsets["seen"]
