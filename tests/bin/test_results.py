"""The tables hold every size, bucket and figure."""

from rich.console import Console

from bin.results import breakdown_table, sizes_table, threshold_table
from tests.retrieval.runs import bare_report, full_report


def printed(*tables: object) -> str:
    console = Console(width=80, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    for table in tables:
        console.print(table)
    return console.export_text()


def test_all_three_tables_fit_a_terminal_and_hold_the_figures() -> None:
    account = full_report().account
    text = printed(sizes_table(account), threshold_table(account), breakdown_table(account))
    assert "…" not in text
    for size in account["sizes"]:
        at = size["at_threshold"]
        for value in (size["metrics"]["recall@1"], size["metrics"]["recall@100"], at["precision"], at["false_alarm"]):
            assert f"{value:.3f}" in text
    low, high = account["sizes"][0]["intervals"]["recall@10"]
    assert f"[{low:.2f}-{high:.2f}]" in text
    assert "Threshold 0.831 (precision=0.5) on the best 5 terms" in text
    for title, buckets in account["breakdowns"].items():
        assert all(f"{title.replace('_', ' ')} {bucket['name']}" in text for bucket in buckets)
    assert "unseen" in text


def test_without_a_threshold_there_are_no_figures_of_one() -> None:
    text = printed(threshold_table(bare_report().account))
    assert "AUROC" in text
    assert "precision" not in text
