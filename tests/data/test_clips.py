import json
import math

import pytest

from data.clips import load_clips
from data.drops import DropLog


@pytest.fixture
def load(settings, samples, wav):
    """load([record, ...]) -> clips, drops; a.wav and b.wav exist. A record that cannot be used is only counted."""
    wav("a.wav")
    wav("b.wav")

    def run(records, **changes):
        for name, value in changes.items():
            setattr(settings, name, value)
        drops = DropLog(1.0)
        try:
            clips = load_clips(samples(records), settings, drops)
        except ValueError as error:
            if "no usable clip" not in str(error):
                raise
            clips = []
        return clips, drops

    return run


def test_a_record_becomes_a_clip(load, record, tmp_path):
    [clip], drops = load([record(term_chunk_audio_ground_truth_terms=["Artesia", "  ARTESIA ", "City Hall"])])
    assert clip.clip_id == "s1"
    assert clip.audio_path == str(tmp_path / "a.wav")
    assert clip.text == "the city of artesia in"
    assert clip.terms == ("artesia", "city hall"), "lower-cased for matching, once each"
    assert clip.surfaces == ("Artesia", "City Hall"), "kept as written for display"
    assert (clip.start_s, clip.end_s) == (None, None), "term_start_time counts from the utterance: not used"
    assert not clip.is_no_term
    assert (drops.num_seen, drops.num_dropped) == (1, 0)


def test_only_the_three_chunk_fields_are_needed(load, record):
    [clip], _ = load([record(segment_id=None, term_start_time=None)])
    assert clip.clip_id.endswith("samples.json:0")


@pytest.mark.parametrize(
    "changes",
    [
        {"term_chunk_audio_ground_truth_terms": []},
        {"term_chunk_audio_ground_truth_terms": [], "is_no_term_chunk": True},
        {"term_chunk_audio_ground_truth_terms": None, "is_no_term_chunk": True},
        {"term_chunk_audio_ground_truth_terms": None, "segment_id": "s1_no_term_0"},
    ],
)
def test_no_term_clips_are_kept(load, record, changes):
    [clip], drops = load([record(**changes)])
    assert clip.is_no_term
    assert clip.terms == ()
    assert drops.num_dropped == 0


def test_spans_and_cut_terms(load, record):
    row = record(term_chunk_audio_start=0.1, term_chunk_audio_end=0.4, partial_terms=["City Hall", "artesia"])
    [clip], _ = load([row])
    assert (clip.start_s, clip.end_s) == (0.1, 0.4)
    assert clip.ignored == ("city hall",), "a term that is also wholly inside stays a positive"


def test_unusable_terms_are_noted_and_ignored_the_clip_stays(load, record):
    [clip], drops = load([record(term_chunk_audio_ground_truth_terms=["ab", "1999", "Artesia"])])
    assert clip.terms == ("artesia",)
    assert set(clip.ignored) == {"ab", "1999"}
    assert drops.notes == {"term_too_short": 1, "term_mostly_digits": 1}
    assert drops.num_dropped == 0


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"term_chunk_audio": None}, "missing_field"),
        ({"term_chunk_text": None}, "missing_field"),
        ({"term_chunk_audio_ground_truth_terms": None}, "missing_field"),
        ({"term_chunk_audio": 5}, "wrong_type"),
        ({"term_chunk_audio": ["a.wav"]}, "wrong_type"),
        ({"term_chunk_audio": "  "}, "empty_field"),
        ({"term_chunk_text": ["the", "city"]}, "wrong_type"),
        ({"term_chunk_audio_ground_truth_terms": "Artesia"}, "wrong_type"),
        ({"term_chunk_audio_ground_truth_terms": ["Artesia", 5]}, "wrong_type"),
        ({"term_chunk_audio_ground_truth_terms": {"Artesia": 1}}, "wrong_type"),
        ({"partial_terms": "city"}, "wrong_type"),
        ({"segment_id": {"a": 1}}, "wrong_type"),
        ({"segment_id": True}, "wrong_type"),
        ({"is_no_term_chunk": "yes"}, "wrong_type"),
        ({"is_no_term_chunk": True}, "no_term_with_terms"),
        ({"term_chunk_audio_start": "0.1"}, "wrong_type"),
        ({"term_chunk_audio_end": True}, "wrong_type"),
        ({"term_chunk_audio_start": -1.0}, "bad_span"),
        ({"term_chunk_audio_start": 0.4, "term_chunk_audio_end": 0.4}, "bad_span"),
        ({"term_chunk_audio": "a\0.wav"}, "bad_path"),
        ({"term_chunk_audio": "none.wav"}, "missing"),
        ({"term_chunk_audio": "/none/a.wav"}, "missing"),
        ({"term_chunk_audio": "../../etc/passwd"}, "outside_root"),
        ({"term_chunk_audio": "x/../../a.wav"}, "outside_root"),
    ],
)
def test_bad_records_are_dropped_counted_and_explained(load, record, changes, reason):
    clips, drops = load([record(**changes), record(segment_id="good", term_chunk_audio="b.wav")])
    assert [clip.clip_id for clip in clips] == ["good"]
    assert drops.counts == {reason: 1}
    [line] = drops.lines()
    assert line["source"].endswith("samples.json:0")
    assert line["detail"]


@pytest.mark.parametrize("row", ["text", 5, None, ["a"]])
def test_records_that_are_no_objects(load, record, row):
    _, drops = load([row, record()])
    assert drops.counts == {"not_an_object": 1}


def test_the_same_record_twice_is_dropped(load, record):
    clips, drops = load([record(), record(), record(segment_id="s2", term_chunk_audio="b.wav")])
    assert [clip.clip_id for clip in clips] == ["s1", "s2"]
    assert drops.counts == {"duplicate": 1}


