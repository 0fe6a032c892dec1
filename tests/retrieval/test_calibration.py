"""Thresholds: the lowest that meets the target, by exhaustive search; what they cost; targets that cannot be met."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from retrieval.calibration import Target, calibrate, operating_point
from retrieval.judgements import Judgements
from retrieval.ranks import ClipRanks, rank_positives
from tests.retrieval.cases import random_case


def ranks_of(seed: int, num_top: int = 10) -> ClipRanks:
    scores_CN, judgements = random_case(seed)
    scores_CN = (scores_CN * 50).round() / 50  # ties within and across clips
    for clip, positives in enumerate(judgements.positives):
        scores_CN[clip, positives] += 0.3
    return rank_positives(scores_CN, range(60), judgements, num_top)


def test_worked_out_by_hand() -> None:
    judgements = Judgements.from_terms(["a", "b", "c"], [["a"], ["b", "c"], []], [["c"], [], []])
    scores_CN = torch.tensor([[0.9, 0.2, 0.95], [0.8, 0.7, 0.1], [0.3, 0.6, 0.0]])
    ranks = rank_positives(scores_CN, range(3), judgements, num_top=2)
    point = operating_point(ranks, 0.65, k=2)  # a | a b | nothing
    assert (point.num_reports, point.precision, point.recall, point.false_alarm) == (3, 2 / 3, 2 / 3, 0.0)
    assert point.reports_per_clip == 1.0
    assert operating_point(ranks, 0.65, k=1).recall == pytest.approx(1 / 3)
    assert operating_point(ranks, 0.5, k=2).false_alarm == 1.0
    nothing = operating_point(ranks, 0.99, k=2)
    assert (nothing.precision, nothing.recall, nothing.false_alarm) == (None, 0.0, 0.0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 50), st.integers(5, 100), st.integers(1, 10), st.sampled_from(["precision", "false_alarm"]))
def test_no_lower_threshold_meets_the_target(seed: int, percent: int, k: int, name: str) -> None:
    wanted = percent / 100
    ranks = ranks_of(seed)
    every = np.unique(ranks.top_score_CT[:, :k].astype(np.float64))
    points = [operating_point(ranks, float(score), k) for score in every]
    if name == "precision":
        fit = [p.threshold for p in points if p.precision is not None and p.precision >= wanted]
    else:
        fit = [p.threshold for p in points if p.false_alarm is not None and p.false_alarm <= wanted]
    target = Target(name, wanted)  # type: ignore[arg-type]
    if not fit:
        if name == "precision":
            with pytest.raises(ValueError, match="the best that a threshold reaches on these clips is 0"):
                calibrate(ranks, target, k)
        return
    found = calibrate(ranks, target, k)
    lowest = operating_point(ranks, fit[0], k)
    assert found.num_reports == lowest.num_reports
    assert found.threshold <= fit[0]
    assert (found.precision, found.recall, found.false_alarm) == (lowest.precision, lowest.recall, lowest.false_alarm)


def test_no_false_alarm_at_all_stays_above_every_no_term_clip() -> None:
    ranks = ranks_of(3)
    found = calibrate(ranks, Target.parse("false_alarm=0"), 10)
    assert found.false_alarm == 0.0
    assert found.threshold > ranks.top_C[ranks.is_no_term_C].max()
    assert calibrate(ranks, Target.parse("false_alarm=1"), 10).threshold == -1.0


def test_targets_are_parsed_or_refused() -> None:
    assert str(Target.parse("precision=0.9")) == "precision=0.9"
    assert Target.parse("false_alarm=0.05") == Target("false_alarm", 0.05)
    for text in ("precision", "recall=0.5", "precision=2", "false_alarm=nan", "false_alarm=-0.1", "precision=high"):
        with pytest.raises(ValueError, match="allowed: precision=P or false_alarm=R"):
            Target.parse(text)


def test_what_cannot_be_calibrated_says_so() -> None:
    judgements = Judgements.from_terms(["a", "b"], [["a"]])
    ranks = rank_positives(torch.tensor([[0.1, 0.9]]), [0], judgements)
    with pytest.raises(ValueError, match="no clips without a term; allowed then: precision=P"):
        calibrate(ranks, Target("false_alarm", 0.1), 1)
    with pytest.raises(ValueError, match="none of the best 1 terms of any clip is right"):
        calibrate(ranks, Target("precision", 0.1), 1)
    with pytest.raises(ValueError, match="k: 5; allowed: 1 to 1, the number of best terms that were kept"):
        operating_point(ranks, 0.5, 5)
