"""What a finished measurement tells: the closing tables of a run on the console, and report.html."""

import logging
import time
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bin.runlog import environment, show_examples, show_recall
from data.audio import AudioError
from data.clips import Clip
from data.drops import DropLog
from data.preview import encode_preview
from data.reader import AudioReader
from distributed.atomic import write_file_atomically
from distributed.rundir import read_status
from retrieval.measured import Measured, Miss, account, count_training_clips
from retrieval.metrics import EvalResult
from retrieval.report import Report, read_metrics, render, within_budget

logger = logging.getLogger("earmark")

NUM_MISSES = 50
NUM_DROP_EXAMPLES = 8


def show_test(before: EvalResult | None, measured: Measured, run_dir: Path, num_examples: int) -> None:
    """The closing table of a run, and some clips with what was found, on the console."""
    show_recall(before, measured.result(), run_dir)
    if num_examples:
        show_examples(measured.examples(num_examples))


def write_run_report(
    run_dir: Path, measured: Measured, train: Sequence[Clip], reader: AudioReader, drops: DropLog, device: str
) -> None:
    """<run>/report.html of a run that is over. A report that fails is logged, no more: the run is good without it."""
    try:
        found = account(measured, None, count_training_clips(train))
        found["run"] = data_facts(measured, train, drops) | {"environment": environment(device)}
        write_report(run_dir / "report.html", run_dir, measured, found, reader)
        logger.info("report: %s", run_dir / "report.html")
    except Exception:
        logger.exception("the report could not be written; the run itself is complete")


def write_report(
    path: Path, run_dir: Path | None, measured: Measured, found: Mapping[str, Any], reader: AudioReader
) -> None:
    """The page of a measurement, with the curves and settings of the run that the model comes from, where there is one.

    found: `retrieval.measured.account` with a `run` part. Raises OSError when the page cannot be written.
    """
    misses = measured.misses(NUM_MISSES)
    settings, metrics, status = {}, [], None
    if run_dir is not None:
        settings = tomllib.loads((run_dir / "config.toml").read_text(encoding="utf-8"))
        metrics, status = read_metrics(run_dir / "metrics.jsonl"), read_status(run_dir)
    page = render(
        Report(
            name=run_dir.absolute().name if run_dir is not None else Path(found["run"]["model_dir"]).name,
            account=found,
            misses=misses,
            sounds=within_budget(_sound(miss, reader) for miss in misses),
            settings=settings,
            metrics=metrics,
            status=status,
            made_at=time.strftime("%Y-%m-%d %H:%M"),
        )
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(path, page.encode("utf-8"))


def data_facts(measured: Measured, train: Sequence[Clip] | None, drops: DropLog) -> dict[str, Any]:
    """What was used and what was left out, for the account."""
    counts: dict[str, Any] = {}
    if train is not None:
        counts["Training clips"] = len(train)
        counts["of them without a term"] = sum(clip.is_no_term for clip in train)
        counts["Terms named in training clips"] = len({term for clip in train for term in clip.terms})
    ranks = measured.ranks
    counts |= {
        "Clips measured": ranks.num_clips,
        "with a term": int((ranks.num_positives_C > 0).sum()),
        "without a term": int(ranks.is_no_term_C.sum()),
        "Terms to be found": len(ranks.rank_P),
        "Terms ranked": measured.num_glossary,
        "Distractors, at most": len(measured.terms) - measured.num_glossary,
        "Audio measured": f"{sum(clip.duration_s or 0.0 for clip in measured.clips) / 60:.1f} min",
    }
    return {
        "counts": counts,
        "dropped": drops.summary(),
        "drops": dict(drops.counts),
        "notes": dict(drops.notes),
        "drop_examples": drops.lines()[:NUM_DROP_EXAMPLES],
    }


def _sound(miss: Miss, reader: AudioReader) -> tuple[str, bytes] | None:
    clip = miss.clip
    try:
        return encode_preview(reader.read(clip.audio_path, clip.start_s, clip.end_s))
    except AudioError as error:
        logger.warning("report: no sound for %s (%s)", clip.clip_id, error)
        return None
