"""Folders as the Montreal Forced Aligner leaves them, the grids written by praatio."""

import pytest
from praatio import textgrid as praat

WORDS = [(0.5, 0.9, "press"), (0.9, 1.1, "the"), (1.1, 1.6, "pound"), (1.6, 2.0, "key"), (2.4, 2.8, "<unk>")]


@pytest.fixture
def aligned(tmp_path, wav):
    """aligned("ann/call7.TextGrid", words=[...]) writes grid and audio (4 s)."""

    def write(name, audio=True, **tiers):
        path = tmp_path / "aligned" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        grid = praat.Textgrid()
        for tier, entries in (tiers or {"words": WORDS}).items():
            grid.addTier(praat.IntervalTier(tier.replace("__", " - "), entries, 0, 4.0))
        grid.save(str(path), format="long_textgrid", includeBlankSpaces=True)
        if audio:
            wav(f"aligned/{name.removesuffix('.TextGrid')}.wav", seconds=4.0)
        return tmp_path / "aligned"

    return write


def test_terms_get_windows(aligned, load, glossary):
    glossary("Pound Key", "pound", "voicemail")
    folder = aligned("ann/call7.TextGrid")
    [clip], drops = load(folder, term_margin_s=0.3)
    assert (clip.clip_id, clip.speaker, clip.recording) == ("ann/call7_term_0", "ann", "ann/call7")
    assert (clip.start_s, clip.end_s) == (0.8, 2.3)
    assert clip.audio_path == str(folder / "ann" / "call7.wav")
    assert (clip.text, clip.terms, clip.surfaces) == ("the pound key", ("pound key",), ("Pound Key",))
    assert clip.ignored == ("pound",)
    assert drops.num_dropped == 0
    [alone], _ = load(folder / "ann" / "call7.TextGrid")
    assert alone.clip_id == "call7_term_0"


def test_audio_elsewhere(aligned, load, glossary, wav, tmp_path):
    glossary("pound key")
    folder = aligned("ann/call7.TextGrid", audio=False)
    wav("corpus/ann/call7.flac", seconds=4.0)
    [clip], _ = load(folder, audio_root=str(tmp_path / "corpus"))
    assert clip.audio_path == str(tmp_path / "corpus" / "ann" / "call7.flac")


def test_speakers_of_one_recording_are_cut_apart(aligned, load, glossary):
    glossary("pound key")
    other = [(2.0, 2.5, "pound"), (2.5, 3.0, "key")]
    clips, _ = load(aligned("call.TextGrid", ann__words=WORDS, ann__phones=[], bob__words=other))
    assert [(clip.speaker, clip.clip_id) for clip in clips] == [
        ("ann", "call_ann_term_0"),
        ("bob", "call_bob_term_0"),
    ]


def test_what_cannot_be_used_is_dropped_and_counted(aligned, load, glossary, caplog):
    glossary("pound key")
    aligned("good.TextGrid")
    aligned("missing.TextGrid", audio=False)
    aligned("phones.TextGrid", phones=[(0.1, 0.2, "p")])
    aligned("silent.TextGrid", words=[(0.1, 0.2, "sp")])
    folder = aligned("late.TextGrid")
    late = (folder / "late.TextGrid").read_text()
    (folder / "late.TextGrid").write_text(late.replace("xmax = 4", "xmax = 2"))
    (folder / "broken.TextGrid").write_text("oops")
    clips, drops = load(folder)
    assert [clip.clip_id for clip in clips] == ["good_term_0"]
    assert drops.counts == {"missing": 1, "no_words_tier": 1, "bad_textgrid": 1, "bad_words": 1}
    assert drops.notes == {"no_speech": 1}
    assert drops.num_seen == 6


def test_without_a_glossary_there_is_nothing_to_cut_around(aligned, load):
    with pytest.raises(ValueError, match="set --glossary_path"):
        load(aligned("call.TextGrid"))
