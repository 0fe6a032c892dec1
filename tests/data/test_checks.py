import json
import os

import numpy as np
import pytest
import soundfile as sf

import data.checks
from data.checks import check_clips
from data.drops import DropLog


@pytest.fixture
def probes(monkeypatch):
    """The paths probed since."""
    seen = []
    real = data.checks.probe
    monkeypatch.setattr(data.checks, "probe", lambda path: (seen.append(path), real(path))[1])
    return seen


def test_files_are_probed_once_and_remembered_between_runs(clip, wav, tmp_path, probes):
    path = wav("a.wav", seconds=2.0)
    clips = [clip("1", path, start_s=0.0, end_s=0.5), clip("2", path, start_s=0.5, end_s=None)]
    kept = check_clips(clips, DropLog(), tmp_path / "cache.jsonl")
    assert [one.duration_s for one in kept] == [0.5, 1.5]
    assert probes == [str(path)], "one probe for the two clips of a file"
    assert check_clips(clips, DropLog(), tmp_path / "cache.jsonl") == kept
    assert len(probes) == 1


def test_a_changed_file_is_probed_again(clip, wav, tmp_path, probes):
    path = wav("a.wav")
    check_clips([clip("1", path)], DropLog(), tmp_path / "cache.jsonl")
    status = path.stat()
    path.write_bytes(b"x" * status.st_size)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    drops = DropLog()
    assert check_clips([clip("1", path)], drops, tmp_path / "cache.jsonl") == []
    assert drops.counts == {"not_audio": 1}
    assert len(probes) == 2


def test_bad_files_and_spans_are_dropped_by_reason_cached_or_not(clip, wav, tmp_path):
    good = wav("a.wav", seconds=1.0)
    text = tmp_path / "text.wav"
    text.write_text("no audio")
    clips = [
        clip("good", good),
        clip("text", text),
        clip("missing", tmp_path / "none.wav"),
        clip("outside", good, start_s=2.0, end_s=3.0),
        clip("short", good, start_s=0.5, end_s=0.501),
        clip("long", wav("long.wav", seconds=31.0)),
    ]
    for _ in range(2):
        drops = DropLog()
        assert [one.clip_id for one in check_clips(clips, drops, tmp_path / "cache.jsonl")] == ["good"]
        assert drops.counts == {"not_audio": 1, "missing": 1, "outside_file": 1, "too_short": 1, "too_long": 1}
    assert "none.wav" not in (tmp_path / "cache.jsonl").read_text(), "a file that appears later must be seen"


def test_headers_alone_are_read(clip, wav, tmp_path, monkeypatch):
    monkeypatch.setattr(sf.SoundFile, "read", lambda *_, **__: pytest.fail("it was decoded"))
    assert check_clips([clip("1", wav("a.wav"))], DropLog(), tmp_path / "cache.jsonl")


def test_an_unwritable_cache_is_a_warning(clip, wav, tmp_path, caplog):
    (tmp_path / "file").write_text("")
    assert check_clips([clip("1", wav("a.wav"))], DropLog(), tmp_path / "file" / "cache.jsonl")
    assert "cannot be written" in caplog.text


@pytest.mark.parametrize("content", ["{", '{"path": "x"}', '{"path": "x", "other": 1}', "[]", "\x00\x01"])
def test_a_broken_cache_is_a_warning(clip, wav, tmp_path, caplog, content):
    (tmp_path / "cache.jsonl").write_text(content + "\n")
    assert check_clips([clip("1", wav("a.wav"))], DropLog(), tmp_path / "cache.jsonl")
    assert "cannot be used" in caplog.text
    rows = [json.loads(line) for line in (tmp_path / "cache.jsonl").read_text().splitlines()]
    assert [row["frames"] for row in rows] == [8000], "it is replaced by a good one"


def test_many_files_keep_their_order(clip, wav, tmp_path):
    clips = [clip(str(number), wav(f"{number}.wav", seconds=0.1 + number / 100)) for number in range(40)]
    kept = check_clips(clips, DropLog(), tmp_path / "cache.jsonl", num_threads=8)
    assert [one.clip_id for one in kept] == [str(number) for number in range(40)]
    np.testing.assert_allclose([one.duration_s for one in kept], [0.1 + number / 100 for number in range(40)])