def test_one_utterance_may_give_several_clips_whose_ids_are_numbered(load, record):
    clips, drops = load([record(), record(term_chunk_audio="b.wav")])
    assert [(clip.clip_id, clip.segment_id) for clip in clips] == [("s1", "s1"), ("s1#2", "s1")]
    assert drops.notes == {"repeated_id": 1}
    assert drops.num_dropped == 0


def test_audio_listed_once_a_term_is_one_clip_with_both_terms(load, record):
    [clip], drops = load([record(), record(term_chunk_audio_ground_truth_terms=["city"])])
    assert clip.terms == ("artesia", "city")
    assert drops.notes == {"merged_same_audio": 1}
    _, drops = load([record(), record(segment_id="s2", term_chunk_text="something else")])
    assert drops.counts == {"conflicting_text": 1}


def test_a_file_without_any_usable_clip_is_an_error(settings, samples, record):
    with pytest.raises(ValueError, match=r"no usable clip; 1 of 1 records dropped \(missing 1\)"):
        load_clips(samples([record()]), settings, DropLog())


def test_nan_in_the_json_is_an_error_not_a_span(settings, tmp_path, record, wav):
    wav("a.wav")
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps(record(term_chunk_audio_start=math.nan)) + "\n")
    with pytest.raises(ValueError, match="NaN is not a JSON number"):
        load_clips(path, settings, DropLog())


def test_half_a_surrogate_pair_cannot_be_a_key_and_is_dropped(settings, tmp_path, record, wav):
    wav("a.wav")
    path = tmp_path / "x.jsonl"
    path.write_text("".join(json.dumps(record(term_chunk_text=text)) + "\n" for text in ("half \ud800 a pair", "good")))
    drops = DropLog()
    assert [clip.text for clip in load_clips(path, settings, drops)] == ["good"]
    assert drops.counts == {"bad_text": 1}


# ---------------------------------------------------------------- paths


def test_relative_audio_is_looked_for_beside_the_file_then_under_the_data_root(load, record, wav, tmp_path):
    wav("root/only_there.wav")
    wav("root/a.wav")
    rows = [record(), record(segment_id="s2", term_chunk_audio="only_there.wav")]
    clips, _ = load(rows, data_root=str(tmp_path / "root"))
    assert [clip.audio_path for clip in clips] == [str(tmp_path / "a.wav"), str(tmp_path / "root" / "only_there.wav")]


def test_missing_audio_says_where_it_was_looked_for(load, record, tmp_path):
    (tmp_path / "root").mkdir()
    _, drops = load([record(term_chunk_audio="x/none.wav")], data_root=str(tmp_path / "root"))
    detail = drops.lines()[0]["detail"]
    assert str(tmp_path / "x" / "none.wav") in detail
    assert str(tmp_path / "root" / "x" / "none.wav") in detail


def test_audio_root_replaces_both(load, record, wav, tmp_path):
    wav("moved/a.wav")
    [clip], _ = load([record()], audio_root=str(tmp_path / "moved"))
    assert clip.audio_path == str(tmp_path / "moved" / "a.wav")
    with pytest.raises(ValueError, match="audio_root is '/none'"):
        load([record()], audio_root="/none")


def test_path_remap_moves_absolute_paths(load, record, tmp_path, caplog):
    rows = [
        record(term_chunk_audio="/mnt/old/audio/a.wav"),
        record(segment_id="2", term_chunk_audio="/mnt/older/b.wav"),
    ]
    clips, drops = load(rows, path_remap=(f"/mnt/old/audio={tmp_path}", "/mnt/unused=/x"))
    assert [clip.audio_path for clip in clips] == [str(tmp_path / "a.wav")]
    assert drops.counts == {"missing": 1}, "/mnt/old/audio is no prefix of /mnt/older"
    assert "/mnt/unused" in caplog.text


def test_absolute_paths_and_links_are_users_own_business(load, record, tmp_path, wav):
    (tmp_path / "link.wav").symlink_to(wav("elsewhere/c.wav"))
    rows = [record(term_chunk_audio=str(tmp_path / "a.wav")), record(segment_id="2", term_chunk_audio="link.wav")]
    clips, _ = load(rows)
    assert len(clips) == 2


# ---------------------------------------------------------------- the chunked format


def row(term, chunk_idx=0, path="a.wav", text="press the pound key", **changes):
    fields = {"term": term, "term_key": term.lower(), "chunk_src_text": text, "utter_id": "u1", "chunk_idx": chunk_idx}
    return fields | {"chunk_audio_path": path} | changes


def test_rows_of_one_chunk_are_one_clip_wherever_they_stand(load):
    clips, drops = load([row("Pound Key"), row("", 1, "b.wav", "hello"), row("pound")])
    assert [clip.clip_id for clip in clips] == ["u1::0", "u1::1"]
    assert clips[0].terms == ("pound key", "pound")
    assert clips[1].is_no_term
    assert (drops.num_seen, drops.num_dropped) == (3, 0)


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        (row("key", None, "b.wav"), "wrong_type"),
        (row("key", 2, "b.wav") | {"term": 5}, "wrong_type"),
        (row("key", text="other text"), "conflicting_rows"),
        (row("key", path="b.wav"), "conflicting_rows"),
        (row("key", 2, "none.wav"), "missing"),
    ],
)
def test_bad_rows_are_dropped_and_counted(load, bad, reason):
    clips, drops = load([row("Pound Key"), bad])
    assert len(clips) == 1
    assert drops.counts == {reason: 1}
