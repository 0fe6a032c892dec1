"""Grouping and bad rows are in tests/data/test_clips.py; here, what is of this format alone."""

import json


def row(term, chunk_idx, text="press the pound key"):
    fields = {"term": term, "term_key": term.lower(), "chunk_src_text": text, "utter_id": "u1", "chunk_idx": chunk_idx}
    return fields | {"chunk_audio_path": f"{chunk_idx}.wav", "speaker": "ann"}


def test_chunks_come_in_the_order_of_their_first_row_and_an_empty_term_adds_none(load, wav, tmp_path):
    wav("0.wav")
    wav("1.wav")
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in (row("Key", 1), row("", 0), row("Pound", 1), row("", 1))))
    clips, drops = load(path)
    assert [(clip.clip_id, clip.terms, clip.is_no_term) for clip in clips] == [
        ("u1::1", ("key", "pound"), False),
        ("u1::0", (), True),
    ]
    assert {clip.speaker for clip in clips} == {"ann"}
    assert drops.num_seen == 4
