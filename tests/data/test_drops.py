import json

import pytest

from data.drops import DropLog


def test_drops_are_counted_by_reason_and_listed_in_a_file(tmp_path):
    drops = DropLog(0.5)
    drops.seen(4)
    drops.add("missing", "x.json:0", "a.wav")
    drops.add("silent", "x.json:1")
    drops.note("term_too_short", "x.json:2", "'ab'")
    drops.check(tmp_path / "run" / "bad_records.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()]
    assert [(row["kind"], row["reason"], row["source"]) for row in rows] == [
        ("drop", "missing", "x.json:0"),
        ("drop", "silent", "x.json:1"),
        ("note", "term_too_short", "x.json:2"),
    ]
    assert drops.bad_fraction == 0.5
    assert "2 of 4 records dropped (missing 1, silent 1); notes: term_too_short 1" in drops.summary()


def test_the_run_fails_above_the_limit_and_not_at_it(tmp_path):
    drops = DropLog(0.02)
    drops.seen(100)
    drops.add("missing", "x.json:0", "a.wav")
    drops.add("missing", "x.json:1", "b.wav")
    drops.check()
    drops.add("silent", "x.json:2")
    with pytest.raises(ValueError, match="3 of 100 records dropped") as caught:
        drops.check(tmp_path / "bad.jsonl")
    message = str(caught.value)
    assert "missing 2" in message
    assert "x.json:0 a.wav" in message
    assert str(tmp_path / "bad.jsonl") in message
    assert "--audio_root" in message
    assert "--max_bad_fraction" in message


def test_a_clip_that_fails_in_each_epoch_counts_once():
    drops = DropLog()
    drops.seen(10)
    for _ in range(5):
        drops.add("not_finite", "x.json:3", "a.wav")
    assert drops.num_dropped == 1


def test_text_that_utf8_cannot_hold_is_still_listed(tmp_path):
    drops = DropLog()
    drops.add("bad_text", "x.json:0", "\ud800")
    drops.write(tmp_path / "bad.jsonl")
    assert "ud800" in (tmp_path / "bad.jsonl").read_text()


def test_an_unwritable_list_is_a_warning(tmp_path, caplog):
    (tmp_path / "file").write_text("")
    DropLog().write(tmp_path / "file" / "bad.jsonl")
    assert "could not be written" in caplog.text


def test_an_absorbed_account_keeps_its_counts_its_list_and_its_limit(tmp_path):
    test_file, pooled = DropLog(0.02), DropLog(0.02)
    test_file.seen(2)
    test_file.add("missing", "test.json:0", "a.wav")
    pooled.seen(1000)
    pooled.absorb(test_file)
    pooled.add("missing", "test.json:0", "a.wav")  # the same drop again
    assert (pooled.num_seen, pooled.num_dropped, len(pooled.lines())) == (1002, 1, 1)
    pooled.check()  # one bad record in a thousand passes ...
    with pytest.raises(ValueError, match=r"test\.json:0"):
        test_file.check()  # ... which is why each file has an account of its own
