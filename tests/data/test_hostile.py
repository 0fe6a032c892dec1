"""Everything hostile at once, as a user would meet it: a samples file whose records name every kind of bad audio, path
and field among good ones. Each bad one is a counted drop with its reason, and not one good clip is lost.

Each kind by itself is in test_audio.py, test_clips.py, test_records.py and tests/data/formats.
"""

import json
import os
import struct

import numpy as np
import pytest
import soundfile as sf

from data.audio import AudioError
from data.checks import check_clips
from data.clips import load_clips
from data.drops import DropLog
from data.reader import AudioReader
from tests.data.conftest import RATE, tone

NOISE = (np.random.default_rng(0).standard_normal(2 * RATE) * 0.1).astype(np.float32)


def half(path, file_format, subtype):
    sf.write(path, NOISE, RATE, format=file_format, subtype=subtype)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def header(path, rate=RATE, channels=1):
    form = struct.pack("<4sIHHIIHH", b"fmt ", 16, 1, channels, rate, rate * 2 * channels, 2 * channels, 16)
    data = struct.pack("<4sI", b"data", 40_960) + bytes(40_960)
    path.write_bytes(b"RIFF" + struct.pack("<I", 36 + 40_960) + b"WAVE" + form + data)


def ten_hours(path):
    """A FLAC whose header declares 576,000,000 samples (36 bits, behind rate, channels and bits of STREAMINFO)."""
    sf.write(path, tone(), RATE)
    content = bytearray(path.read_bytes())
    content[21] &= 0xF0
    content[22:26] = struct.pack(">I", 10 * 3600 * RATE)
    path.write_bytes(content)
    assert sf.info(path).duration == 36_000


def with_nan(path):
    wave_S = tone()
    wave_S[7] = np.nan
    sf.write(path, wave_S, RATE, subtype="FLOAT")


# name -> (what makes it, the reason that it is dropped for, whether only decoding shows it)
BAD_AUDIO = {
    "half.wav": (lambda path: half(path, "WAV", "PCM_16"), "truncated", False),
    "half.ogg": (lambda path: half(path, "OGG", "VORBIS"), "truncated", False),
    "half.mp3": (lambda path: half(path, "MP3", "MPEG_LAYER_III"), "truncated", False),
    "half.flac": (lambda path: half(path, "FLAC", "PCM_16"), "undecodable", True),
    "zero_bytes.wav": (lambda path: path.touch(), "empty_file", False),
    "nan.wav": (with_nan, "not_finite", True),
    "channels.wav": (lambda path: header(path, channels=1024), "bad_channels", False),
    "rate.wav": (lambda path: header(path, rate=1), "bad_rate", False),
    "bomb.flac": (ten_hours, "too_long", False),
    "text.wav": (lambda path: path.write_text("<html>404</html>"), "not_audio", False),
    "folder.wav": (lambda path: path.mkdir(), "directory", False),
    "fifo.wav": (os.mkfifo, "not_a_file", False),
    "loop.wav": (lambda path: path.symlink_to(path), "symlink_loop", False),
    "dangling.wav": (lambda path: path.symlink_to(path.with_name("nowhere")), "missing", False),
    "silence.wav": (lambda path: sf.write(path, np.zeros(RATE, np.int16), RATE), "silent", True),
}
BAD_PATHS = {
    "../../../etc/passwd": "outside_root",
    "never there.wav": "missing",
    "a\0b.wav": "bad_path",
    "": "empty_field",
}
BAD_FIELDS = {
    "not_an_object": ["text", 5, None, ["a"]],
    "wrong_type": [{"term_chunk_text": 5}, {"term_chunk_audio_ground_truth_terms": [["deep"]]}],
    "bad_span": [{"term_chunk_audio_start": -1}, {"term_chunk_audio_start": 0.3, "term_chunk_audio_end": 0.2}],
    "missing_field": [{"term_chunk_audio": None}],
    "bad_text": [{"term_chunk_text": "half \ud800 a pair"}],
    "text_too_long": [{"term_chunk_text": "word " * 1000}],
}
GOOD_NAMES = ["plain.wav", "line\nbreak.wav", "井号键.wav", "مرحبا.wav", "🎧.wav", "a b.wav", "%2e%2e.wav", "s.tar.wav"]
GOOD_TERMS = ["Pound Key", "Line\nBreak", "井号键", "مرحبا بالعالم", "🎧 mix", "\u202epound", "é" * 3, "word " * 600]


