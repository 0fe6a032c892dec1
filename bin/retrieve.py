"""Find the terms in audio files, or in live audio on standard input.

    python bin/retrieve.py talk.wav interview.flac --model runs/mine --glossary glossary.json
    arecord -q -f S16_LE -r 16000 -c 1 -t raw | python bin/retrieve.py --mic --model runs/mine --index glossary.index

Files are read as streams of overlapping windows, all of them side by side, so they may be of any length. A line is told
when a term is no longer heard, with its best score and the whole time that it was. Live, a table (on a terminal) or a
line (elsewhere) tells a term as soon as it is heard.
"""

import sys
from pathlib import Path

if __package__ != "bin":  # run as a file: the root goes first on sys.path, and bin/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import json
import logging
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import BinaryIO

import numpy as np
import tyro
from numpy.typing import NDArray
from rich.console import Console
from rich.live import Live
from rich.table import Table

from bin.ending import run_program
from bin.opening import ModelFlags, SearchFlags, log_to_standard_error, open_retriever, threshold_of
from data.audio import SAMPLE_RATE, AudioError, iterate_pcm
from retrieval.matches import Match
from retrieval.stream import Stream, advance

logger = logging.getLogger("earmark")

FILE_BLOCK_S = 9.6
READ_BYTES = 1 << 16


@dataclass
class RetrieveSettings:
    """Find the terms in audio files, or in live audio on standard input."""

    model: tyro.conf.OmitArgPrefixes[ModelFlags]
    search: tyro.conf.OmitArgPrefixes[SearchFlags]
    audio: tyro.conf.Positional[tuple[str, ...]] = ()
    """Audio files of any length (WAV, FLAC, Ogg, MP3, ...)."""
    mic: bool = False
    """Read raw 16-bit little-endian mono samples from standard input instead, until it ends."""
    sample_rate: int = 16_000
    """Of standard input, Hz."""
    window: float = 1.92
    """Seconds that are looked at together."""
    hop: float = 0.96
    """Seconds between two looks."""
    lookback: float = 1.92
    """Seconds for which a term stays after the window that it was found in."""
    json: bool = False
    """Tell terms as JSON Lines."""


@dataclass
class Sightings:
    """Turns what is heard at each moment into terms that come and go."""

    heard: dict[str, Match] = field(default_factory=dict)

    def update(self, matches: Iterable[Match]) -> tuple[list[Match], list[Match]]:
        """(terms that were not heard before; terms no longer heard, each with its best score and its whole time)."""
        now = {match.term: match for match in matches}
        gone = [self.heard.pop(term) for term in sorted(self.heard.keys() - now.keys())]
        come = [match for term, match in now.items() if term not in self.heard]
        for term, match in now.items():
            known = self.heard.get(term, match)
            assert known.start_s is not None and known.end_s is not None  # noqa: PT018
            assert match.start_s is not None and match.end_s is not None  # noqa: PT018
            best = match if match.score > known.score else known
            self.heard[term] = replace(
                best, start_s=min(known.start_s, match.start_s), end_s=max(known.end_s, match.end_s)
            )
        return come, sorted(gone, key=lambda match: (match.start_s, match.term))


def as_line(match: Match, name: str = "") -> str:
    """ "  12.48   14.40  0.782  Voicemail  [zh 语音信箱]", with the file's name in front where there are several."""
    words = "; ".join(f"{language} {', '.join(found)}" for language, found in match.translations.items() if found)
    times = f"{match.start_s:8.2f} {match.end_s:8.2f}"
    return f"{name}{times}  {match.score:5.3f}  {match.surface}" + (f"  [{words}]" if words else "")


def as_json(match: Match, name: str = "") -> str:
    return json.dumps(({"file": name} if name else {}) | vars(match), ensure_ascii=False)


def as_table(matches: Sequence[Match], now_s: float) -> Table:
    """The terms of this moment, best first."""
    table = Table(title=f"{now_s:.1f} s", title_justify="left", min_width=60)
    for name, justify in (("score", "right"), ("term", "left"), ("translations", "left"), ("seconds", "right")):
        table.add_column(name, justify=justify, overflow="fold")  # type: ignore[arg-type]
    for match in matches:
        words = "; ".join(", ".join(found) for found in match.translations.values())
        table.add_row(f"{match.score:.3f}", match.surface, words, f"{match.start_s:.2f} - {match.end_s:.2f}")
    return table


