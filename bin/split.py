"""Split samples into training and test, and check that two files share nothing.

    python bin/split.py make --samples_path all.json --output_dir splits --by recording --test_share 0.1
    python bin/split.py make --samples_path all.json --output_dir splits --by speaker --test_share 0.1 \\
        --unseen_share 0.3 --dev_share 0.05
    python bin/split.py check --train_samples_path splits/train.jsonl --test_samples_path splits/test.jsonl

`make` writes train.jsonl, test.jsonl (dev.jsonl), withheld.jsonl with the reason of each clip that is in none of them,
and split.json with what came out. `check` lists leaks of every kind and exits with 1 when there is one.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Literal

import tyro

from bin.ending import run_program
from bin.runlog import configure_logging
from bin.samples import read_samples, write_lines
from data.drops import DropLog
from data.formats.term_chunks import record_of
from data.leaks import Kind, examples_of, find_leaks
from data.settings import InputSettings
from data.splits import RECORDING, Split, enforce_unseen, split_by, unseen_terms, withhold_leaks
from distributed.atomic import json_bytes, write_file_atomically

logger = logging.getLogger("earmark")


@dataclass
class MakeSettings:
    """Split one set of samples into training and test (and dev)."""

    samples_path: str
    """Samples to split, of any format that is read."""
    output_dir: str
    """Folder to write train.jsonl, test.jsonl, dev.jsonl, withheld.jsonl and split.json to."""
    by: Literal["recording", "speaker", "clip"] = "recording"
    """What may not be in both parts. clip: nothing but the clip itself, for splits by unseen terms alone."""
    test_share: float = 0.1
    """Share of the clips to test with, as near as whole recordings or speakers come."""
    dev_share: float = 0.0
    """Share of the clips to steer the training with; 0 = none."""
    unseen_share: float | None = None
    """Share of the distinct test terms that no training or dev clip lets one hear; by default as it comes."""
    same_text_words: int = 4
    """A test clip of so many words or more whose text a training clip has too is withheld; 0 = none is."""
    same_samples: bool = False
    """Compare the decoded samples too, which finds the same audio in another container; reads all audio."""
    recording_pattern: str = RECORDING
    """Regular expression whose first group is the recording, in the id of samples that tell none."""
    seed: int = 0
    """Of the draw."""
    input: InputSettings = field(default_factory=InputSettings)


@dataclass
class CheckSettings:
    """List what a test set shares with a training set: ids, audio, bytes, samples, texts, terms."""

    train_samples_path: str
    """Training samples."""
    test_samples_path: str
    """Test samples."""
    same_text_words: int = 4
    """Shortest text that counts as a leak, in words; 0 = none does."""
    same_samples: bool = True
    """Compare the decoded samples, which finds the same audio in another container; reads all audio."""
    input: InputSettings = field(default_factory=InputSettings)


def make(settings: MakeSettings) -> dict[str, int | float]:
    """Write the parts; what split.json says of them. Raises ValueError when a share cannot be had."""
    for name, share in (("test_share", settings.test_share), ("unseen_share", settings.unseen_share)):
        if share is not None and not 0 < share < 1:
            raise ValueError(f"{name} is {share}; allowed are numbers above 0 and below 1")
    if not 0 <= settings.dev_share < 1 - settings.test_share:
        raise ValueError(f"dev_share is {settings.dev_share}; allowed are 0 to {1 - settings.test_share}")
    drops = DropLog(settings.input.max_bad_fraction)
    clips = read_samples(settings.samples_path, "--samples_path", settings.input, drops)
    output = Path(settings.output_dir).expanduser()
    drops.check(output / "bad_records.jsonl" if drops.lines() else None)

    kinds = _kinds(settings.same_text_words, settings.same_samples)
    split = split_by(clips, settings.by, settings.test_share, settings.seed, settings.recording_pattern)
    split = withhold_leaks(split, kinds, settings.same_text_words)
    if settings.unseen_share is not None:
        split = enforce_unseen(split, settings.unseen_share)
    parts = {"train": split.train, "test": split.test}
    withheld = split.withheld
    if settings.dev_share:
        share = settings.dev_share * len(clips) / len(split.train)
        rest = split_by(split.train, settings.by, share, settings.seed + 1, settings.recording_pattern)
        rest = withhold_leaks(Split(rest.train, rest.test), kinds, settings.same_text_words)
        parts |= {"train": rest.train, "dev": rest.test}
        withheld = [*withheld, *rest.withheld]

    for name, part in parts.items():
        write_lines(output / f"{name}.jsonl", map(record_of, part))
    write_lines(output / "withheld.jsonl", (record_of(clip) | {"withheld": reason} for clip, reason in withheld))
    unseen, terms = unseen_terms([*parts["train"], *parts.get("dev", [])], parts["test"])
    report: dict[str, int | float] = {f"num_{name}": len(part) for name, part in parts.items()}
    report |= {"num_withheld": len(withheld), "num_dropped": drops.num_dropped}
    report |= {"num_test_terms": len(terms), "num_unseen_terms": len(unseen)}
    report["unseen_share"] = len(unseen) / len(terms) if terms else 0.0
    write_file_atomically(output / "split.json", json_bytes({"settings": asdict(settings)} | report))
    for name, value in report.items():
        logger.info("%-18s %s", name, value)
    return report


def check(settings: CheckSettings) -> int:
    """Log the leaks of every kind; how many there are. Raises ValueError for files that cannot be read."""
    drops = DropLog(settings.input.max_bad_fraction)
    train = read_samples(settings.train_samples_path, "--train_samples_path", settings.input, drops)
    test = read_samples(settings.test_samples_path, "--test_samples_path", settings.input, drops)
    drops.check()
    num_leaks = 0
    for kind in _kinds(settings.same_text_words, settings.same_samples):
        leaks = find_leaks(train, test, kind, settings.same_text_words)
        num_leaks += len(leaks)
        logger.info("same %-14s %d of %d test clips%s", kind, len(leaks), len(test), examples_of(leaks))
    unseen, terms = unseen_terms(train, test)
    logger.info("unseen terms        %d of %d test terms", len(unseen), len(terms))
    return num_leaks


def _kinds(same_text_words: int, same_samples: bool) -> list[Kind]:
    kinds: list[Kind] = ["id", "audio", "audio content"]
    kinds += ["text"] if same_text_words else []
    return [*kinds, "samples"] if same_samples else kinds


def main(argv: Sequence[str] | None = None) -> int:
    commands = (
        Annotated[MakeSettings, tyro.conf.subcommand("make")] | Annotated[CheckSettings, tyro.conf.subcommand("check")]
    )
    settings: MakeSettings | CheckSettings = tyro.cli(
        commands,  # type: ignore[arg-type]
        args=argv,
        use_underscores=True,
        prog="bin/split.py",
        description=__doc__,
        config=(tyro.conf.OmitArgPrefixes,),
    )
    configure_logging(0, None)

    def program() -> int:
        if isinstance(settings, CheckSettings):
            return int(check(settings) > 0)
        make(settings)
        return 0

    return run_program("bin/split.py", program)


if __name__ == "__main__":
    sys.exit(main())
