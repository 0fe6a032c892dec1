"""Tars written by webdataset, and by hand where webdataset would not write them."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset

from data.audio import read_pcm


@pytest.fixture
def shard(tmp_path, wav):
    """shard({"__key__": ..., "wav": bytes, ...}, ...) -> a tar that webdataset wrote."""

    def write(*samples, name="shard-000.tar"):
        path = tmp_path / name
        with webdataset.TarWriter(str(path)) as writer:
            for sample in samples:
                writer.write(sample)
        return path

    return write


@pytest.fixture
def audio(wav):
    return lambda hertz=440.0: wav("x.wav", hertz=hertz).read_bytes()


def test_samples_are_clips_read_in_place(shard, audio, wav, load, glossary):
    glossary("Pound Key")
    path = shard(
        {"__key__": "call7_1", "wav": audio(), "json": {"text": "press the pound key", "speaker": "ann"}},
        {"__key__": "a/call7_2", "wav": audio(300.0), "txt": "hold on"},
        {"__key__": "call7_3", "flac": audio(200.0), "json": {"text": "x", "terms": ["Mailbox"], "recording": "r"}},
    )
    clips, drops = load(path)
    assert [(clip.clip_id, clip.terms, clip.text) for clip in clips] == [
        ("call7_1", ("pound key",), "press the pound key"),
        ("a/call7_2", (), "hold on"),
        ("call7_3", ("mailbox",), "x"),
    ]
    assert (clips[0].speaker, clips[2].recording) == ("ann", "r")
    assert drops.num_dropped == 0
    assert not drops.notes
    for clip, hertz in zip(clips, (440.0, 300.0, 200.0), strict=True):
        assert clip.audio_path.startswith(f"{path}:")
        np.testing.assert_array_equal(read_pcm(clip.audio_path), read_pcm(wav("y.wav", hertz=hertz)))


def test_webdataset_reads_the_same_samples_out_of_the_tar(shard, audio, load):
    path = shard(*({"__key__": f"k{n}", "wav": audio(200.0 + n), "json": {"text": "", "terms": []}} for n in range(5)))
    clips, _ = load(path)
    theirs = list(webdataset.WebDataset(str(path), shardshuffle=False, empty_check=False))
    assert [one["__key__"] for one in theirs] == [clip.clip_id for clip in clips]
    for one, clip in zip(theirs, clips, strict=True):
        file, _, span = clip.audio_path.rpartition(":")
        offset, size = map(int, span.split("+"))
        assert Path(file).read_bytes()[offset : offset + size] == one["wav"]


def test_records_of_this_project_within_a_tar(shard, audio, load, record):
    fields = record(term_chunk_audio=None, term_chunk_audio_start=0.1, partial_terms=["hall"])
    [clip], _ = load(shard({"__key__": "k", "wav": audio(), "json": fields}))
    assert (clip.clip_id, clip.start_s, clip.terms, clip.ignored) == ("s1", 0.1, ("artesia",), ("hall",))


def test_a_folder_of_tars(shard, audio, load, tmp_path):
    for number in (1, 0):
        shard(
            {"__key__": f"k{number}", "wav": audio(200.0 + number), "json": {"text": "", "terms": []}},
            name=f"s-{number}.tar",
        )
    clips, _ = load(tmp_path)
    assert [clip.clip_id for clip in clips] == ["k0", "k1"]


def add(tar, name, content=b"", kind=tarfile.REGTYPE, link=""):
    member = tarfile.TarInfo(name)
    member.size, member.type, member.linkname = len(content), kind, link
    tar.addfile(member, io.BytesIO(content))


GOOD = json.dumps({"text": "", "terms": []}).encode()


@pytest.mark.parametrize(
    ("name", "kind", "link"),
    [
        ("/etc/k1.wav", tarfile.REGTYPE, ""),
        ("../k1.wav", tarfile.REGTYPE, ""),
        ("a/../../k1.wav", tarfile.REGTYPE, ""),
        ("k1.wav", tarfile.SYMTYPE, "/etc/passwd"),
        ("k1.wav", tarfile.LNKTYPE, "k0.wav"),
        ("k1.wav", tarfile.FIFOTYPE, ""),
        ("k1.wav", tarfile.CHRTYPE, ""),
    ],
)
def test_members_that_no_honest_tar_has_are_refused_and_the_rest_is_read(tmp_path, audio, load, name, kind, link):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        add(tar, "k0.wav", audio())
        add(tar, "k0.json", GOOD)
        add(tar, name, audio() if kind == tarfile.REGTYPE else b"", kind, link)
        add(tar, "k2.wav", audio(300.0))
        add(tar, "k2.json", GOOD)
    clips, drops = load(path)
    assert [clip.clip_id for clip in clips] == ["k0", "k2"]
    assert drops.counts == {"unsafe_member": 1}
    assert {file.name for file in tmp_path.iterdir()} <= {"s.tar", "x.wav", "checks.jsonl"}, "nothing is unpacked"


@pytest.mark.parametrize(
    ("sample", "reason"),
    [
        ({"json": {"text": "", "terms": []}}, "no_audio_member"),
        ({"wav": b"1", "flac": b"1", "txt": ""}, "several_audio_members"),
        ({"wav": b"1"}, "missing_field"),
        ({"wav": b"1", "json": b"{"}, "bad_json"),
        ({"wav": b"1", "json": b"[" * 100_000}, "bad_json"),
        ({"wav": b"1", "json": b"[]"}, "not_an_object"),
        ({"wav": b"1", "json": {"text": 5, "terms": []}}, "wrong_type"),
        ({"wav": b"1", "json": {"text": "", "terms": [5]}}, "wrong_type"),
    ],
)
def test_bad_samples_are_dropped_and_counted(shard, audio, load, glossary, sample, reason):
    glossary("pound")
    clips, drops = load(shard({"__key__": "bad", **sample}, {"__key__": "good", "wav": audio(), "txt": "x"}))
    assert [clip.clip_id for clip in clips] == ["good"]
    assert drops.counts == {reason: 1}


def test_what_stands_before_a_break_is_kept_and_the_break_is_counted(shard, audio, load, tmp_path):
    path = shard(*({"__key__": f"k{n}", "wav": audio(200.0 + n), "json": {"text": "", "terms": []}} for n in range(4)))
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    clips, drops = load(path)
    assert [clip.clip_id for clip in clips] == ["k0"]
    assert drops.counts["broken_tar"] == 1
    path.write_bytes(b"no tar at all" * 1000)
    assert load(path)[1].counts == {"broken_tar": 1}
    used = whole.rstrip(b"\0")
    path.write_bytes(used + bytes(-len(used) % 512))
    clips, drops = load(path)
    assert len(clips) == 4
    assert drops.notes == {"tar_without_end": 1}
