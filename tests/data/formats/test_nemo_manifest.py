"""Lines as NeMo's documentation gives them: audio_filepath, duration, text, and optionally offset."""

import json

import pytest

from data.checks import check_clips
from data.formats.nemo_manifest import line_of


@pytest.fixture
def manifest(tmp_path, wav):
    wav("a.wav", seconds=3.0)

    def write(*lines):
        path = tmp_path / "manifest.json"
        path.write_text("".join(json.dumps({"audio_filepath": "a.wav"} | line) + "\n" for line in lines))
        return path

    return write


def test_lines_are_clips(manifest, load, glossary):
    glossary("Pound Key", "pound")
    path = manifest(
        {"duration": 3.0, "text": "press the pound-key"},
        {"offset": 0.5, "duration": 1.25, "text": "hold", "speaker": "ann"},
        {"offset": 2.0, "text": "the rest", "terms": ["Rest"], "id": "r"},
    )
    clips, drops = load(path)
    assert [(clip.clip_id, clip.start_s, clip.end_s) for clip in clips] == [
        ("a", None, None),
        ("a_0.5", 0.5, 1.75),
        ("r", 2.0, None),
    ]
    assert [clip.terms for clip in clips] == [("pound key",), (), ("rest",)]
    assert clips[0].ignored == ("pound",)
    assert clips[1].speaker == "ann"
    assert drops.num_dropped == 0


def test_labels_or_a_glossary(manifest, load):
    assert load(manifest({"text": "x", "terms": []}))[0][0].is_no_term
    with pytest.raises(ValueError, match="set --glossary_path"):
        load(manifest({"text": "x"}))


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"text": None}, "wrong_type"),
        ({"audio_filepath": "none.wav", "text": ""}, "missing"),
        ({"audio_filepath": "../x.wav", "text": ""}, "outside_root"),
        ({"duration": 0, "text": ""}, "bad_span"),
        ({"duration": -1.0, "text": ""}, "bad_span"),
        ({"offset": 1.0, "duration": 1e-9, "text": ""}, "bad_span"),
        ({"offset": 1e300, "duration": 1.0, "text": ""}, "bad_span"),
        ({"offset": "1", "text": ""}, "wrong_type"),
        ({"terms": "x", "text": ""}, "wrong_type"),
    ],
)
def test_bad_lines_are_dropped_and_counted(manifest, load, glossary, bad, reason):
    glossary("Pound")
    clips, drops = load(manifest({"text": "good"}, bad))
    assert len(clips) == 1
    assert drops.counts == {reason: 1}


def test_a_clip_written_out_is_read_as_the_same_clip(manifest, load, settings, tmp_path):
    path = manifest({"text": "x", "terms": ["Pound Key"], "ignored_terms": ["key"], "offset": 1.0, "duration": 0.7})
    clips, drops = load(path)
    [clip] = check_clips(clips, drops, settings.check_cache_path)
    line = line_of(clip)
    assert {"audio_filepath", "duration", "offset", "text"} <= set(line), "what NeMo reads"
    (tmp_path / "out.json").write_text(json.dumps(line) + "\n")
    [again], _ = load(tmp_path / "out.json")
    same = ("clip_id", "audio_path", "start_s", "end_s", "text", "terms", "ignored", "surfaces")
    assert [getattr(again, name) for name in same] == [getattr(clip, name) for name in same]
