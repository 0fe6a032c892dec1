"""Bootstrap intervals against scipy, and their point estimates against the metrics themselves."""

import numpy as np
import pytest
import scipy.stats

from retrieval.judgements import Judgements
from retrieval.metrics import summarise
from retrieval.ranks import ClipRanks, rank_positives
from retrieval.significance import bootstrap, bootstrap_auroc, metric_ratios
from tests.retrieval.cases import random_case


def ranks_of(seed: int) -> ClipRanks:
    scores_CN, judgements = random_case(seed, num_clips=120)
    return rank_positives(scores_CN, range(120), judgements, num_top=10)


def test_ratios_are_the_metrics() -> None:
    ranks = ranks_of(0)
    flat = summarise(ranks, 40).flat("")
    ratios = metric_ratios(ranks)
    assert len(ratios) == 16
    for name, (above_C, below_C) in ratios.items():
        assert above_C.sum() / below_C.sum() == pytest.approx(flat[name], abs=1e-12)


@pytest.mark.parametrize("name", ["recall@10", "term_recall@10", "mrr"])
def test_intervals_agree_with_scipy(name: str) -> None:
    ratios = metric_ratios(ranks_of(1))
    ours = bootstrap(ratios, num_resamples=4000)[name]
    expected = scipy.stats.bootstrap(
        ratios[name],
        lambda above, below, axis: above.sum(axis=axis) / below.sum(axis=axis),
        paired=True, vectorized=True, n_resamples=4000, method="percentile", rng=np.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    width = expected.high - expected.low
    assert ours == pytest.approx((expected.low, expected.high), abs=0.1 * width)


def test_auroc_interval_agrees_with_resampling_by_hand() -> None:
    ranks = ranks_of(2)
    low, high = bootstrap_auroc(ranks, num_resamples=2000) or (0.0, 0.0)
    generator, by_hand = np.random.default_rng(9), []
    for _ in range(2000):
        drawn = generator.integers(0, 120, 120)
        term = ranks.top_C[drawn][ranks.num_positives_C[drawn] > 0]
        without = ranks.top_C[drawn][ranks.is_no_term_C[drawn]]
        by_hand.append(scipy.stats.mannwhitneyu(term, without).statistic / (len(term) * len(without)))
    expected = np.quantile(by_hand, [0.025, 0.975])
    assert (low, high) == pytest.approx(expected, abs=0.1 * (expected[1] - expected[0]))


def test_the_same_seed_gives_the_same_bits_in_tables_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ranks_of(3)
    first, first_auroc = bootstrap(metric_ratios(ranks), 50), bootstrap_auroc(ranks, 50)
    assert bootstrap(metric_ratios(ranks), 50) == first
    assert bootstrap(metric_ratios(ranks), 50, seed=1) != first
    monkeypatch.setattr("retrieval.significance._TABLE_ELEMENTS", 1)  # one resample a table
    again = bootstrap(metric_ratios(ranks), 50)
    assert all(again[name] == pytest.approx(interval, abs=1e-12) for name, interval in first.items())
    assert bootstrap_auroc(ranks, 50) == pytest.approx(first_auroc, abs=1e-12)


def test_what_cannot_be_measured_has_no_interval() -> None:
    import torch

    nothing = rank_positives(torch.zeros(2, 2), [0, 1], Judgements.from_terms(["a", "b"], [[], []]))
    assert bootstrap(metric_ratios(nothing), 10) == {}
    assert bootstrap_auroc(nothing, 10) is None
