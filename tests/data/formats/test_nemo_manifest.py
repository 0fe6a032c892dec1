"""Lines as NeMo's documentation gives them: audio_filepath, duration, text, and optionally offset."""

import json

import numpy as np
import pytest
import soundfile as sf

from data.audio import read_pcm
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


def test_a_manifest_of_the_documented_form_goes_through_us_unchanged(load, glossary, settings, tmp_path):
    """Against NeMo's documentation, not its code: the toolkit is too heavy to install for a test.

    Documented for ASR: one JSON object a line, `audio_filepath` (absolute, or relative to the manifest), `text`,
    `duration` in seconds, and optionally `offset` in seconds from the file's start. NeMo then reads `duration` seconds
    from `offset` on, which is done here by hand.
    """
    glossary("pound key", "hold")
    rng = np.random.default_rng(0)
    (tmp_path / "audio").mkdir()
    for name in ("one", "two"):
        sf.write(tmp_path / "audio" / f"{name}.wav", rng.normal(0, 0.1, 64_000), 16_000, subtype="PCM_16")
    documented = [
        {"audio_filepath": str(tmp_path / "audio" / "one.wav"), "text": "press the pound key", "duration": 4.0},
        {"audio_filepath": "audio/two.wav", "text": "please hold", "duration": 1.5, "offset": 0.75},
        {"audio_filepath": "audio/two.wav", "text": "the rest", "duration": 1.25, "offset": 2.5},
    ]
    source, written = tmp_path / "nemo.json", tmp_path / "written.json"
    source.write_text("".join(json.dumps(line) + "\n" for line in documented))
    clips, drops = load(source)
    clips = check_clips(clips, drops, settings.check_cache_path)
    assert [clip.terms for clip in clips] == [("pound key",), ("hold",), ()]
    written.write_text("".join(json.dumps(line_of(clip)) + "\n" for clip in clips))
    lines = [json.loads(line) for line in written.read_text().splitlines()]
    for clip, line, given in zip(clips, lines, documented, strict=True):
        assert line["audio_filepath"] == str(tmp_path / given["audio_filepath"])
        assert (line["text"], line["duration"]) == (given["text"], given["duration"])
        assert line.get("offset", 0.0) == given.get("offset", 0.0)
        start, frames = round(line.get("offset", 0.0) * 16_000), round(line["duration"] * 16_000)
        theirs_S, _ = sf.read(line["audio_filepath"], frames=frames, start=start, dtype="int16")
        np.testing.assert_array_equal(read_pcm(clip.audio_path, clip.start_s, clip.end_s), theirs_S)
    again, _ = load(written)
    same = ("audio_path", "start_s", "end_s", "text", "terms", "clip_id")
    assert [[getattr(clip, name) for name in same] for clip in again] == [
        [getattr(clip, name) for name in same] for clip in clips
    ]
