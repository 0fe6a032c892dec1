"""Turn samples of any format that is read into samples of this project, lhotse cuts, or a NeMo manifest.

    python bin/convert.py --samples_path GigaSpeech.json --gigaspeech_subset XS --glossary_path terms.json \\
        --audio_root /data/gigaspeech --output train.jsonl
    python bin/convert.py --samples_path aligned/ --glossary_path terms.json --output chunks.jsonl
    python bin/convert.py --samples_path train.json --output_format lhotse_cuts --output cuts.jsonl.gz
    python bin/convert.py --samples_path train.json --output_format nemo_manifest --output manifest.json

Read are: term chunks and chunk rows (JSON, JSON Lines), GigaSpeech.json, lhotse cuts, NeMo manifests, a folder of
TextGrids with their audio, webdataset tars. Samples without labels get them from --glossary_path: the longest terms
that their text names. Audio is never copied; paths in the output are absolute.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import tyro

from bin.ending import run_program
from bin.runlog import configure_logging
from bin.samples import read_samples, write_lines
from data.audio import AudioError
from data.clips import Clip
from data.containers import place_of
from data.drops import DropLog
from data.formats import lhotse_cuts, nemo_manifest, term_chunks
from data.settings import InputSettings

logger = logging.getLogger("earmark")

WRITERS: dict[str, Callable[[Clip], dict[str, Any]]] = {
    "term_chunks": term_chunks.record_of,
    "lhotse_cuts": lhotse_cuts.cut_of,
    "nemo_manifest": nemo_manifest.line_of,
}


@dataclass
class ConvertSettings:
    """Turn samples of any format that is read into samples of this project, lhotse cuts, or a NeMo manifest.

    Try it: python bin/convert.py --samples_path samples/telephony/train.json --output cuts.jsonl.gz
    --output_format lhotse_cuts
    """

    samples_path: str
    """Samples to read: a file, or a folder of TextGrids or tars."""
    output: str
    """File to write, JSON Lines; packed when it ends in .gz. What was dropped goes to <output>.bad_records.jsonl."""
    output_format: Literal["term_chunks", "lhotse_cuts", "nemo_manifest"] = "term_chunks"
    """What to write."""
    input: InputSettings = field(default_factory=InputSettings)


def convert(settings: ConvertSettings) -> int:
    """Write the file; the number of its lines. Raises ValueError when too much has to be dropped."""
    drops = DropLog(settings.input.max_bad_fraction)
    clips = read_samples(settings.samples_path, "--samples_path", settings.input, drops)
    records = list(_records(clips, settings.output_format, drops))
    output = Path(settings.output).expanduser()
    bad_records = output.with_name(output.name + ".bad_records.jsonl")
    drops.check(bad_records if drops.lines() else None)
    write_lines(output, records)
    num_terms = len({term for clip in clips for term in clip.terms})
    num_no_term = sum(clip.is_no_term for clip in clips)
    logger.info("%s: %d clips, %d without a term, %d terms", output, len(records), num_no_term, num_terms)
    logger.info("%s", drops.summary())
    return len(records)


def _records(clips: list[Clip], output_format: str, drops: DropLog) -> Iterator[dict[str, Any]]:
    write = WRITERS[output_format]
    for clip in clips:
        # Other programs know nothing of places within a tar or an old shard.
        if output_format != "term_chunks" and place_of(clip.audio_path).size is not None:
            drops.add("inside_container", clip.source, f"{clip.audio_path} is no file of its own")
            continue
        try:
            yield write(clip)
        except AudioError as error:
            drops.add(error.reason, clip.source, f"{clip.audio_path}: {error.detail}")


def main(argv: Sequence[str] | None = None) -> int:
    settings = tyro.cli(
        tyro.conf.OmitArgPrefixes[ConvertSettings], args=argv, use_underscores=True, prog="bin/convert.py"
    )
    configure_logging(0, None)

    def program() -> None:
        convert(settings)

    return run_program("bin/convert.py", program)


if __name__ == "__main__":
    sys.exit(main())
