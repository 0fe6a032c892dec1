"""What records become is in tests/data/test_clips.py; here, the way back."""

import json

import pytest

from data.formats.term_chunks import record_of


@pytest.mark.parametrize(
    "changes",
    [
        {"speaker": "ann", "recording": "call7"},
        {"term_chunk_audio_start": 0.1, "term_chunk_audio_end": 0.4, "partial_terms": ["city hall"]},
        {"term_chunk_audio_ground_truth_terms": [], "term_chunk_text": ""},
        {"term_chunk_audio_ground_truth_terms": ["שלום", "🎧 mix", "Line\nBreak", "井号键"]},
    ],
)
def test_a_clip_written_out_is_read_as_the_same_clip(load, samples, record, wav, changes, tmp_path):
    wav("a.wav")
    [clip], _ = load(samples([record(**changes)]))
    lines = tmp_path / "out.jsonl"
    lines.write_text(json.dumps(record_of(clip), ensure_ascii=False) + "\n", encoding="utf-8")
    [again], drops = load(lines)
    assert not drops.counts
    for name in clip.__slots__:
        if name != "source":
            assert getattr(again, name) == getattr(clip, name), name
