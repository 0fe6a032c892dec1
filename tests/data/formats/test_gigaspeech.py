"""A GigaSpeech.json of two recordings, with the fields that the published file has."""

import json

import pytest


def segment(sid, begin, end, text, **changes):
    return {
        "sid": sid,
        "speaker": "N/A",
        "begin_time": begin,
        "end_time": end,
        "subsets": ["{XL}"],
        "text_tn": text,
    } | changes


@pytest.fixture
def corpus(tmp_path, wav):
    """corpus(segments of the first recording) writes GigaSpeech.json; the second recording has one segment."""
    wav("audio/podcast/P0000/POD1.opus.wav", seconds=4.0)
    wav("audio/youtube/P0001/YOU1.wav", seconds=2.0)

    def write(*segments):
        head = {"dataset": "GigaSpeech", "language": "EN", "version": "v1.0.0", "category": {"c1": "x"}}
        audios = [
            {
                "title": "N/A",
                "url": "https://example.org/[1]",
                "path": path,
                "aid": aid,
                "source": "podcast",
                "codec": "wav",
                "channels": 1,
                "md5": "0",
                "speaker": "N/A",
                "duration": 4.0,
                "format": "opus",
                "subsets": ["{XL}", "{TEST}"],
                "segments": some,
            }
            for path, aid, some in (
                ("audio/podcast/P0000/POD1.opus.wav", "POD1", list(segments)),
                ("audio/youtube/P0001/YOU1.wav", "YOU1", [segment("YOU1_S1", 0, 2, "<NOISE> ", subsets=["{TEST}"])]),
            )
        ]
        path = tmp_path / "GigaSpeech.json"
        path.write_text(json.dumps(head | {"audios": audios}), encoding="utf-8")
        return path

    return write


def test_segments_are_spans_of_their_recording(corpus, load, glossary, tmp_path):
    glossary("Artesia", "City of Artesia", "California")
    path = corpus(
        segment("POD1_S1", 0.5, 1.75, "THE CITY OF ARTESIA <COMMA> IN CALIFORNIA <QUESTIONMARK>"),
        segment("POD1_S2", 2, 3, "NOTHING HERE <PERIOD>", speaker="ANN"),
    )
    clips, drops = load(path)
    first, second = clips
    assert (first.clip_id, first.recording) == ("POD1_S1", "POD1")
    assert first.audio_path == str(tmp_path / "audio/podcast/P0000/POD1.opus.wav")
    assert (first.start_s, first.end_s) == (0.5, 1.75)
    assert first.text == "the city of artesia, in california?"
    assert first.surfaces == ("City of Artesia", "California")
    assert first.ignored == ("artesia",)
    assert (first.speaker, second.speaker) == ("", "ANN")
    assert second.is_no_term
    assert (drops.num_seen, drops.num_dropped) == (3, 0)
    assert drops.notes == {"no_speech": 1}


def test_a_subset_can_be_chosen(corpus, load, glossary):
    glossary("Artesia")
    path = corpus(segment("1", 0, 1, "A"), segment("2", 1, 2, "B", subsets=["{XL}", "{S}"]))
    clips, drops = load(path, gigaspeech_subset="s")
    assert [clip.clip_id for clip in clips] == ["2"]
    assert drops.num_seen == 1
    with pytest.raises(ValueError, match="no segment is of gigaspeech_subset 'M'"):
        load(path, gigaspeech_subset="M")


def test_without_a_glossary_there_are_no_labels(corpus, load):
    with pytest.raises(ValueError, match="set --glossary_path"):
        load(corpus(segment("1", 0, 1, "A")))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"begin_time": None}, "wrong_type"),
        ({"begin_time": 3.0}, "bad_span"),
        ({"end_time": -1}, "bad_span"),
        ({"text_tn": 5}, "wrong_type"),
        ({"sid": ["x"]}, "wrong_type"),
        ({"speaker": 5}, "wrong_type"),
    ],
)
def test_bad_segments_are_dropped_and_counted(corpus, load, glossary, changes, reason):
    glossary("Artesia")
    clips, drops = load(corpus(segment("bad", 0.5, 1.0, "A") | changes, segment("good", 1, 2, "B"), 5))
    assert [clip.clip_id for clip in clips] == ["good"]
    assert drops.counts == {reason: 1, "not_an_object": 1}


def test_recordings_that_are_none_are_dropped_and_a_cut_off_file_is_refused(load, glossary, tmp_path, wav):
    glossary("Artesia")
    wav("a.wav", seconds=2.0)
    good = {"aid": "a", "path": "a.wav", "segments": [segment("1", 0, 1, "A")]}
    path = tmp_path / "g.json"
    path.write_text(json.dumps({"audios": [5, {"path": "a.wav", "segments": "x"}, good | {"path": "none.wav"}, good]}))
    clips, drops = load(path)
    assert len(clips) == 1
    assert drops.counts == {"not_an_object": 1, "wrong_type": 1, "missing": 1}
    path.write_text(path.read_text()[:-30])
    with pytest.raises(ValueError, match="ends in the middle"):
        load(path)