@pytest.fixture
def everything(tmp_path, record):
    """(path of the samples file, ids of the good clips, reasons of the bad ones, in any order)."""
    rows, good, reasons = [], [], []
    for number, (name, term) in enumerate(zip(GOOD_NAMES, GOOD_TERMS, strict=True)):
        sf.write(tmp_path / name, tone(hertz=300 + 10 * number), RATE, format="WAV")
        good.append(f"good{number}")
        rows.append(
            record(segment_id=good[-1], term_chunk_audio=name, term_chunk_audio_ground_truth_terms=[term, "Artesia"])
        )
    for name, (make, reason, _) in BAD_AUDIO.items():
        make(tmp_path / name)
        rows.insert(len(rows) // 2, record(segment_id=name, term_chunk_audio=name))
        reasons.append(reason)
    for name, reason in BAD_PATHS.items():
        rows.insert(len(rows) // 2, record(segment_id=f"path {name}", term_chunk_audio=name))
        reasons.append(reason)
    for reason, changes in BAD_FIELDS.items():
        for change in changes:
            row = (
                record(**{"segment_id": reason, "term_chunk_audio": "plain.wav"} | change)
                if isinstance(change, dict)
                else change
            )
            rows.insert(len(rows) // 3, row)
            reasons.append(reason)
    path = tmp_path / "samples.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8-sig")
    return path, good, reasons


def test_nothing_good_is_lost_and_nothing_bad_goes_by_unnamed(everything, settings):
    path, good, reasons = everything
    drops = DropLog(1.0)
    clips = check_clips(load_clips(path, settings, drops), drops, settings.check_cache_path)
    reader = AudioReader()
    read = []
    for clip in clips:
        try:
            assert len(reader.read(clip.audio_path, clip.start_s, clip.end_s)) == 8000
            read.append(clip)
        except AudioError as error:
            assert BAD_AUDIO[clip.segment_id][2], f"{clip.segment_id} could have been told by its header"
            drops.add(error.reason, clip.source, error.detail)
    assert [clip.clip_id for clip in read] == good
    assert all("artesia" in clip.terms for clip in read), "a bad term takes no good one with it"
    assert sorted(drops.counts.elements()) == sorted(reasons)
    assert drops.num_seen == len(good) + len(reasons)
    assert drops.notes == {"term_too_long": 1}
    assert all(line["source"].startswith(f"{path}:") and line["detail"] for line in drops.lines())


def test_the_list_of_them_can_be_written_and_read(everything, settings, tmp_path):
    drops = DropLog(0.02)
    load_clips(everything[0], settings, drops)
    with pytest.raises(ValueError, match=r"is more than max_bad_fraction 2.0%"):
        drops.check(tmp_path / "bad.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(rows) == drops.num_dropped + drops.notes.total()


def test_a_file_removed_after_it_was_checked_is_told_as_missing(settings, record, samples, wav):
    path = wav("a.wav")
    drops = DropLog()
    [clip] = check_clips(load_clips(samples([record()]), settings, drops), drops, settings.check_cache_path)
    path.unlink()
    with pytest.raises(AudioError, match="missing"):
        AudioReader().read(clip.audio_path)
    assert check_clips([clip], drops, settings.check_cache_path) == [], "the cache does not vouch for what is gone"


def test_an_index_newer_than_its_data_is_told_span_by_span(settings, record, samples, wav):
    """Samples that were annotated on a longer file than is there: each span is judged, not the file."""
    wav("a.wav", seconds=1.0)
    rows = [record(segment_id=str(n), term_chunk_audio_start=n / 2, term_chunk_audio_end=n / 2 + 0.5) for n in range(4)]
    drops = DropLog(1.0)
    clips = check_clips(load_clips(samples(rows), settings, drops), drops, settings.check_cache_path)
    assert [clip.clip_id for clip in clips] == ["0", "1"]
    assert drops.counts == {"outside_file": 2}
