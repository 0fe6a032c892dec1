"""The charts of the report: which lines, out of which figures."""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

from retrieval.charts import Axes, Series, histogram_series, line_chart
from retrieval.markup import text

MAX_POINTS = 300  # of a line: a run of weeks has a hundred thousand log lines
CURVE_KS = (1, 5, 10)
K_COLOURS = {10: 1, 5: 2, 1: 3, 20: 4, 100: 5}
KINDS = (("positive", "right terms", 2), ("negative", "best wrong term", 3), ("no_term", "no-term clips", 4))
SHARES = (("precision", "precision", 1), ("recall", "recall", 2), ("false_alarm", "false alarms", 4))
LOSS_NAMES = {
    "audio_term": "audio to term",
    "audio_text": "audio to text",
    "hard": "hard negatives",
    "no_term": "no term",
}


class Measurements(Protocol):
    """The parts of `report.Report` that are drawn."""

    @property
    def account(self) -> Mapping[str, Any]: ...
    @property
    def metrics(self) -> Sequence[Mapping[str, Any]]: ...


def recall_cards(report: Measurements) -> str:
    """Recall and loss over the epochs, where a run was recorded; else nothing."""
    cards = []
    if report.metrics:
        cards.append(
            _card("Recall over the epochs", "Measured at the end of each epoch.", _recall_curves(report.metrics))
        )
        cards.append(
            _card("Training loss", "All parts before their weights; the total after.", _losses(report.metrics))
        )
    return f'<div class="cards">{"".join(cards)}</div>' if cards else ""


def size_card(account: Mapping[str, Any]) -> str:
    """Recall against the glossary's size, with bands; where there is one size, recall against k."""
    if len(account["sizes"]) > 1:
        return _card("Recall against the glossary's size", *_sizes(account))
    note = (
        f"Among {account['num_glossary']:,} terms. bin/evaluate.py --distractors FILE adds wrong terms "
        "and draws recall against the glossary's size."
    )
    return _card("Recall against k", note, _by_k(account["sizes"][0], account["ks"]))


def score_cards(account: Mapping[str, Any]) -> str:
    """Histograms of three kinds of scores, and what each threshold would do."""
    edges, counts = account["scores"]["edges"], account["scores"]["counts"]
    threshold = account.get("threshold")
    marks = [(threshold["value"], f"threshold {threshold['value']:.3f}")] if threshold else []
    present = [(name, label, colour) for name, label, colour in KINDS if sum(counts[name])]
    histograms = [
        histogram_series(edges, counts[name], f"{label} ({sum(counts[name]):,})", colour)
        for name, label, colour in present
    ]
    points = account["operating_curve"]
    shares = [
        Series(label, [p["threshold"] for p in points], [p[name] for p in points], colour)
        for name, label, colour in SHARES
    ]
    k = points[0]["k"] if points else 10
    note = "Share of each kind in bins of equal width."
    if not threshold:
        note += " No threshold was calibrated: bin/evaluate.py --calibrate precision=0.9 chooses one."
    scores = line_chart(histograms, Axes("score (cosine)", is_share=True, marks=marks), "Histograms of scores")
    curve_axes = Axes("threshold", y_range=(0.0, 1.0), is_share=True, marks=marks)
    curve = line_chart(shares, curve_axes, "Precision, recall and false alarms by threshold")
    best = f"Of the best {k} terms of a clip, those that reach the threshold are reported."
    return f'<div class="cards">{_card("Scores", note, scores)}{_card("What a threshold would do", best, curve)}</div>'


def speed_card(report: Measurements) -> str:
    """Clips a second over the epochs."""
    lines = [line for line in report.metrics if line.get("train/clips_per_s") is not None]
    if not lines:
        return ""
    speed = _line(lines, "train/clips_per_s", "clips a second, all processes", 1)
    return _card(
        "Training speed", "Between log lines, waiting included.", line_chart([speed], Axes("epoch"), "Clips a second")
    )


def _recall_curves(metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = [line for line in metrics if "eval/recall@10" in line]
    series = [_line(lines, f"eval/recall@{k}", f"Recall@{k}", K_COLOURS[k]) for k in CURVE_KS]
    known = [line for line in lines if _is_number(line["eval/recall@10"])]
    best = max(known, key=lambda line: line["eval/recall@10"], default=None)
    marks = [] if best is None else [(best["epoch"], f"best {best['eval/recall@10']:.3f}")]
    return line_chart(series, Axes("epoch", y_range=(0.0, 1.0), is_share=True, marks=marks), "Recall over the epochs")


def _losses(metrics: Sequence[Mapping[str, Any]]) -> str:
    lines = [line for line in metrics if "train/loss" in line]
    parts = sorted({name for line in lines for name in line if name.startswith("train/loss_")})
    series = [_line(lines, "train/loss", "total", 1)]
    for colour, name in enumerate(parts, start=2):
        short = name.removeprefix("train/loss_")
        series.append(_line(lines, name, LOSS_NAMES.get(short, short), min(colour, 6), is_main=False))
    return line_chart(series, Axes("epoch"), "Training loss")


def _sizes(account: Mapping[str, Any]) -> tuple[str, str]:
    note = (
        f"Bands: {account['interval']['level']:.0%} intervals. Beyond {account['num_glossary']:,} terms: distractors."
    )
    axes = Axes("terms", y_range=(0.0, 1.0), is_log_x=True, is_share=True)
    return note, line_chart(_size_series(account), axes, "Recall against the glossary's size")


def _by_k(size: Mapping[str, Any], ks: Sequence[int]) -> str:
    series = []
    for name, key, colour in (("mean over clips", "recall", 1), ("over all terms", "term_recall", 2)):
        known = [k for k in ks if f"{key}@{k}" in size["metrics"]]
        bands = [size["intervals"][f"{key}@{k}"] for k in known]
        low, high = zip(*bands, strict=True) if bands else ((), ())
        series.append(Series(name, known, [size["metrics"][f"{key}@{k}"] for k in known], colour, low, high))
    return line_chart(series, Axes("k", y_range=(0.0, 1.0), is_log_x=True, is_share=True), "Recall against k")


def _size_series(account: Mapping[str, Any]) -> list[Series]:
    series = []
    for k in account["ks"]:
        key = f"recall@{k}"
        sizes = [s for s in account["sizes"] if key in s["metrics"]]
        bands = [s["intervals"].get(key) for s in sizes]
        low, high = zip(*bands, strict=True) if bands and all(bands) else ((), ())
        values = [s["metrics"][key] for s in sizes]
        series.append(Series(f"Recall@{k}", [s["num_terms"] for s in sizes], values, K_COLOURS.get(k, 6), low, high))
    return series


def _line(lines: Iterable[Mapping[str, Any]], key: str, name: str, colour: int, is_main: bool = True) -> Series:
    known = [line for line in lines if _is_number(line.get(key))]
    x, y = thinned([line["epoch"] for line in known]), thinned([line[key] for line in known])
    return Series(name, x, y, colour, is_main=is_main)


def thinned(values: Sequence[float], most: int = MAX_POINTS) -> list[float]:
    """The values; of more than `most`, the means of so many runs of neighbours."""
    if len(values) <= most:
        return list(values)
    edges = [i * len(values) // most for i in range(most + 1)]
    return [math.fsum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _card(title: str, note: str, body: str) -> str:
    return f'<div class="card"><h3>{text(title)}</h3><p>{text(note)}</p>{body}</div>'
