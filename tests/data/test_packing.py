"""Packing whole sets: the same bytes however it is done, stopped and gone on with; each clip's samples found again."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import soundfile as sf

from data.audio import read_pcm
from data.clips import iterate_clips, load_clips
from data.drops import DropLog
from data.packing import pack_clips
from data.reader import AudioReader
from data.shards import open_packed, verify

ROOT = Path(__file__).resolve().parents[2]
FIELDS = ("clip_id", "text", "terms", "ignored", "surfaces", "is_no_term", "source", "segment_id")

PROGRAM = (
    "import sys; from data.clips import iterate_clips; from data.drops import DropLog\n"
    "from data.packing import pack_clips; from data.settings import DataSettings\n"
    "drops = DropLog(); path, folder = sys.argv[1:]\n"
    "print('ready', flush=True)\n"
    "pack_clips(iterate_clips(path, DataSettings(), drops), folder, drops, num_workers=2, shard_mb=1)"
)


@pytest.fixture
def source(tmp_path, record, samples):
    """source(count, **changes) writes that many clips of noise of other lengths, and their samples file."""

    def write(count: int = 200, extra: list[dict] | None = None, name: str = "samples.json") -> Path:
        rng = np.random.default_rng(0)
        for number in range(count):
            sf.write(tmp_path / f"{number}.wav", rng.normal(0, 0.1, 200 + number), 16_000, subtype="PCM_16")
        rows = [
            record(
                segment_id=f"s{number // 2}",
                term_chunk_audio=f"{number}.wav",
                term_chunk_text=f"text of {number}",
                term_chunk_audio_ground_truth_terms=[f"Term {number % 7}"] if number % 3 else [],
            )
            for number in range(count)
        ]
        return samples(rows + (extra or []), name)

    return write


def pack(path, folder, settings, num_workers=1, **changes):
    drops = DropLog(changes.pop("max_bad_fraction", 0.02))
    manifest = pack_clips(
        iterate_clips(path, settings, drops), folder, drops, num_workers=num_workers, shard_mb=1, **changes
    )
    return manifest, drops


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_each_clip_comes_back_as_it_was(source, settings, tmp_path):
    path = source(20)
    manifest, _ = pack(path, tmp_path / "packed", settings)
    loose, table = load_clips(path, settings, DropLog()), open_packed(tmp_path / "packed")
    assert len(table) == manifest.num_clips == len(loose) == 20
    reader = AudioReader()
    for clip, packed in zip(loose, table, strict=True):
        assert [getattr(packed, field) for field in FIELDS] == [getattr(clip, field) for field in FIELDS]
        expected_S = read_pcm(clip.audio_path)
        np.testing.assert_array_equal(reader.read(packed.audio_path, packed.start_s, packed.end_s), expected_S)
        assert packed.duration_s == len(expected_S) / 16_000
    assert table.as_listed(3).audio_path == loose[3].audio_path
    assert verify(tmp_path / "packed") == []


def test_the_bytes_do_not_depend_on_the_workers(source, settings, tmp_path):
    path = source(200)
    for num_workers in (1, 3):
        pack(path, tmp_path / f"by-{num_workers}", settings, num_workers)
    assert content(tmp_path / "by-1") == content(tmp_path / "by-3")


def test_the_same_audio_is_stored_once(source, settings, tmp_path, record):
    """Other files, other formats, within a block and beyond it; and a clip that only begins alike is another."""
    path = source(100)
    wave_S, _ = sf.read(tmp_path / "5.wav", dtype="int16")
    sf.write(tmp_path / "again.wav", wave_S, 16_000)
    sf.write(tmp_path / "again.flac", wave_S, 16_000)
    sf.write(tmp_path / "longer.wav", np.r_[wave_S, wave_S[:100]], 16_000)
    more = [
        record(segment_id=name, term_chunk_audio=name, term_chunk_text=name)
        for name in ("again.wav", "again.flac", "longer.wav")
    ]
    path = source(100, more)
    manifest, _ = pack(path, tmp_path / "packed", settings)
    table = open_packed(tmp_path / "packed")
    starts = table.sample_start_C
    assert len(table) == 103
    assert starts[5] == starts[100] == starts[101] != starts[102]
    assert manifest.num_samples == sum(200 + number for number in range(100)) + 305
    np.testing.assert_array_equal(AudioReader().read(*table.audio(101)), wave_S)


def test_what_cannot_be_read_is_dropped_counted_and_listed(source, settings, tmp_path):
    path = source(100)
    (tmp_path / "7.wav").write_bytes(b"no audio")
    sf.write(tmp_path / "70.wav", np.zeros(1600), 16_000)
    with pytest.raises(ValueError, match="2 of 100 records dropped"):
        pack(path, tmp_path / "packed", settings, max_bad_fraction=0.01)
    assert not (tmp_path / "packed" / "manifest.json").exists()
    manifest, drops = pack(path, tmp_path / "packed", settings, max_bad_fraction=0.02)
    assert drops.counts == {"not_audio": 1, "silent": 1}
    assert manifest.num_clips == 98
    assert [clip.text for clip in open_packed(tmp_path / "packed")[6:8]] == ["text of 6", "text of 8"]
    listed = (tmp_path / "packed" / "drops.jsonl").read_text().splitlines()
    assert {json.loads(line)["reason"] for line in listed if '"drop"' in line} == {"not_audio", "silent"}


def test_a_second_run_has_nothing_to_do_and_other_clips_are_refused(source, settings, tmp_path):
    path = source(30)
    first, _ = pack(path, tmp_path / "packed", settings)
    before = content(tmp_path / "packed")
    for number in range(30):
        (tmp_path / f"{number}.wav").write_bytes(b"gone")  # would show if any were read again
    assert pack(path, tmp_path / "packed", settings)[0] == first
    assert content(tmp_path / "packed") == before
    with pytest.raises(ValueError, match="holds a packing of other clips"):
        pack(source(29, name="fewer.json"), tmp_path / "packed", settings)


def test_a_full_disk_is_found_out_before_and_while_packing(source, settings, tmp_path, monkeypatch):
    path = source(30)
    usage = type("Usage", (), {"free": 10_000})
    with monkeypatch.context() as patch:
        patch.setattr("data.packing.shutil.disk_usage", lambda folder: usage)
        with pytest.raises(ValueError, match=r"about 0\.00 GB are needed and 0\.00 GB are free"):
            pack(path, tmp_path / "packed", settings)
    # The workers start before the limit, so that it is the writing that meets it.
    limits = (
        "import resource, data.packing as packing; start = packing.WorkerPool\n"
        "def limited(*what):\n"
        "    pool = start(*what); resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000)); return pool\n"
        "packing.WorkerPool = limited\n"
    )
    command = [sys.executable, "-c", limits + PROGRAM, str(path), str(tmp_path / "packed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert "packing stopped, File too large" in done.stderr
    assert pack(path, tmp_path / "packed", settings)[0].num_clips == 30, "goes on once there is room"


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_it_goes_on_to_the_same_bytes(source, settings, tmp_path, seed):
    path, rng = source(600), np.random.default_rng(seed)
    for number in range(0, 600, 2):  # 1.5 MB a block, so that there are several shards
        sf.write(tmp_path / f"{number}.wav", rng.normal(0, 0.1, 24_000 + number), 16_000, subtype="PCM_16")
    pack(path, tmp_path / "undisturbed", settings, 2)
    folder = tmp_path / "killed"
    for _ in range(3):
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, str(path), str(folder)], cwd=ROOT, stdout=subprocess.PIPE
        )
        assert process.stdout.readline() == b"ready\n"
        time.sleep(rng.uniform(0.1, 0.9))
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        process.stdout.close()
    pack(path, folder, settings, 2)
    assert content(folder) == content(tmp_path / "undisturbed")