def retrieve_files(paths: Sequence[str], streams: Sequence[Stream], tell_json: bool) -> list[str]:
    """Read all files side by side and print the terms as they go by. Returns what went wrong, a line a file."""
    sightings = [Sightings() for _ in paths]
    width = max(len(Path(path).name) for path in paths) + 2
    problems: list[str] = []

    def tell(place: int, gone: Iterable[Match]) -> None:
        name = paths[place] if tell_json else f"{Path(paths[place]).name:{width}s}" if len(paths) > 1 else ""
        for match in gone:
            print(as_json(match, name) if tell_json else as_line(match, name), flush=True)

    reading: dict[int, Iterator[NDArray[np.int16]]] = {
        place: iterate_pcm(path, FILE_BLOCK_S) for place, path in enumerate(paths)
    }
    while reading:
        blocks: dict[int, NDArray[np.int16]] = {}
        for place in list(reading):
            try:
                blocks[place] = next(reading[place])
            except StopIteration:
                del reading[place]
                streams[place].finish()
                tell(place, sightings[place].update(streams[place].query())[1])
                tell(place, sightings[place].update([])[1])
            except AudioError as error:
                del reading[place]
                problems.append(f"{paths[place]}: {error}")
        # One hop at a time: a term is told when it goes by, not once a block.
        at = dict.fromkeys(blocks, 0)
        while at:
            for place in at:
                hop = round(streams[place].settings.hop_s * SAMPLE_RATE)
                streams[place].feed(blocks[place][at[place] : at[place] + hop])
                at[place] += hop
            advance([streams[place] for place in at])
            for place in list(at):
                tell(place, sightings[place].update(streams[place].query())[1])
                if at[place] >= len(blocks[place]):
                    del at[place]
    return problems


def retrieve_live(source: BinaryIO, stream: Stream, tell_json: bool, console: Console) -> None:
    """Read raw 16-bit samples until the source ends."""
    sightings, odd = Sightings(), b""
    is_table = console.is_terminal and not tell_json
    with Live(as_table([], 0.0), console=console, auto_refresh=False) if is_table else nullcontext() as live:

        def tell() -> None:
            if live is not None:
                live.update(as_table(stream.query(), stream.end_s), refresh=True)
                return
            for match in sightings.update(stream.query())[0]:
                print(as_json(match) if tell_json else as_line(match), flush=True)

        while chunk := os.read(source.fileno(), READ_BYTES):
            chunk = odd + chunk
            whole = len(chunk) // 2 * 2  # a pipe may cut a sample in two
            stream.accept(np.frombuffer(chunk[:whole], dtype="<i2"))
            odd = chunk[whole:]
            tell()
        stream.finish()
        tell()


def retrieve(settings: RetrieveSettings) -> None:
    """The program. Raises ValueError for settings that do not fit, and at the end when a file could not be read."""
    if settings.mic == bool(settings.audio):
        raise ValueError(f"audio: got {len(settings.audio)} files with mic={settings.mic}; allowed: files, or --mic")
    retriever = open_retriever(settings.model, settings.search)
    threshold = threshold_of(retriever, settings.search)
    streams = [
        retriever.stream(
            settings.window,
            settings.hop,
            settings.lookback,
            settings.search.k,
            threshold,
            settings.sample_rate if settings.mic else SAMPLE_RATE,
        )
        for _ in settings.audio or ("mic",)
    ]
    if settings.mic:
        retrieve_live(sys.stdin.buffer, streams[0], settings.json, Console())
        return
    problems = retrieve_files(settings.audio, streams, settings.json)
    if problems:
        raise ValueError(f"{len(problems)} of {len(streams)} files could not be read: " + "; ".join(problems))


def main(argv: Sequence[str] | None = None) -> int:
    def program() -> None:
        retrieve(tyro.cli(RetrieveSettings, args=argv, use_underscores=True, prog="bin/retrieve.py"))

    log_to_standard_error()
    return run_program("bin/retrieve.py", program)


if __name__ == "__main__":
    sys.exit(main())
