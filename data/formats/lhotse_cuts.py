"""lhotse cuts (cuts.jsonl.gz or .jsonl): each line a cut of a recording, with the supervisions in it.

    {"type": "MonoCut", "id": "c1", "start": 2.0, "duration": 3.0, "channel": 0,
     "supervisions": [{"id": "s1", "start": 0.0, "duration": 3.0, "text": "press the pound key", "speaker": "ann",
                       "alignment": {"word": [["press", 2.1, 0.3, null], ["the", 2.4, 0.2, null], ...]}}],
     "recording": {"id": "call7", "sources": [{"type": "file", "channels": [0], "source": "a/call7.wav"}], ...}}
 -> Clip("s1", ".../a/call7.wav", 2.0, 5.0, text="press the pound key", terms=("pound key",), recording="call7")

A supervision starts relative to its cut, its words count from the start of the recording. Labels are the list
`custom.terms` where there is one (what `cut_of` writes); else, with word times, windows around the glossary's terms
(data/term_windows.py); else the glossary's terms in the text, the supervision being the clip. Audio has to be a file
of one channel; mixed and padded cuts, and recordings that are changed when loaded (all but Resample), are dropped.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from data.audio import AudioError, AudioInfo, probe
from data.clip import Clip, make_clip
from data.fields import RecordError, as_object, as_seconds, label_of, seconds_of, shown, text_of
from data.formats.source import Source
from data.phrases import words_of
from data.term_windows import TermWindows
from data.timed_words import Prompt

EDGE_S = 0.1  # aligners let words stand out a little


def clips(source: Source) -> Iterator[Clip]:
    """Clips of every supervision. Raises ValueError when cuts have no labels and no glossary is set."""
    settings = source.settings
    windows: list[TermWindows] = []  # made when the first word times come

    def make(where: str, cut: dict[str, Any]) -> Iterable[Clip]:
        path, recording = _recording_of(cut, source)
        for supervision in _objects(cut, "supervisions"):
            given = _clip_of(cut, supervision, path, recording, where, source)
            if isinstance(given, Clip):
                yield given
            else:
                if not windows:
                    windows.append(TermWindows(source.phrases, settings.term_margin_s, settings.no_term_ratio))
                yield from windows[0].cut(given, where)

    yield from source.convert_records(make)
    for made in windows:
        made.report(str(source.path))


def _recording_of(cut: dict[str, Any], source: Source) -> tuple[str, str]:
    """(audio path, recording id) of a cut whose audio is what its file holds."""
    kind = cut.get("type", "MonoCut")
    if kind != "MonoCut":
        raise RecordError("unsupported_cut", f"type is {shown(kind)}; allowed is MonoCut, not mixed or padded yet")
    recording = as_object(cut.get("recording"), "recording")
    changed = [one.get("name") for one in _objects(recording, "transforms", default=[])]
    if set(map(str, changed)) - {"Resample"}:
        raise RecordError("changed_recording", f"transforms are {shown(changed)}; allowed is the file as it is")
    sources = _objects(recording, "sources")
    if len(sources) != 1 or sources[0].get("type") != "file":
        raise RecordError("unsupported_source", f"sources are {shown(sources)}; allowed is one of type file")
    if sources[0].get("channels") != [0]:
        channels = shown(sources[0].get("channels"))
        raise RecordError("several_channels", f"channels are {channels}; allowed is [0]: split the file by channel")
    return source.resolver.resolve(text_of(sources[0], "source", may_be_empty=False)), label_of(recording, "id")


def _clip_of(
    cut: dict[str, Any], supervision: dict[str, Any], path: str, recording: str, where: str, source: Source
) -> Clip | Prompt:
    """The supervision as a clip, or with its word times when these are to be cut up."""
    cut_s, within_s = (as_seconds(one.get("start", 0.0), "start") for one in (cut, supervision))
    start_s = cut_s + within_s
    end_s = min(
        start_s + (seconds_of(supervision, "duration", required=True) or 0.0),
        cut_s + (seconds_of(cut, "duration", required=True) or 0.0),
    )
    if not start_s < end_s:
        raise RecordError("bad_span", f"the supervision lasts from {start_s} to {end_s} s of the recording")
    text, name = text_of(supervision, "text", default=""), label_of(supervision, "id", default=where)
    speaker = text_of(supervision, "speaker", default="")
    custom = supervision.get("custom")
    custom = custom if isinstance(custom, dict) else {}
    alignment = supervision.get("alignment")
    if "terms" not in custom and isinstance(alignment, dict) and alignment.get("word"):
        words = _words(alignment["word"], cut_s, (start_s, end_s))
        return Prompt(name, path, end_s, *words, begin_s=start_s, speaker=speaker, recording=recording)
    written, ignored = source.labels(custom, text)
    return make_clip(
        clip_id=name,
        audio_path=path,
        span_s=(round(start_s, 6), round(end_s, 6)),
        text=text,
        written=written,
        ignored=ignored,
        source=where,
        drops=source.drops,
        speaker=speaker,
        recording=recording,
    )


Words = tuple[tuple[str, ...], tuple[float, ...], tuple[float, ...]]


def _words(items: Any, cut_s: float, span_s: tuple[float, float]) -> Words:
    """(words, starts, ends) in seconds of the recording. Times that only fit the cut's own clock are moved to it."""
    found: list[tuple[str, float, float]] = []
    for item in items if isinstance(items, list) else []:
        if not isinstance(item, list) or len(item) < 3 or not isinstance(item[0], str):
            raise RecordError("bad_words", f"a word is {shown(item)}; allowed is [word, start, duration, score]")
        start_s, length_s = as_seconds(item[1], "a word's start"), as_seconds(item[2], "a word's duration")
        for word in words_of(item[0]):
            found.append((word, start_s, start_s + max(length_s, 1e-3)))
    found.sort(key=lambda one: one[1])
    for shift_s in (0.0, cut_s):
        low, high = span_s[0] - shift_s - EDGE_S, span_s[1] - shift_s + EDGE_S
        if all(low <= start_s and end_s <= high for _, start_s, end_s in found):
            words, starts, ends = zip(*found, strict=True) if found else ((), (), ())
            # A little beyond its supervision a word is cut to it.
            starts = tuple(max(start_s + shift_s, span_s[0]) for start_s in starts)
            return words, starts, tuple(min(end_s + shift_s, span_s[1]) for end_s in ends)
    raise RecordError("bad_words", f"word times lie outside their supervision, which is {span_s[0]} to {span_s[1]} s")


