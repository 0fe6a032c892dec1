"""Cuts written and read by lhotse itself."""

import json
from pathlib import Path

import lhotse
import pytest
from lhotse import CutSet, Recording, RecordingSet, SupervisionSegment, SupervisionSet
from lhotse.supervision import AlignmentItem

from data.formats.lhotse_cuts import cut_of

WORDS = ("please", "press", "the", "pound", "key", "now", "and", "wait")


@pytest.fixture
def recording(wav):
    return Recording.from_file(wav("call7.wav", seconds=10.0))


def supervision(number=1, start=2.0, duration=4.0, words=WORDS, aligned=False, **changes):
    alignment = {"word": [AlignmentItem(word, start + 0.5 * at, 0.4) for at, word in enumerate(words)]}
    fields = {"text": " ".join(words), "speaker": "ann", "alignment": alignment if aligned else None} | changes
    return SupervisionSegment(f"s{number}", "call7", start, duration, **fields)


@pytest.fixture
def cuts(recording, tmp_path):
    """cuts(supervision, ...) -> a file that lhotse wrote of the cuts that it made."""

    def write(*supervisions, trim=True, change=None):
        made = CutSet.from_manifests(
            recordings=RecordingSet.from_recordings([recording]),
            supervisions=SupervisionSet.from_segments(supervisions),
        )
        made = made.trim_to_supervisions() if trim else made
        path = tmp_path / "cuts.jsonl.gz"
        made = CutSet.from_cuts(cut if change is None else change(cut) for cut in made)
        made.to_file(path)
        return path

    return write


@pytest.mark.parametrize("trim", [True, False])
def test_supervisions_are_clips(cuts, load, glossary, trim, tmp_path):
    glossary("Pound Key", "pound")
    clips, drops = load(cuts(supervision(1), supervision(2, 7.0, 2.5, words=("hold", "on")), trim=trim))
    assert [(clip.clip_id, clip.start_s, clip.end_s, clip.terms) for clip in clips] == [
        ("s1", 2.0, 6.0, ("pound key",)),
        ("s2", 7.0, 9.5, ()),
    ]
    assert clips[0].audio_path == str(tmp_path / "call7.wav")
    assert (clips[0].speaker, clips[0].recording, clips[0].ignored) == ("ann", "call7", ("pound",))
    assert drops.num_dropped == 0


@pytest.mark.parametrize("trim", [True, False])
def test_with_word_times_windows_are_cut_around_terms(cuts, load, glossary, trim):
    glossary("Pound Key", "press")
    clips, drops = load(cuts(supervision(aligned=True), trim=trim), term_margin_s=0.6, no_term_ratio=0.5)
    spans = {clip.clip_id: (clip.start_s, clip.end_s, clip.text, clip.terms, clip.ignored) for clip in clips}
    # "press" is at 2.5 to 2.9 s of the recording, "pound key" at 3.5 to 4.4 s.
    assert spans["s1_term_0"] == (2.0, 3.5, "please press the", ("press",), ())
    assert spans["s1_term_1"] == (2.9, 5.0, "the pound key now", ("pound key",), ())
    [no_term] = [clip for clip in clips if clip.is_no_term]
    assert 4.4 <= no_term.start_s < no_term.end_s <= 6.0
    assert no_term.text
    assert drops.num_dropped == 0


