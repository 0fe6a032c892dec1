"""GigaSpeech.json: one object whose `audios` list long recordings, each with the times and text of its segments.

    {"dataset": "GigaSpeech", "audios": [
      {"aid": "POD0000000002", "path": "audio/podcast/P0000/POD0000000002.opus", "speaker": "N/A", "segments": [
        {"sid": "POD0000000002_S0000091", "begin_time": 159.0, "end_time": 167.5, "subsets": ["{XL}"],
         "text_tn": "WELCOME TO THE CITY OF ARTESIA <COMMA> IN CALIFORNIA <PERIOD>"}, ...]}, ...]}
 -> Clip("POD0000000002_S0000091", ".../POD0000000002.opus", 159.0, 167.5,
         text="welcome to the city of artesia, in california.", terms=("artesia",))

Labels are the glossary's terms in the text. The recordings are read by span, never cut up. A segment whose text is
only <SIL>, <MUSIC>, <NOISE> or <OTHER> holds no speech and is noted, not dropped. `gigaspeech_subset` selects
segments. (Chen et al., GigaSpeech, 2021.)
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from data.clip import Clip, make_clip
from data.fields import RecordError, as_object, check_order, label_of, seconds_of, shown, text_of
from data.formats.source import Source
from data.records import iterate_array_in

PUNCTUATION = {"<COMMA>": ",", "<PERIOD>": ".", "<QUESTIONMARK>": "?", "<EXCLAMATIONPOINT>": "!"}
NO_SPEECH = {"<SIL>", "<MUSIC>", "<NOISE>", "<OTHER>"}


def clips(source: Source) -> Iterator[Clip]:
    """One clip a segment. Raises ValueError without a glossary, or when no segment is of the wanted subset."""
    _ = source.phrases  # says at once when there is no glossary
    found = False
    for clip in source.convert(_segments(source), lambda where, pair: _clip_of(pair[0], pair[1], where, source)):
        found = True
        yield clip
    if not found and source.settings.gigaspeech_subset and not source.drops.counts:
        raise ValueError(f"{source.path}: no segment is of gigaspeech_subset {source.settings.gigaspeech_subset!r}")


def _segments(source: Source) -> Iterator[tuple[str, tuple[Any, Any]]]:
    """(file:audio/segment, (audio, segment)) of the wanted subset; an audio that is none comes once, with None."""
    wanted = source.settings.gigaspeech_subset and "{" + source.settings.gigaspeech_subset.strip("{}").upper() + "}"
    for index, audio in iterate_array_in(source.path, "audios"):
        segments = audio.get("segments") if isinstance(audio, dict) else None
        if not isinstance(segments, list):
            yield f"{source.path}:{index}", (audio, None)
            continue
        for number, segment in enumerate(segments):
            subsets = segment.get("subsets", []) if isinstance(segment, dict) else []
            if not wanted or not isinstance(subsets, list) or wanted in subsets:
                yield f"{source.path}:{index}/{number}", (audio, segment)


def _clip_of(audio: Any, segment: Any, where: str, source: Source) -> Iterable[Clip]:
    audio = as_object(audio, "the audio")
    if segment is None:
        raise RecordError("wrong_type", f"segments is {shown(audio.get('segments'))}; allowed is a list of objects")
    segment = as_object(segment, "the segment")
    start_s, end_s = (seconds_of(segment, name, required=True) for name in ("begin_time", "end_time"))
    check_order(start_s, end_s, "begin_time", "end_time")
    words = text_of(segment, "text_tn").split()
    if words and all(word.upper() in NO_SPEECH for word in words):
        source.drops.note("no_speech", where, " ".join(words)[:60])
        return []
    text = " ".join(PUNCTUATION.get(word.upper(), word.lower()) for word in words)
    text = re.sub(r" ([,.?!])", r"\1", text)
    written, ignored = source.phrases.in_text(text)
    # "N/A" is what GigaSpeech writes where it does not know, which is nearly everywhere.
    speaker = text_of(segment, "speaker", default="") or text_of(audio, "speaker", default="")
    return [
        make_clip(
            clip_id=label_of(segment, "sid"),
            audio_path=source.resolver.resolve(text_of(audio, "path", may_be_empty=False)),
            span_s=(start_s, end_s),
            text=text,
            written=written,
            ignored=ignored,
            source=where,
            drops=source.drops,
            speaker="" if speaker == "N/A" else speaker,
            recording=label_of(audio, "aid", default=""),
        )
    ]
