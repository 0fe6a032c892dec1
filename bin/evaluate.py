"""Measure a trained model: recall against glossaries of several sizes, thresholds, intervals, exports, a report.

    python bin/evaluate.py runs/mine/model_best
    torchrun --nproc_per_node=8 bin/evaluate.py runs/mine/model_best --dev_samples_path dev.json \
        --calibrate precision=0.9 --distractors words.txt --distractor_sizes 1000 10000 100000 --report report.html

What is not given is as in the training run that the model folder lies in. The figures do not depend on the number of
processes.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import dataclasses
import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import tyro

from bin.config import Config, apply_file
from bin.datasets import MeasuredSets, load_measured_sets, merge_drops
from bin.ending import run_program
from bin.evaluation import NUM_TOP, Evaluator
from bin.reporting import data_facts, write_report
from bin.results import show_account
from bin.runlog import configure_logging, console, environment
from bin.threshold import describe_threshold, read_threshold, store_threshold
from data.glossary import load_glossary
from data.records import find_file
from data.settings import DataSettings
from distributed import processes
from distributed.atomic import json_bytes, write_file_atomically
from distributed.collectives import on_rank_0
from distributed.processes import World
from retrieval.calibration import Target, calibrate
from retrieval.distractors import check_sizes, draw_distractors
from retrieval.measured import Measured, account, count_training_clips
from retrieval.model_files import CONFIG_FILE, OpenedModel, open_model, read_config
from retrieval.significance import NUM_RESAMPLES
from retrieval.trec import write_beir, write_trec

logger = logging.getLogger("earmark")

TREC_DEPTH = 100


@dataclass
class EvaluateSettings:
    """Measure a trained model on clips with known terms."""

    model_dir: tyro.conf.Positional[str]
    """Folder of the model, such as runs/mine/model_best, or of a run, whose best model it is then."""
    test_samples_path: str | None = None
    """Clips to measure on. Like all paths here: by default that of the model's training run."""
    dev_samples_path: str | None = None
    """Clips that the threshold is calibrated on."""
    train_samples_path: str | None = None
    """Training clips, for their labels: seen and unseen terms, and how often a term was trained."""
    glossary_path: str | None = None
    """Terms that are ranked."""
    data_root: str | None = None
    """Folder under which sample files, glossaries and relative audio paths are looked for."""
    audio_root: str | None = None
    """Folder of relative audio paths."""
    path_remap: tuple[str, ...] | None = None
    """OLD=NEW pairs: audio paths that start with OLD start with NEW instead."""
    check_cache_path: str | None = None
    """File that remembers the checks of audio headers."""
    max_bad_fraction: float | None = None
    """The evaluation fails when more than this share of the records has to be dropped."""
    distractors: str | None = None
    """Glossary file out of which wrong terms are drawn to make the glossary larger."""
    distractor_sizes: tuple[int, ...] = (1000, 10_000)
    """How many of them are added, one measurement each; smaller draws are part of the larger ones."""
    calibrate: str | None = None
    """Choose the threshold for precision=P or false_alarm=R on the dev clips and store it with the model."""
    k: int = NUM_TOP
    """Terms that a search asks for: what the threshold's precision counts."""
    trec: str | None = None
    """Folder for a TREC run (100 deep) and qrels."""
    beir: str | None = None
    """Folder for the clips and terms in BEIR's layout."""
    report: str | None = None
    """HTML file for the report."""
    json: str | None = None
    """File for all figures; by default <model_dir>.evaluation.json."""
    batch_size: int = 32
    """Clips encoded at a time."""
    term_batch_size: int = 256
    """Terms encoded at a time."""
    num_resamples: int = NUM_RESAMPLES
    """Resamples of the clips behind each interval."""
    seed: int = 0
    """Of the distractors' draw and the resamples."""
    model_name: str | None = None
    """Where the base model of an adapter lies now, if not where it lay in training."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto: the GPU when there is one."""
    collective_timeout_s: float = 600.0
    """Seconds that processes wait for one another."""

    def validate(self) -> None:
        """Raise ValueError naming the field, its value and what is allowed."""
        for name in ("k", "batch_size", "term_batch_size", "num_resamples"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: got {getattr(self, name)}; allowed: 1 or more")
        if self.calibrate is not None:
            Target.parse(self.calibrate)
        self.distractor_sizes = tuple(check_sizes(self.distractor_sizes))


def evaluate(settings: EvaluateSettings) -> dict[str, Any]:
    """The whole measurement; returns the account that is also written as JSON. A collective over all processes."""
    settings.validate()
    model_dir = model_dir_of(Path(settings.model_dir))
    world = processes.start(settings.device, settings.collective_timeout_s)
    configure_logging(world.rank, None)
    try:
        # ------------------------------------------------------------------------------------- model and data
        data_settings = data_settings_of(settings, model_dir)
        opened = open_model(model_dir, world.device, model_name=settings.model_name)
        data = load_measured_sets(data_settings, world)
        distractors = _distractors(settings, data, data_settings)
        evaluator = Evaluator(
            data.test,
            data.terms,
            data.seen_terms,
            data.reader,
            data.drops,
            settings.batch_size,
            world,
            settings.term_batch_size,
            distractors,
            settings.distractor_sizes if distractors else (),
        )

        # ------------------------------------------------------------------------------------------ threshold
        threshold = read_threshold(model_dir)
        if settings.calibrate is not None:
            threshold = _calibrate(settings, data_settings, data, evaluator, opened)
            on_rank_0(lambda: store_threshold(model_dir, threshold))
            logger.info("threshold %.4f for %s, stored with %s", threshold["value"], settings.calibrate, model_dir)

        # --------------------------------------------------------------------------------------------- measure
        num_top = max(settings.k, threshold["k"] if threshold else 1, TREC_DEPTH if settings.trec else 1)
        started = time.perf_counter()
        measured = evaluator.measure(opened.built.model, opened.built.tokenizer, num_top)
        seconds = time.perf_counter() - started
        merge_drops(data.drops, world, None)
        found = account(
            measured,
            threshold,
            None if data.train is None else count_training_clips(data.train),
            num_resamples=settings.num_resamples,
            seed=settings.seed,
        )
        found["run"] = _run_facts(settings, model_dir, data_settings, data, measured, seconds, world)
        found["run"]["fingerprint"] = opened.fingerprint

        # ----------------------------------------------------------------------------------------------- tell
        if world.is_main:
            _write(settings, model_dir, measured, found, data)
        return found
    finally:
        processes.stop()


def model_dir_of(folder: Path) -> Path:
    """The model folder itself, or a run's best model. ValueError when there is neither."""
    if not (folder / CONFIG_FILE).is_file() and (folder / "model_best" / CONFIG_FILE).is_file():
        return folder / "model_best"
    read_config(folder)
    return folder


def data_settings_of(settings: EvaluateSettings, model_dir: Path) -> DataSettings:
    """The data settings of the training run that the model lies in, where it does, with those given here instead.

    Raises ValueError when neither says what to measure on.
    """
    base, config_path = Config(), find_run_config(model_dir)
    if config_path is not None:
        apply_file(base, config_path)
        logger.info("settings of the training run: %s", config_path)
    given = {f.name: getattr(settings, f.name) for f in dataclasses.fields(DataSettings) if hasattr(settings, f.name)}
    given = {name: value for name, value in given.items() if value is not None}
    if config_path is None and settings.test_samples_path is None:
        raise ValueError(
            f"test_samples_path: not given, and {model_dir} lies in no run directory with a config.toml; "
            "set --test_samples_path, and --glossary_path where there is one"
        )
    chosen = dataclasses.replace(base.data, **given)
    chosen.validate()
    return chosen


def find_run_config(model_dir: Path) -> Path | None:
    """config.toml of the run that <run>/model_best or <run>/checkpoints/step-... lies in."""
    places = [folder / "config.toml" for folder in model_dir.absolute().parents[:2]]
    return next((place for place in places if place.is_file()), None)


def _distractors(settings: EvaluateSettings, data: MeasuredSets, data_settings: DataSettings) -> tuple[str, ...]:
    if settings.distractors is None:
        return ()
    candidates = load_glossary(find_file(settings.distractors, data_settings.data_root, "--distractors"))
    right = {term for clip in [*data.test, *(data.dev or ())] for term in clip.terms}
    groups = {candidates.group(term) for term in right}
    if data.glossary is not None:
        groups |= {data.glossary.group(term) for term in right}
        groups |= {candidates.group(a) for e in data.glossary.entries if e.key in right for a in e.aliases}
    return tuple(draw_distractors(candidates, data.terms, groups, max(settings.distractor_sizes), settings.seed))


def _calibrate(
    settings: EvaluateSettings,
    data_settings: DataSettings,
    data: MeasuredSets,
    evaluator: Evaluator,
    opened: OpenedModel,
) -> dict[str, Any]:
    """Choose the threshold on the dev clips against the glossary, without distractors."""
    assert settings.calibrate is not None
    target = Target.parse(settings.calibrate)
    if data.dev is None and evaluator.world.is_main:
        logger.warning("no --dev_samples_path: the threshold is calibrated on the test clips, so it fits them too well")
    dev = dataclasses.replace(evaluator, clips=data.dev or data.test, distractors=(), distractor_sizes=())
    measured = dev.measure(opened.built.model, opened.built.tokenizer, settings.k)
    point = calibrate(measured.ranks, target, settings.k)
    samples = data_settings.dev_samples_path or data_settings.test_samples_path
    return describe_threshold(point, target, measured.num_glossary, measured.ranks.num_clips, samples)


def _run_facts(
    settings: EvaluateSettings,
    model_dir: Path,
    data_settings: DataSettings,
    data: MeasuredSets,
    measured: Measured,
    seconds: float,
    world: World,
) -> dict[str, Any]:
    """What was measured with what, how fast: everything that is not the result itself."""
    return data_facts(measured, data.train, data.drops) | {
        "model_dir": str(model_dir.absolute()),
        "samples": data_settings.test_samples_path,
        "glossary": data_settings.glossary_path,
        "distractors": settings.distractors,
        "seconds": seconds,
        "clips_per_s": measured.ranks.num_clips / seconds,
        "terms_per_s": len(measured.terms) / seconds,
        "world_size": world.world_size,
        "gpu_peak_gib": torch.cuda.max_memory_allocated() / 2**30 if world.device.type == "cuda" else None,
        "environment": environment(str(world.device)),
    }


def _write(
    settings: EvaluateSettings, model_dir: Path, measured: Measured, found: dict[str, Any], data: MeasuredSets
) -> None:
    """Table, JSON and what else was asked for; rank 0 alone."""
    show_account(found)
    json_path = Path(settings.json) if settings.json else model_dir.with_name(f"{model_dir.name}.evaluation.json")
    json_path.parent.mkdir(parents=True, exist_ok=True)
    write_file_atomically(json_path, json_bytes(found))
    written = {"all figures": json_path}
    if settings.trec is not None:
        write_trec(Path(settings.trec), measured)
        written["TREC"] = Path(settings.trec)
    if settings.beir is not None:
        write_beir(Path(settings.beir), measured)
        written["BEIR"] = Path(settings.beir)
    if settings.report is not None:
        config_path = find_run_config(model_dir)
        run_dir = None if config_path is None else config_path.parent
        write_report(Path(settings.report), run_dir, measured, found, data.reader)
        written["report"] = Path(settings.report)
    for name, place in written.items():
        console.print(f"{name:12s}{place}", markup=False)


def parse(argv: Sequence[str] | None = None, quiet: bool = False) -> EvaluateSettings:
    """Settings from the command line. SystemExit on --help or a wrong flag."""
    return tyro.cli(
        EvaluateSettings, args=argv, use_underscores=True, console_outputs=not quiet, prog="bin/evaluate.py"
    )


def main() -> int:
    def program() -> None:
        evaluate(parse(quiet=os.environ.get("RANK", "0") != "0"))

    return run_program("bin/evaluate.py", program)


if __name__ == "__main__":
    sys.exit(main())
