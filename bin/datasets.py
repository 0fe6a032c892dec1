"""The data stage of a run: sample files in, checked clips and a glossary out, or one clear error.

Order: read the files, read every audio header once, refuse leaks between training and test, enforce the drop limit.
"""

import logging
from collections.abc import Sequence
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
from data.shards import is_packed, open_packed
from data.table import ClipTable, terms_of
from data.windows import Windows, load_prompts
from distributed.collectives import barrier, gather_json
from distributed.processes import World

logger = logging.getLogger(__name__)


@dataclass
class Datasets:
    train: Sequence[Clip]
    test: Sequence[Clip]
    dev: Sequence[Clip] | None  # None: the test set serves as dev set too
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
    files = _find_files(wanted, settings)
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
            refuse_leaks(clips["train"], some, name, settings.check_leak_content)
            refuse_leaks(windowed, some, name, settings.check_leak_content)

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

    test: Sequence[Clip]
    dev: Sequence[Clip] | None
    train: Sequence[Clip] | None  # labels only: their audio is not looked at; None when the file is not at hand
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
    files = _find_files(wanted, settings)
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
        train_file = _find_files({"train": settings.train_samples_path}, settings)["train"]
    except ValueError as error:
        if world.is_main:
            logger.warning("seen and unseen terms, and training frequencies, are not told apart: %s", error)
    else:
        labels_only = DropLog()
        train = _load(train_file, settings, labels_only)
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


def _find_files(wanted: dict[str, str | None], settings: DataSettings) -> dict[str, Path]:
    """Samples files, or folders of such or of shards. ValueError names the flag and where it looked."""
    return {
        name: find_file(path, settings.data_root, f"--{name}_samples_path", or_folder=True)
        for name, path in wanted.items()
        if path is not None
    }


def _load(path: Path, settings: DataSettings, drops: DropLog) -> Sequence[Clip]:
    """A packed folder stays where it is, mapped; anything else becomes a list."""
    if not is_packed(path):
        return load_clips(path, settings, drops)
    table = open_packed(path)
    drops.seen(len(table))
    return table


def _load_checked(
    files: dict[str, Path], accounts: dict[str, DropLog], settings: DataSettings, world: World
) -> dict[str, Sequence[Clip]]:
    """The clips of each file, their audio headers checked where that is asked for: on rank 0 first, which caches."""
    clips: dict[str, Sequence[Clip]] = {n: _load(path, settings, accounts[n]) for n, path in files.items()}
    if settings.check_audio:
        if not world.is_main:
            barrier()
        # What is packed was checked, and decoded, when it was.
        loose = {n: some for n, some in clips.items() if isinstance(some, list)}
        clips |= {n: check_clips(some, accounts[n], settings.check_cache_path) for n, some in loose.items()}
        if world.is_main:
            barrier()
    return clips


def _ranked_terms(clips: dict[str, Sequence[Clip]], glossary: Glossary | None, world: World) -> list[str]:
    """The glossary, and labels of test and dev that it lacks; without one, all labels."""
    labels = {name: terms_of(some) for name, some in clips.items()}
    if glossary is None:
        return sorted({term for some in labels.values() for term in some})
    known = set(glossary.terms)
    measured = dict.fromkeys([*labels["test"], *labels.get("dev", ())])
    absent = [term for term in measured if term not in known]
    if absent and world.is_main:
        logger.warning("%d labels are not in the glossary and join it for evaluation: %s", len(absent), absent[:5])
    return [*glossary.terms, *absent]


def _seen_terms(train: Sequence[Clip], windows: Windows | None) -> frozenset[str]:
    """Terms that are a positive of a training clip, or may be one of a random window."""
    named = frozenset(terms_of(train))
    return named if windows is None else named | windows.possible_terms()


def _tell(clips: dict[str, Sequence[Clip]], files: dict[str, Path], drops: DropLog) -> None:
    for name, some in clips.items():
        num_no_term = int(some.is_no_term_C.sum()) if isinstance(some, ClipTable) else sum(c.is_no_term for c in some)
        logger.info("%s: %d clips (%d without a term) from %s", name, len(some), num_no_term, files[name])
    if drops.counts or drops.notes:
        logger.info("%s", drops.summary())


def _load_windows(
    settings: DataSettings, train: Sequence[Clip], glossary: Glossary | None, drops: DropLog
) -> Windows | None:
    if settings.word_times_path is None or settings.window_fraction == 0:
        return None
    path = find_file(settings.word_times_path, settings.data_root, "--word_times_path")
    terms = {*terms_of(train), *(glossary.terms if glossary else ())}
    return Windows(load_prompts(path, settings, drops), sorted(terms), settings)
