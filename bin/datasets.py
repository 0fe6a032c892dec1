"""The data stage of a run: sample files in, checked clips and a glossary out, or one clear error.

Order: read the files, read every audio header once, refuse leaks between training and test, enforce the drop limit.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from bin.negatives import load_negatives
from data.checks import check_clips
from data.clips import Clip, load_clips
from data.drops import DropLog
from data.glossary import Glossary, load_glossary
from data.leaks import refuse_leaks
from data.mined import ClipNegatives
from data.reader import AudioReader
from data.records import find_file
from data.settings import DataSettings
from data.windows import Windows, load_prompts
from distributed.collectives import barrier, gather_json
from distributed.processes import World

logger = logging.getLogger(__name__)


@dataclass
class Datasets:
    train: list[Clip]
    test: list[Clip]
    dev: list[Clip] | None  # None: the test set serves as dev set too
    glossary: Glossary | None
    windows: Windows | None
    negatives: ClipNegatives | None
    terms: list[str]  # what evaluation ranks: the glossary, and labels of test and dev that it lacks
    seen_terms: frozenset[str]  # terms that are a positive of a training clip or may be one of a random window
    reader: AudioReader
    drops: DropLog


def load_datasets(settings: DataSettings, world: World, bad_records: Path | None) -> Datasets:
    """All data of a run. Every rank calls it; rank 0 reads the headers first, the others find its cache.

    Raises ValueError for a missing file, a leak, or more drops than max_bad_fraction.
    """
    wanted = {
        "train": settings.train_samples_path,
        "test": settings.test_samples_path,
        "dev": settings.dev_samples_path,
    }
    files = {
        n: find_file(p, settings.data_root, f"--{n}_samples_path", or_folder=True)
        for n, p in wanted.items()
        if p is not None
    }
    # One account a file, so that a large training file cannot hide a broken test file.
    accounts = {name: DropLog(settings.max_bad_fraction) for name in files}
    clips = _load_checked(files, accounts, settings, world)
    drops = DropLog(settings.max_bad_fraction)
    glossary = None
    if settings.glossary_path is not None:
        glossary = load_glossary(find_file(settings.glossary_path, settings.data_root, "--glossary_path"), drops)
    windows = _load_windows(settings, clips["train"], glossary, drops)
    run_dir = None if bad_records is None else bad_records.parent
    negatives = load_negatives(settings, clips["train"], glossary, run_dir, drops) if clips["train"] else None
    for account in accounts.values():
        drops.absorb(account)
    if bad_records is not None and world.is_main:
        drops.write(bad_records)
    for account in (*accounts.values(), drops):
        account.written_to = drops.written_to
        account.check()

    windowed = [] if windows is None else windows.whole_clips()
    for name, some in clips.items():
        if not some:
            raise ValueError(f"--{name}_samples_path: {files[name]} has no usable clip left; {drops.summary()}")
        if name != "train":
            refuse_leaks([*clips["train"], *windowed], some, name, settings.check_leak_content)

    _tell(clips, files, drops)
    if "dev" not in clips and world.is_main:
        logger.warning(
            "no --dev_samples_path: the test set also steers learning rate and stopping, so its figures are optimistic"
        )
    return Datasets(
        clips["train"],
        clips["test"],
        clips.get("dev"),
        glossary,
        windows,
        negatives,
        _ranked_terms(clips, glossary, world),
        _seen_terms(clips["train"], windows),
        AudioReader(settings.audio_cache_mb),
        drops,
    )


@dataclass
class MeasuredSets:
    """What a trained model is measured on."""

    test: list[Clip]
    dev: list[Clip] | None
    train: list[Clip] | None  # labels only: their audio is not looked at; None when the file is not at hand
    glossary: Glossary | None
    terms: list[str]
    seen_terms: frozenset[str]
    reader: AudioReader
    drops: DropLog


def load_measured_sets(settings: DataSettings, world: World) -> MeasuredSets:
    """Test and dev clips and the glossary of an evaluation; training labels where their file is at hand.

    Raises ValueError as `load_datasets` does, a leak included.
    """
    wanted = {"test": settings.test_samples_path, "dev": settings.dev_samples_path}
    files = {n: find_file(p, settings.data_root, f"--{n}_samples_path") for n, p in wanted.items() if p is not None}
    accounts = {name: DropLog(settings.max_bad_fraction) for name in files}
    clips = _load_checked(files, accounts, settings, world)
    drops = DropLog(settings.max_bad_fraction)
    for name, account in accounts.items():
        account.check()
        drops.absorb(account)
        if not clips[name]:
            raise ValueError(f"--{name}_samples_path: {files[name]} has no usable clip left; {drops.summary()}")
    glossary = None
    if settings.glossary_path is not None:
        glossary = load_glossary(find_file(settings.glossary_path, settings.data_root, "--glossary_path"), drops)

    train, seen_terms = None, frozenset[str]()
    try:
        train_file = find_file(settings.train_samples_path, settings.data_root, "--train_samples_path")
    except ValueError as error:
        if world.is_main:
            logger.warning("seen and unseen terms, and training frequencies, are not told apart: %s", error)
    else:
        labels_only = DropLog()
        train = load_clips(train_file, settings, labels_only)
        if labels_only.num_dropped and world.is_main:
            logger.warning("%s: %s; their terms do not count as seen", train_file, labels_only.summary())
        windows = _load_windows(settings, train, glossary, DropLog())
        for name, some in clips.items():
            refuse_leaks(train, some, name, settings.check_leak_content)
        seen_terms = _seen_terms(train, windows)
    _tell(clips, files, drops)
    reader = AudioReader(settings.audio_cache_mb)
    terms = _ranked_terms(clips | ({"train": train} if train else {}), glossary, world)
    return MeasuredSets(clips["test"], clips.get("dev"), train, glossary, terms, seen_terms, reader, drops)


def merge_drops(drops: DropLog, world: World, bad_records: Path | None) -> None:
    """Bring what any rank dropped while reading to all, write the list, enforce the limit. A collective."""
    lines = [line for part in gather_json(drops.lines()) for line in part]
    for line in lines:
        (drops.add if line["kind"] == "drop" else drops.note)(line["reason"], line["source"], line["detail"])
    if world.is_main and lines and bad_records is not None:
        drops.write(bad_records)
    drops.check()


def _load_checked(
    files: dict[str, Path], accounts: dict[str, DropLog], settings: DataSettings, world: World
) -> dict[str, list[Clip]]:
    """The clips of each file, their audio headers checked where that is asked for: on rank 0 first, which caches."""
    clips = {name: load_clips(path, settings, accounts[name]) for name, path in files.items()}
    if settings.check_audio:
        if not world.is_main:
            barrier()
        clips = {n: check_clips(some, accounts[n], settings.check_cache_path) for n, some in clips.items()}
        if world.is_main:
            barrier()
    return clips


def _ranked_terms(clips: dict[str, list[Clip]], glossary: Glossary | None, world: World) -> list[str]:
    """The glossary, and labels of test and dev that it lacks; without one, all labels."""
    labels = {name: dict.fromkeys(term for clip in some for term in clip.terms) for name, some in clips.items()}
    if glossary is None:
        return sorted({term for some in labels.values() for term in some})
    known = set(glossary.terms)
    measured = labels["test"] | labels.get("dev", {})
    absent = [term for term in measured if term not in known]
    if absent and world.is_main:
        logger.warning("%d labels are not in the glossary and join it for evaluation: %s", len(absent), absent[:5])
    return [*glossary.terms, *absent]


def _seen_terms(train: list[Clip], windows: Windows | None) -> frozenset[str]:
    """Terms that are a positive of a training clip, or may be one of a random window."""
    named = frozenset(term for clip in train for term in clip.terms)
    return named if windows is None else named | windows.possible_terms()


def _tell(clips: dict[str, list[Clip]], files: dict[str, Path], drops: DropLog) -> None:
    for name, some in clips.items():
        num_no_term = sum(clip.is_no_term for clip in some)
        logger.info("%s: %d clips (%d without a term) from %s", name, len(some), num_no_term, files[name])
    if drops.counts or drops.notes:
        logger.info("%s", drops.summary())


def _load_windows(
    settings: DataSettings, train: list[Clip], glossary: Glossary | None, drops: DropLog
) -> Windows | None:
    if settings.word_times_path is None or settings.window_fraction == 0:
        return None
    path = find_file(settings.word_times_path, settings.data_root, "--word_times_path")
    terms = {term for clip in train for term in clip.terms} | set(glossary.terms if glossary else ())
    return Windows(load_prompts(path, settings, drops), sorted(terms), settings)
