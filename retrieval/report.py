"""A run or an evaluation as one HTML page that needs nothing else: no network, no other file, light and dark.

`render` is a plain function of what was measured; programs gather that and write the page.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from string import Template
from typing import Any

from retrieval.markup import bdi, facts_table, text
from retrieval.measured import Miss
from retrieval.report_charts import recall_cards, score_cards, size_card, speed_card
from retrieval.report_lists import breakdown_table, miss_list, size_table

TEMPLATE = Path(__file__).with_name("report.html")
TILES = {"Recall@10": "recall@10", "Recall@1": "recall@1", "MRR": "mrr", "AUROC, no-term clips": "no_term_auroc"}
SOUND_BUDGET = 6_000_000  # bytes of all clips' sound together, before base64: the page stays below 10 MB


@dataclass(frozen=True)
class Report:
    """What goes into the page. What is None or empty has no section, or one that says so."""

    name: str
    account: Mapping[str, Any]
    """`retrieval.measured.account`, with a `run` part: counts, drops, environment, throughput."""
    misses: Sequence[Miss] = ()
    sounds: Sequence[tuple[str, bytes] | None] = ()
    """(media type, content) of each miss's clip."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Tables of config.toml."""
    metrics: Sequence[Mapping[str, Any]] = ()
    """Lines of metrics.jsonl."""
    status: Mapping[str, Any] | None = None
    made_at: str = ""


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that are whole; none when there is no file."""
    if not path.is_file():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            record = json.loads(line)
        except ValueError:  # a killed process may leave half a line
            continue
        if isinstance(record, dict):
            found.append(record)
    return found


def within_budget(sounds: Iterable[tuple[str, bytes] | None], budget: int = SOUND_BUDGET) -> list:
    """The sounds in order, those beyond the budget replaced by None."""
    kept: list[tuple[str, bytes] | None] = []
    for sound in sounds:
        budget -= 0 if sound is None else len(sound[1])
        kept.append(sound if budget >= 0 else None)
    return kept


def render(report: Report) -> str:
    """The page. Every string that comes from data is escaped, terms and texts keep their own writing direction."""
    account, run = report.account, report.account.get("run", {})
    sections = [
        _curves(report),
        _section(
            "Scores and threshold",
            "What a threshold has to tell apart: right terms, the best wrong term of the same clips, and the best term "
            "of clips that name none.",
            score_cards(account),
        ),
        _section(
            "Glossary sizes",
            f"Mean over clips, with {account['interval']['level']:.0%} bootstrap intervals over clips "
            f"({account['interval']['num_resamples']:,} resamples).",
            f'<div class="cards">{size_card(account)}{_card(size_table(account), "Figures")}</div>',
        ),
        _section(
            "Kinds of terms",
            "Each row counts only the positives whose term is of that kind; all are ranked in the whole glossary.",
            _card(breakdown_table(account)),
        ),
        _misses(report),
        _section("Throughput", "", f'<div class="cards">{speed_card(report)}{_card(_speed_facts(report))}</div>'),
        _section("Data", "", f'<div class="cards top">{_data(run)}</div>'),
        _section("Settings and versions", "", _card(_settings(report))),
    ]
    return Template(TEMPLATE.read_text(encoding="utf-8")).substitute(
        title=text(f"{report.name} - Earmark report"),
        heading=bdi(report.name),
        lead=_lead(report),
        warnings="".join(f'<p class="warn">{text(warning)}</p>' for warning in _warnings(report)),
        tiles=_tiles(report),
        sections="\n".join(section for section in sections if section),
        footer=text(f"Made {report.made_at} by Earmark. The page holds everything it shows and loads nothing."),
    )


def _section(title: str, lead: str, body: str) -> str:
    lead = f"<p>{text(lead)}</p>" if lead else '<p style="margin:0 0 10px"></p>'
    return f"<section><h2>{text(title)}</h2>{lead}{body}</section>"


def _card(body: str, title: str = "") -> str:
    heading = f"<h3>{text(title)}</h3>" if title else ""
    return f'<div class="card">{heading}<div class="scroll">{body}</div></div>'


def _lead(report: Report) -> str:
    account, status = report.account, report.status
    said = [f"{account['num_measured']:,} clips against {account['num_glossary']:,} terms."]
    if status is not None:
        said.append(f"Training {status.get('state', '?')}: {status.get('message') or 'no message'}.")
    return text(" ".join(said).replace("..", "."))


def _warnings(report: Report) -> list[str]:
    data, threshold = report.settings.get("data", {}), report.account.get("threshold")
    found = []
    if report.metrics and not data.get("dev_samples_path"):
        found.append(
            "There were no dev clips: the test clips also steered the learning rate and the choice of the best epoch, "
            "so the figures here are optimistic."
        )
    if threshold and threshold.get("samples") and threshold["samples"] == report.account.get("run", {}).get("samples"):
        found.append("The threshold was calibrated on the very clips that it is measured on here.")
    missing = report.account["num_clips"] - report.account["num_measured"]
    if missing:
        found.append(f"{missing:,} of {report.account['num_clips']:,} clips could not be read and are not counted.")
    return found


def _tiles(report: Report) -> str:
    account = report.account
    size = next(s for s in account["sizes"] if s["num_terms"] == account["num_glossary"])
    metrics, intervals = size["metrics"], size["intervals"]
    before = next((line for line in report.metrics if "before/recall@10" in line), {})
    tiles: list[tuple[str, str, list[str]]] = []
    for name, key in TILES.items():
        if metrics.get(key) is None:
            continue
        notes = [f"{intervals[key][0]:.3f} to {intervals[key][1]:.3f}"] if key in intervals else []
        if before.get(f"before/{key}") is not None:
            notes.append(f"{before[f'before/{key}']:.3f} untrained")
        tiles.append((name, f"{metrics[key]:.3f}", notes))
    threshold = account.get("threshold")
    if threshold:
        at = size["at_threshold"]
        share = "none" if at["false_alarm"] is None else f"{at['false_alarm']:.1%}"
        tiles.append(("False alarms", share, [f"at {threshold['value']:.3f}", str(threshold.get("target", ""))]))
    speeds = [line["train/clips_per_s"] for line in report.metrics if line.get("train/clips_per_s")]
    if speeds:
        tiles.append(("Training", f"{sorted(speeds)[len(speeds) // 2]:,.0f}", ["clips a second,", "median"]))
    return "".join(
        f'<div class="tile"><dt>{text(name)}</dt><dd class="value">{text(value)}</dd>'
        f'<dd class="note">{"<br>".join(text(note) for note in notes)}</dd></div>'
        for name, value, notes in tiles
    )


def _curves(report: Report) -> str:
    curves = recall_cards(report)
    lead = "How many of the terms that a clip names are among the first k, and what was minimised."
    return _section("Training", lead, curves) if curves else ""


def _misses(report: Report) -> str:
    if not report.misses:
        return _section("Worst misses", "Every term of every clip came before all others.", "")
    lead = (
        f"The {len(report.misses)} clips whose worst-placed term is furthest from the first places, "
        "and what was found instead. Terms outlined in green are right as well."
    )
    return _section("Worst misses", lead, miss_list(report.misses, report.sounds, report.account["num_glossary"]))


def _speed_facts(report: Report) -> str:
    run, rows = report.account.get("run", {}), {}
    for name, key, unit in (
        ("Training, median", "train/clips_per_s", "clips/s"),
        ("Step, median", "train/step_ms", "ms"),
        ("Waiting for data, median", "data/wait_ms", "ms a step"),
        ("GPU memory, peak", "gpu/peak_gib", "GiB"),
    ):
        values = sorted(line[key] for line in report.metrics if line.get(key) is not None)
        if values:
            rows[name] = f"{values[-1] if 'peak' in name else values[len(values) // 2]:,.1f} {unit}"
    times = [line["time"] for line in report.metrics if isinstance(line.get("time"), int | float)]
    if len(times) > 1:
        rows["First to last line of the metrics"] = _duration(max(times) - min(times))
    if run.get("seconds"):
        rows["Measuring"] = f"{_duration(run['seconds'])} on {run.get('world_size', 1)} process(es)"
        rows["Clips measured"] = f"{run['clips_per_s']:,.1f} clips/s, the terms' encoding included"
    return facts_table(rows) if rows else '<p class="empty">Nothing was recorded.</p>'


def _data(run: Mapping[str, Any]) -> str:
    counts = {name: f"{v:,}" if isinstance(v, int) else v for name, v in run.get("counts", {}).items()}
    drops = {f"dropped: {name}": f"{count:,}" for name, count in run.get("drops", {}).items()}
    notes = {f"noted: {name}": f"{count:,}" for name, count in run.get("notes", {}).items()}
    account = {"Records": run.get("dropped", "no account was kept"), **drops, **notes}
    examples = [f"{line['reason']}: {line['source']} {line['detail']}" for line in run.get("drop_examples", ())]
    listed = "".join(f'<p class="where">{bdi(line)}</p>' for line in examples)
    return _card(facts_table(counts), "What was used") + _card(facts_table(account) + listed, "What was left out")


def _settings(report: Report) -> str:
    parts = []
    for name, table in report.settings.items():
        if isinstance(table, Mapping) and table:
            shown = {key: json.dumps(value, ensure_ascii=False) for key, value in table.items()}
            parts.append(_details(name, f"{len(table)} settings", facts_table(shown, "mono")))
    environment = report.account.get("run", {}).get("environment", {})
    if environment:
        shown = {k: v if isinstance(v, str) else json.dumps(v, ensure_ascii=False) for k, v in environment.items()}
        version = f"torch {environment.get('torch', '?')}, git {str(environment.get('git_revision'))[:10]}"
        parts.append(_details("versions", version, facts_table(shown, "mono")))
    return "".join(parts) or '<p class="empty">Nothing was recorded.</p>'


def _details(title: str, note: str, body: str) -> str:
    return f"<details><summary>{text(title)}<small>{text(note)}</small></summary>{body}</details>"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"
