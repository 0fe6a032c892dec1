"""What follows from a measurement: misses, examples, histograms, and the account as strict JSON."""

import json

import numpy as np
import pytest
import torch

from data.clips import Clip
from retrieval.judgements import Judgements
from retrieval.measured import Measured, account, count_training_clips, operating_curve, score_histograms
from retrieval.ranks import rank_positives
from tests.retrieval.cases import random_case

TERMS = ["a", "b", "c", "d"]


def clip(number: int, *terms: str) -> Clip:
    return Clip(f"clip{number}", "x.wav", None, None, f"text {number}", terms, (), terms, not terms, "test.json:0")


@pytest.fixture
def measured() -> Measured:
    """Clip 1 could not be read. Two distractors, x and y."""
    clips = [clip(0, "a", "b"), clip(1, "a"), clip(2, "c"), clip(3), clip(4, "d")]
    ranked = [*TERMS, "x", "y"]
    scores = torch.tensor(
        [
            [0.9, 0.8, 0.1, 0.2, 0.0, 0.0],  # both first
            [0.5, 0.6, 0.2, 0.4, 0.1, 0.3],  # c is fourth; fifth with the distractors
            [0.1, 0.2, 0.3, 0.0, 0.6, 0.5],  # no term
            [0.1, 0.7, 0.2, 0.6, 0.1, 0.1],  # d is second
        ]
    )
    rows = [0, 2, 3, 4]
    by_size = {}
    for size in (4, 6):
        judgements = Judgements.from_terms(ranked[:size], [c.terms for c in clips], seen_terms=["a", "b"])
        by_size[size] = rank_positives(scores[:, :size], rows, judgements, num_top=3)
    return Measured(clips, ranked, 4, by_size)


def test_misses_are_worst_first_and_name_what_came_instead(measured: Measured) -> None:
    misses = measured.misses(9, k=2)
    assert [(m.clip.clip_id, m.term, m.rank) for m in misses] == [("clip2", "c", 4), ("clip4", "d", 2)]
    assert misses[0].score == pytest.approx(0.2)
    assert misses[0].found == [("b", pytest.approx(0.6), False), ("a", pytest.approx(0.5), False)]
    assert misses[1].found[1] == ("d", pytest.approx(0.6), True)
    assert len(measured.misses(1)) == 1


def test_examples_are_spread_over_the_clips_that_could_be_read(measured: Measured) -> None:
    assert [(c.clip_id, found) for c, found in measured.examples(2, k=2)] == [
        ("clip0", ["a", "b"]),
        ("clip3", ["c", "b"]),
    ]
    assert measured.examples(0) == []


def test_histograms_count_each_kind_once(measured: Measured) -> None:
    found = score_histograms(measured.ranks, num_bins=20)
    assert {name: sum(counts) for name, counts in found["counts"].items()} == {
        "positive": 4,
        "negative": 3,
        "no_term": 1,
    }
    edges, counts = np.array(found["edges"]), np.array(found["counts"]["negative"])
    centres = (edges[1:] + edges[:-1]) / 2
    assert centres[counts > 0] == pytest.approx([0.2, 0.6, 0.7], abs=0.06)  # the best wrong term of each clip


def test_the_account_holds_every_size_and_is_strict_json(measured: Measured) -> None:
    told = account(measured, {"value": 0.55, "k": 3, "target": "precision=0.5"}, {"a": 5}, num_resamples=20)
    assert json.loads(json.dumps(told, allow_nan=False)) == told
    assert (told["num_clips"], told["num_measured"]) == (5, 4)
    assert [(s["num_terms"], s["num_distractors"]) for s in told["sizes"]] == [(4, 0), (6, 2)]
    first, second = told["sizes"]
    assert first["metrics"]["recall@1"] == pytest.approx((0.5 + 0 + 0) / 3)
    assert first["metrics"]["mrr"] > second["metrics"]["mrr"]
    assert first["at_threshold"]["false_alarm"] == 0.0
    assert second["at_threshold"]["false_alarm"] == 1.0
    low, high = first["intervals"]["recall@5"]
    assert 0.0 <= low <= first["metrics"]["recall@5"] <= high <= 1.0
    assert {"at_threshold/precision", "no_term_auroc", "mrr"} <= first["intervals"].keys()
    assert set(told["breakdowns"]) == {"words", "characters", "training_clips"}
    assert "at_threshold" not in account(measured, num_resamples=5)["sizes"][0]


def test_the_operating_curve_goes_from_everything_to_almost_nothing() -> None:
    scores_CN, judgements = random_case(0)
    points = operating_curve(rank_positives(scores_CN, range(60), judgements, num_top=10))
    reports = [point["num_reports"] for point in points]
    assert reports[0] == 600
    assert reports == sorted(reports, reverse=True)
    assert reports[-1] >= 1
    assert operating_curve(rank_positives(torch.zeros(0, 40), [], judgements)) == []


def test_training_clips_are_counted_by_term() -> None:
    assert count_training_clips([clip(0, "a", "b"), clip(1), clip(2, "a")]) == {"a": 2, "b": 1}
