"""TextGrids of the Montreal Forced Aligner, with the audio and a glossary: windows around the terms that are spoken.

    aligned/ann/call7.TextGrid    tier "words": 0.00-0.42 "press", 0.42-0.55 "the", 0.55-0.90 "pound", 0.90-1.30 "key"
    aligned/ann/call7.wav         the audio, of the same name beside it, or in the same place under --audio_root
 -> Clip("ann/call7_term_0", ".../call7.wav", 0.0, 2.3, text="press the pound key", terms=("pound key",), speaker="ann")

How windows are cut, and those without a term, is told in data/term_windows.py. Tiers are "words" (the speaker is the
folder, as the aligner has it) or "NAME - words" of several speakers, each cut by itself. Empty intervals, <eps>, sil
and sp are pauses; <unk> and spn are words that nobody knows: they match no term, and no window without a term has one.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

from data.clip import Clip
from data.fields import RecordError
from data.formats.source import Source
from data.phrases import words_of
from data.term_windows import TermWindows
from data.textgrid import Interval, read_textgrid
from data.timed_words import Prompt

PAUSES = {"", "<eps>", "sil", "sp", "<sil>", "{sl}"}
UNKNOWN = {"<unk>", "spn", "<spn>"}
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff")


def clips(source: Source) -> Iterator[Clip]:
    """Windows of every TextGrid of a folder, by path, or of one file. Raises ValueError without a glossary."""
    settings = source.settings
    windows = TermWindows(source.phrases, settings.term_margin_s, settings.no_term_ratio)
    is_folder = source.path.is_dir()
    paths = sorted(source.path.rglob("*.TextGrid")) if is_folder else [source.path]
    root = source.path if is_folder else source.path.parent

    def make(where: str, path: Path) -> Iterable[Clip]:
        for prompt in _prompts(path, path.relative_to(root), source):
            yield from windows.cut(prompt, where)

    yield from source.convert(((str(path), path) for path in paths), make)
    windows.report(str(source.path))


def _prompts(path: Path, name: Path, source: Source) -> Iterator[Prompt]:
    try:
        grid = read_textgrid(path)
    except ValueError as error:
        raise RecordError("bad_textgrid", str(error)) from error
    tiers = {tier: items for tier, items in grid.tiers.items() if tier.lower().split(" - ")[-1].strip() == "words"}
    if not tiers:
        raise RecordError("no_words_tier", f"the tiers are {', '.join(grid.tiers)[:100]}; one has to be called words")
    audio = _audio_of(name, source)
    for tier, items in tiers.items():
        speaker = tier.rpartition(" - ")[0].strip() or (name.parent.name if name.parent.name else "")
        prompt_id = str(name.with_suffix("")) + (f"_{speaker}" if len(tiers) > 1 else "")
        words, starts_s, ends_s = _words(items)
        if not words:
            source.drops.note("no_speech", str(path), f"tier {tier} has no word")
            continue
        prompt = Prompt(
            prompt_id, audio, grid.end_s, words, starts_s, ends_s, grid.start_s, speaker, str(name.with_suffix(""))
        )
        yield prompt


def _audio_of(name: Path, source: Source) -> str:
    tried: list[RecordError] = []
    for suffix in AUDIO_SUFFIXES:
        try:
            return source.resolver.resolve(str(name.with_suffix(suffix)))
        except RecordError as error:
            tried.append(error)
    raise RecordError(tried[0].reason, f"{tried[0].detail}, also with {', '.join(AUDIO_SUFFIXES[1:])}")


def _words(items: list[Interval]) -> tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]:
    """(words, starts, ends); an interval of several words (a compound) gives each the whole time."""
    found: list[tuple[str, float, float]] = []
    for start_s, end_s, text in items:
        label = text.strip().lower()
        if label in PAUSES or end_s <= start_s:
            continue
        for word in [""] if label in UNKNOWN else words_of(label):
            found.append((word, start_s, end_s))
    words, starts_s, ends_s = zip(*found, strict=True) if found else ((), (), ())
    return words, starts_s, ends_s
