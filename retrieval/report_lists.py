"""The tables and the list of misses of the report."""

import base64
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from retrieval.markup import bdi, text
from retrieval.measured import Miss

BREAKDOWN_K = 10
AT_THRESHOLD = ("precision", "recall", "false_alarm")
TITLES = {"words": "by words", "characters": "by letters", "training_clips": "by training clips"}


def size_table(account: Mapping[str, Any]) -> str:
    """A column a glossary size: recall at each k, MRR, AUROC, and the threshold's figures, each above its interval."""
    sizes, threshold = account["sizes"], account.get("threshold")
    names = {f"Recall@{k}": f"recall@{k}" for k in account["ks"]} | {"MRR": "mrr", "AUROC": "no_term_auroc"}
    rows = [
        _figures_row(name, [(s["metrics"].get(key), s["intervals"].get(key)) for s in sizes])
        for name, key in names.items()
    ]
    if threshold:
        title = f"at the threshold {threshold['value']:.3f}"
        rows.append(f'<tr class="group"><td colspan="{len(sizes) + 1}">{text(title)}</td></tr>')
        for name in AT_THRESHOLD:
            figures = [(s["at_threshold"][name], s["intervals"].get(f"at_threshold/{name}")) for s in sizes]
            rows.append(_figures_row(name.replace("_", " "), figures))
    header = "".join(f"<th>{size['num_terms']:,}</th>" for size in sizes)
    head = f"<thead><tr><th>terms</th>{header}</tr></thead>"
    return f'<table class="dense">{head}<tbody>{"".join(rows)}</tbody></table>'


def breakdown_table(account: Mapping[str, Any]) -> str:
    """Seen, unseen and each range of terms, with a bar of recall and the number of positives."""
    size = next(s for s in account["sizes"] if s["num_terms"] == account["num_glossary"])
    k, rows = BREAKDOWN_K, []
    for subset in ("all", "seen", "unseen"):
        suffix = "" if subset == "all" else f"_{subset}"
        if f"recall@{k}{suffix}" in size["metrics"]:
            row = {name: size["metrics"][f"{name}{suffix}"] for name in _columns(k)}
            rows.append(_breakdown_row(subset, row, k))
    for title, buckets in account["breakdowns"].items():
        rows.append(f'<tr class="group"><td colspan="6">{text(TITLES.get(title, title))}</td></tr>')
        rows += [_breakdown_row(bucket["name"], bucket["metrics"], k) for bucket in buckets]
    header = f'<th>recall@{k}</th><th>found@{k}</th><th class="wide">MRR</th><th class="wide">clips</th><th>count</th>'
    return f"<table><thead><tr><th>terms</th>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>"


def miss_list(misses: Sequence[Miss], sounds: Sequence[tuple[str, bytes] | None], num_terms: int) -> str:
    """A card a miss: what was said, the term and its place, what was found instead, and a player."""
    cards = []
    for miss, sound in zip_longest(misses, sounds):
        found = "".join(
            f"<li{' class=right' if is_right else ''}>{bdi(term)}<small>{score:.2f}</small></li>"
            for term, score, is_right in miss.found
        )
        if sound is None:
            player = '<p class="where">The sound is not in this page, to keep it small.</p>'
        else:
            content = base64.b64encode(sound[1]).decode("ascii")
            player = f'<audio controls preload="metadata" src="data:{text(sound[0])};base64,{content}"></audio>'
        clip = miss.clip
        span = "" if clip.start_s is None and clip.end_s is None else f", {_span(clip.start_s, clip.end_s)}"
        cards.append(
            f'<li class="miss"><p class="said">{bdi(clip.text or "(no text)")}</p>'
            f'<div class="wanted"><b>{bdi(miss.term)}</b> came {miss.rank:,} of {num_terms:,}, '
            f"scored {miss.score:.2f}</div>"
            f'<ul class="found">{found}</ul>{player}'
            f'<div class="where">{bdi(clip.clip_id + span)}</div></li>'
        )
    return f'<ul class="misses">{"".join(cards)}</ul>'


def _columns(k: int) -> tuple[str, ...]:
    return (f"recall@{k}", f"term_recall@{k}", "mrr", "num_term_clips", "num_positives")


def _breakdown_row(name: str, metrics: Mapping[str, Any], k: int) -> str:
    recall, found, mrr, clips, positives = (metrics[column] for column in _columns(k))
    bar = f'<span class="bar"><i style="width:{100 * recall:.1f}%"></i></span>'
    return (
        f"<tr><td>{text(name)}</td><td>{recall:.3f}{bar}</td><td>{found:.3f}</td>"
        f'<td class="wide">{mrr:.3f}</td><td class="wide">{clips:,}</td><td>{positives:,}</td></tr>'
    )


def _figures_row(name: str, figures: Sequence[tuple[float | None, Sequence[float] | None]]) -> str:
    cells = []
    for value, interval in figures:
        band = f"<br><small>{interval[0]:.2f}-{interval[1]:.2f}</small>" if interval else ""
        cells.append("<td>-</td>" if value is None else f"<td>{value:.3f}{band}</td>")
    return f"<tr><td>{text(name)}</td>{''.join(cells)}</tr>"


def _span(start_s: float | None, end_s: float | None) -> str:
    return f"{start_s or 0:.2f} s to {'the end' if end_s is None else f'{end_s:.2f} s'}"