def test_word_times_on_the_clock_of_the_cut_are_moved_to_the_recordings(cuts, load, glossary):
    glossary("pound key")
    words = [AlignmentItem("pound", 0.1, 0.4), AlignmentItem("key", 0.6, 0.3)]
    path = cuts(supervision(start=5.0, duration=1.0, words=("pound", "key"), alignment={"word": words}))
    [clip], _ = load(path, term_margin_s=0.05, no_term_ratio=0.0)
    assert (clip.start_s, clip.end_s) == (5.05, 5.95)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda cut: cut.pad(8.0), "unsupported_cut"),
        (lambda cut: cut.perturb_speed(1.1), "changed_recording"),
        (lambda cut: lhotse.utils.fastcopy(cut, channel=1), None),
        (lambda cut: cut.resample(8000), None),
    ],
    ids=["padded", "faster", "channel", "resampled"],
)
def test_cuts_whose_audio_is_not_in_their_file_are_dropped(cuts, load, glossary, change, reason):
    glossary("pound")
    path = cuts(supervision(), supervision(2, 7.0, 2.0), change=lambda cut: change(cut) if cut.id == "s2" else cut)
    clips, drops = load(path)
    assert [clip.clip_id for clip in clips] == (["s1"] if reason else ["s1", "s2"])
    assert drops.counts == ({reason: 1} if reason else {})


def bad_lines(good):
    recording = good["recording"]
    [source] = recording["sources"]
    yield "several_channels", good | {"recording": recording | {"sources": [source | {"channels": [0, 1]}]}}
    yield "unsupported_source", good | {"recording": recording | {"sources": [source | {"type": "url"}]}}
    yield "unsupported_source", good | {"recording": recording | {"sources": []}}
    yield "wrong_type", good | {"recording": recording | {"transforms": 5}}
    yield "bad_span", good | {"duration": 1e-9}
    yield "not_an_object", good | {"recording": None}
    yield "not_an_object", good | {"supervisions": [5]}
    yield "wrong_type", good | {"supervisions": {}}
    yield "bad_span", good | {"start": -1}
    yield "bad_span", good | {"duration": 0}
    yield "missing_field", {name: value for name, value in good.items() if name != "duration"}
    [one] = good["supervisions"]
    yield "bad_words", good | {"supervisions": [one | {"alignment": {"word": [["pound", 90.0, 0.1, None]]}}]}
    yield "bad_words", good | {"supervisions": [one | {"alignment": {"word": [["pound"]]}}]}
    yield "wrong_type", good | {"supervisions": [one | {"custom": {"terms": "x"}}]}


def test_bad_cuts_are_dropped_and_counted(cuts, load, glossary, tmp_path):
    glossary("pound")
    good = next(iter(CutSet.from_file(cuts(supervision())))).to_dict()
    path = tmp_path / "bad.jsonl"
    for reason, line in bad_lines(good):
        path.write_text("".join(json.dumps(one) + "\n" for one in (line, good)))
        clips, drops = load(path)
        assert [clip.clip_id for clip in clips] == ["s1"], line
        assert drops.counts == {reason: 1}, line


def test_lhotse_reads_what_is_written_and_so_do_we(load, samples, record, wav, tmp_path):
    wav("a.wav", seconds=2.0)
    wav("b.wav", seconds=1.0)
    rows = [
        record(term_chunk_audio_start=0.25, term_chunk_audio_end=1.5, partial_terms=["hall"], speaker="ann"),
        record(segment_id="whole", term_chunk_audio="b.wav", term_chunk_audio_ground_truth_terms=[]),
    ]
    clips, _ = load(samples(rows))
    path = tmp_path / "out.jsonl"
    path.write_text("".join(json.dumps(cut_of(clip)) + "\n" for clip in clips))
    read = list(CutSet.from_file(path))
    for cut, clip in zip(read, clips, strict=True):
        lhotse.qa.validate(cut)
        assert cut.supervisions[0].text == clip.text
        assert Path(cut.recording.sources[0].source) == Path(clip.audio_path)
    assert read[0].load_audio().shape == (1, 20_000)
    assert read[1].load_audio().shape == (1, 16_000)
    again, drops = load(path)
    assert not drops.counts
    same = ("clip_id", "audio_path", "text", "terms", "surfaces", "ignored", "speaker", "is_no_term")
    assert [[getattr(clip, name) for name in same] for clip in again] == [
        [getattr(clip, name) for name in same] for clip in clips
    ]
    assert [(clip.start_s, clip.end_s) for clip in again] == [(0.25, 1.5), (0.0, 1.0)]
