"""Which lines the report draws."""

import json
from dataclasses import replace

from retrieval.report_charts import recall_cards, score_cards, size_card, speed_card, thinned
from tests.retrieval.pages import Page
from tests.retrieval.runs import bare_report, full_report


def lines(markup: str) -> list[dict[str, list]]:
    """Of each chart: its series' points by name."""
    charts = [json.loads(value) for _, name, value in Page(markup).attributes if name == "data-chart"]
    return [{one["name"]: [point[2:] for point in one["points"]] for one in chart["series"]} for chart in charts]


def test_recall_and_loss_over_the_epochs() -> None:
    recall, loss = lines(recall_cards(full_report()))
    assert list(recall) == ["Recall@1", "Recall@5", "Recall@10"]
    assert recall["Recall@10"] == [[0.5, 0.1], [1.0, 0.2], [2.0, 0.4], [2.5, 0.5], [3.0, 0.6]]  # one was not finite
    assert list(loss) == ["total", "hard negatives"]
    assert loss["total"][0] == [0.5, 4.5]
    assert recall_cards(bare_report()) == ""


def test_recall_against_the_glossarys_size() -> None:
    report = full_report()
    (chart,) = lines(size_card(report.account))
    assert list(chart) == [f"Recall@{k}" for k in (1, 5, 10, 20, 100)]
    for k in (1, 5):
        expected = [[size["num_terms"], size["metrics"][f"recall@{k}"]] for size in report.account["sizes"]]
        assert [[x, round(y, 6)] for x, y in expected] == chart[f"Recall@{k}"]


def test_with_one_size_recall_is_drawn_against_k() -> None:
    account = bare_report().account
    (chart,) = lines(size_card(account))
    assert [x for x, _ in chart["mean over clips"]] == [1, 5, 10, 20, 100]
    assert chart["over all terms"][1][1] == round(account["sizes"][0]["metrics"]["term_recall@5"], 6)


def test_scores_of_three_kinds_and_what_thresholds_do() -> None:
    report = full_report()
    histograms, shares = lines(score_cards(report.account))
    assert list(histograms) == ["right terms (18)", "best wrong term (18)", "no-term clips (6)"]
    assert list(shares) == ["precision", "recall", "false alarms"]
    assert len(shares["recall"]) == len(report.account["operating_curve"])
    assert "threshold 0.831" in Page(score_cards(report.account)).text


def test_long_runs_are_thinned_to_means() -> None:
    assert thinned([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    assert thinned([1.0, 3.0, 5.0, 7.0, 9.0], 2) == [2.0, 7.0]
    metrics = [{"step": i, "epoch": i / 1000, "time": 0.0, "train/loss": 1.0} for i in range(100_000)]
    assert len(recall_cards(replace(full_report(), metrics=metrics))) < 40_000


def test_speed() -> None:
    (chart,) = lines(speed_card(full_report()))
    assert [y for _, y in chart["clips a second, all processes"]] == [41.0, 42.0, 43.0, 44.0, 45.0, 46.0]
    assert speed_card(bare_report()) == ""
