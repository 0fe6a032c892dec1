"""The tables of bin/evaluate.py: an account of `retrieval.measured` on the console."""

from typing import Any

from rich.table import Table

from bin.runlog import console

SHOWN_K = 10


def show_account(account: dict[str, Any]) -> None:
    """Glossary sizes, clips without a term and the threshold, kinds of terms."""
    for table in (sizes_table(account), threshold_table(account), breakdown_table(account)):
        console.print(table)


def sizes_table(account: dict[str, Any]) -> Table:
    """One row a glossary size: recall at each k and MRR; the interval of the figure that steers training."""
    level = account["interval"]["level"]
    table = Table(title=f"Recall@k, mean over clips, with {level:.0%} intervals", title_justify="left")
    table.add_column("terms", justify="right", no_wrap=True)
    for name in (*(f"R@{k}" for k in account["ks"]), "MRR"):
        table.add_column(name, justify="right", no_wrap=True)
    for size in account["sizes"]:
        names = [*(f"recall@{k}" for k in account["ks"]), "mrr"]
        shown = {name: size["intervals"].get(name) for name in names if name == f"recall@{SHOWN_K}"}
        table.add_row(f"{size['num_terms']:,}", *(_cell(size["metrics"].get(name), shown.get(name)) for name in names))
    return table


def threshold_table(account: dict[str, Any]) -> Table:
    """One row a glossary size: whether clips without a term are told apart, and what the threshold does."""
    threshold = account["threshold"]
    title = "Clips with and without a term told apart (AUROC)"
    if threshold is not None:
        chosen = threshold.get("target", "stored")
        title += f"\nThreshold {threshold['value']:.3f} ({chosen}) on the best {threshold['k']} terms of a clip"
    table = Table(title=title, title_justify="left")
    table.add_column("terms", justify="right", no_wrap=True)
    names = {"AUROC": "no_term_auroc"}
    if threshold is not None:
        names |= {n.replace("_", " "): f"at_threshold/{n}" for n in ("precision", "recall", "false_alarm")}
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    for size in account["sizes"]:
        figures = size["metrics"] | {f"at_threshold/{n}": v for n, v in size.get("at_threshold", {}).items()}
        cells = (_cell(figures.get(name), size["intervals"].get(name), "\n") for name in names.values())
        table.add_row(f"{size['num_terms']:,}", *cells)
    return table


def breakdown_table(account: dict[str, Any]) -> Table:
    """Seen, unseen, and each bucket of terms: how many positives, and how many of them are found."""
    k = SHOWN_K
    table = Table(title=f"Which terms are found, among {account['num_glossary']:,}", title_justify="left")
    table.add_column("terms")
    for name in ("clips", "positives", f"recall@{k}", f"found@{k}", "MRR"):
        table.add_column(name, justify="right")
    metrics = next(s for s in account["sizes"] if s["num_terms"] == account["num_glossary"])["metrics"]
    for subset in ("all", "seen", "unseen"):
        suffix = "" if subset == "all" else f"_{subset}"
        row = {name.removesuffix(suffix): value for name, value in metrics.items() if name.endswith(suffix)}
        if f"recall@{k}{suffix}" in metrics:
            table.add_row(subset, *_breakdown_cells(row, k))
    for title, buckets in account["breakdowns"].items():
        table.add_section()
        for bucket in buckets:
            table.add_row(f"{title.replace('_', ' ')} {bucket['name']}", *_breakdown_cells(bucket["metrics"], k))
    return table


def _breakdown_cells(metrics: dict[str, Any], k: int) -> list[str]:
    shares = (metrics[f"recall@{k}"], metrics[f"term_recall@{k}"], metrics["mrr"])
    return [f"{metrics['num_term_clips']:,}", f"{metrics['num_positives']:,}", *(f"{share:.3f}" for share in shares)]


def _cell(value: float | None, interval: list[float] | None, between: str = " ") -> str:
    if value is None:
        return "-"
    return f"{value:.3f}" if interval is None else f"{value:.3f}{between}[{interval[0]:.2f}-{interval[1]:.2f}]"
