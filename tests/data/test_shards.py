import json
import os

import numpy as np
import pytest
import soundfile as sf

from data.clips import iterate_clips
from data.drops import DropLog
from data.packing import pack_clips
from data.reader import AudioReader
from data.shards import audio_key, open_packed, read_manifest, replaced_file, verify


@pytest.fixture
def packed(tmp_path, record, samples, settings):
    rng = np.random.default_rng(0)
    for number in range(5):
        sf.write(tmp_path / f"{number}.wav", rng.normal(0, 0.1, 1000), 16_000, subtype="PCM_16")
    rows = [record(segment_id=f"s{number}", term_chunk_audio=f"{number}.wav") for number in range(5)]
    drops = DropLog()
    pack_clips(iterate_clips(samples(rows), settings, drops), tmp_path / "packed", drops)
    return tmp_path / "packed"


def test_a_whole_folder_is_found_whole(packed):
    told = []
    assert verify(packed, lambda done, total: told.append((done, total))) == []
    assert told[-1][0] == told[-1][1] == sum(entry.size for entry in read_manifest(packed).files.values())


def test_a_flipped_bit_is_found_by_verify_wherever_it_is(packed):
    for name in ("shard-00000.pcm", "index.safetensors"):
        content = bytearray((packed / name).read_bytes())
        content[len(content) // 2] ^= 1
        (packed / name).write_bytes(content)
        assert verify(packed) == [f"{name}: the content is not what was packed (SHA-256 differs)"]
        content[len(content) // 2] ^= 1
        (packed / name).write_bytes(content)
    assert verify(packed) == []


def test_files_that_are_cut_off_or_gone_are_found_when_the_folder_is_opened(packed):
    os.truncate(packed / "shard-00000.pcm", 9000)
    with pytest.raises(
        ValueError, match=r"shard-00000.pcm: 9000 bytes, the manifest says 10000; copy the folder again"
    ):
        open_packed(packed)
    assert verify(packed) == ["shard-00000.pcm: 9000 bytes, the manifest says 10000"]
    (packed / "shard-00000.pcm").unlink()
    with pytest.raises(ValueError, match="No such file"):
        open_packed(packed)
    assert verify(packed) == ["shard-00000.pcm: No such file or directory"]


def test_an_index_newer_than_the_shards_is_found(packed):
    """An index of a longer packing, with a manifest made to agree about sizes."""
    manifest = json.loads((packed / "manifest.json").read_text())
    os.truncate(packed / "shard-00000.pcm", 8000)
    manifest["files"]["shard-00000.pcm"]["size"] = 8000
    (packed / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        ValueError, match="clips reach to sample 5000, the shards hold 4000: index and shards are not of"
    ):
        open_packed(packed)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"version": 2}, "format is 'earmark-shards' 2"),
        ({"files": {"../up": {"size": 1, "sha256": ""}}}, "'../up' leaves the folder"),
        ({"files": {}}, "no index.safetensors"),
        ({"num_clips": 4}, "5 clips, the manifest says 4"),
        ({"num_clips": None}, "pack again"),
    ],
)
def test_a_manifest_that_cannot_be_right_is_refused(packed, change, said):
    manifest = json.loads((packed / "manifest.json").read_text())
    (packed / "manifest.json").write_text(json.dumps(manifest | change))
    with pytest.raises(ValueError, match=said):
        open_packed(packed)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"[]", b"\xff\xfe"])
def test_a_manifest_that_is_none_is_refused(packed, content):
    (packed / "manifest.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"manifest.json: .*pack again"):
        open_packed(packed)


def test_a_shard_removed_while_it_is_read_stays_readable(packed):
    """The map holds the file; a reader that comes later says that it is missing."""
    table, reader = open_packed(packed), AudioReader()
    first = reader.read(*table.audio(0)).copy()
    (packed / "shard-00000.pcm").unlink()
    np.testing.assert_array_equal(reader.read(*table.audio(0)), first)
    with pytest.raises(Exception, match="missing: no such file"):
        AudioReader().read(*table.audio(0))


def test_keys_are_equal_for_equal_samples_alone():
    pcm_S = np.random.default_rng(0).integers(-30_000, 30_000, 1003).astype(np.int16)
    assert audio_key(pcm_S) == audio_key(pcm_S.copy()) == audio_key(np.r_[pcm_S, pcm_S][: len(pcm_S)])
    others = [pcm_S[:-1], pcm_S[1:], np.roll(pcm_S, 4), np.r_[pcm_S, np.zeros(1, np.int16)]]
    for place in (0, 500, 1001, 1002):
        changed = pcm_S.copy()
        changed[place] += 1
        others.append(changed)
    keys = {audio_key(other) for other in others}
    assert len(keys) == len(others)
    assert audio_key(pcm_S) not in keys


def fail(num_written):
    raise OSError(f"full after {num_written} bytes")


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path):
    path = tmp_path / "file"
    with replaced_file(path) as file:
        file.write(b"first")
    with pytest.raises(OSError, match="full"), replaced_file(path) as file:
        fail(file.write(b"half"))
    assert path.read_bytes() == b"first"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
