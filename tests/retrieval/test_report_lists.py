"""Tables and misses as markup."""

from retrieval.report_lists import breakdown_table, miss_list, size_table
from tests.retrieval.pages import Page
from tests.retrieval.runs import bare_report, full_report


def test_a_column_a_size_and_a_row_a_figure() -> None:
    report = full_report()
    page = Page(size_table(report.account))
    assert page.counts["th"] == 3
    assert page.counts["tr"] == 1 + 7 + 1 + 3  # header; recalls, MRR, AUROC; the threshold's title and figures
    low, high = report.account["sizes"][1]["intervals"]["at_threshold/recall"]
    assert f"{low:.2f}-{high:.2f}" in page.text
    assert Page(size_table(bare_report().account)).counts["tr"] == 1 + 7


def test_breakdowns_have_a_row_a_bucket() -> None:
    account = full_report().account
    page = Page(breakdown_table(account))
    buckets = sum(len(some) for some in account["breakdowns"].values())
    assert page.counts["tr"] == 1 + 3 + 3 + buckets
    assert "by training clips" in page.text


def test_a_miss_shows_what_came_instead_and_marks_what_is_right() -> None:
    report = full_report()
    page = Page(miss_list(report.misses, report.sounds, 6))
    assert page.text.count("came ") == len(report.misses) > 3
    right = [value for tag, name, value in page.attributes if (tag, name, value) == ("li", "class", "right")]
    assert len(right) == sum(is_right for miss in report.misses for _, _, is_right in miss.found)
    assert "0.50 s to 1.50 s" in page.text
    assert Page(miss_list((), (), 6)).counts == {"ul": 1}