def _objects(record: dict[str, Any], name: str, default: list[Any] | None = None) -> list[dict[str, Any]]:
    value = record.get(name) or default if default is not None else record.get(name)
    if not isinstance(value, list):
        raise RecordError("wrong_type", f"{name} is {shown(value)}; allowed is a list of objects")
    return [as_object(one, name) for one in value]


def cut_of(clip: Clip) -> dict[str, Any]:
    """The cut that lhotse reads, and that `clips` reads as this clip again. Reads the header; raises AudioError."""
    info: AudioInfo = probe(clip.audio_path)
    if info.channels != 1:
        raise AudioError(
            "several_channels", f"{info.channels} channels; a MonoCut would be one of them, not their mean"
        )
    start_s = clip.start_s or 0.0
    duration_s = (info.duration_s if clip.end_s is None else min(clip.end_s, info.duration_s)) - start_s
    recording = clip.recording or clip.audio_path
    supervision = {"id": clip.clip_id, "recording_id": recording, "start": 0.0, "duration": round(duration_s, 8)}
    supervision |= {"channel": 0, "text": clip.text} | ({"speaker": clip.speaker} if clip.speaker else {})
    supervision["custom"] = {"terms": list(clip.surfaces), "ignored_terms": list(clip.ignored)}
    return {
        "id": clip.clip_id,
        "start": start_s,
        "duration": round(duration_s, 8),
        "channel": 0,
        "supervisions": [supervision],
        "recording": {
            "id": recording,
            "sources": [{"type": "file", "channels": [0], "source": clip.audio_path}],
            "sampling_rate": info.rate,
            "num_samples": info.frames,
            "duration": info.duration_s,
            "channel_ids": [0],
        },
        "type": "MonoCut",
    }
