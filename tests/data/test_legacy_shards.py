import numpy as np
import pytest

from data.audio import read_pcm
from data.legacy_shards import LegacyShards


@pytest.fixture
def shards(tmp_path):
    """shards(number=0, unit=2, **arrays) writes a shard of two clips in the old layout; returns (folder, the clips)."""

    def write(number=0, unit=2, paths=("a/one.wav", "a/two.wav"), drop=0, **changes):
        folder = tmp_path / "old"
        folder.mkdir(exist_ok=True)
        rng = np.random.default_rng(number)
        clips = [rng.integers(-3000, 3000, n, dtype=np.int16) for n in (1600, 2400)]
        content = b"".join(clip.astype("<i2").tobytes() for clip in clips)
        (folder / f"shard_{number:05}.dat").write_bytes(content[: len(content) - drop])
        arrays = {
            "key": np.array([f"k{number}_{path.split('/')[-1][:-4]}" for path in paths], dtype=object),
            "relpath": np.array(paths, dtype=object),
            "dtype": np.array(["int16", "int16"], dtype=object),
            "offset": np.array([0, 1600]) * 2 // unit,
            "length": np.array([1600, 2400]) * 2 // unit,
        } | changes
        arrays = {name: array for name, array in arrays.items() if array is not None}
        np.savez(folder / f"shard_{number:05}.index.npz", **arrays)
        return folder, clips

    return write


@pytest.mark.parametrize("unit", [1, 2])
def test_clips_are_found_by_the_end_of_their_path_and_by_their_key(shards, unit):
    folder, clips = shards(unit=unit)
    found = LegacyShards(folder)
    assert len(found) == 2
    for written in ("/gone/set/a/two.wav", "a/two.wav", "./a/two.wav", "k0_two", "elsewhere/k0_two.flac"):
        np.testing.assert_array_equal(read_pcm(found.find(written)), clips[1])
    np.testing.assert_array_equal(read_pcm(found.find("a/one.wav"), 0.01, 0.05), clips[0][160:800])
    assert found.find("b/two.wav") is None
    assert found.find("/gone/a/three.wav") is None


def test_samples_take_their_audio_out_of_old_shards_only_when_told(shards, samples, record, load, wav):
    folder, clips = shards()
    rows = [
        record(term_chunk_audio="/gone/a/one.wav"),
        record(segment_id="s2", term_chunk_audio="beside.wav"),
        record(segment_id="s3", term_chunk_audio="nowhere.wav"),
    ]
    wav("beside.wav")
    [first, second], drops = load(samples(rows), legacy_shards=str(folder))
    np.testing.assert_array_equal(read_pcm(first.audio_path), clips[0])
    assert second.audio_path.endswith("beside.wav"), "what the shards lack is looked for as ever"
    assert "among the 2 clips of" in drops.lines()[0]["detail"]
    assert [clip.clip_id for clip in load(samples(rows), legacy_shards=None)[0]] == ["s2"]


def test_shards_that_hold_none_of_the_audio_are_told(shards, samples, record, load, wav, caplog):
    wav("a.wav")
    load(samples([record()]), legacy_shards=str(shards()[0]))
    assert "they hold none of the audio that the samples name" in caplog.text


def test_a_name_that_stands_for_two_clips_is_no_name(shards, caplog):
    folder, _ = shards(0)
    shards(1, paths=("a/one.wav", "b/other.wav"))
    found = LegacyShards(folder)
    assert len(found) == 4
    assert found.find("a/one.wav") is None
    assert found.find("k1_one") is not None
    assert "1 names stand for several clips each: a/one.wav" in caplog.text


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": 2}, "the last clip ends at 4000, but the .dat file has 7998 bytes"),
        ({"key": None}, "array 'key' cannot be read"),
        ({"offset": None}, "has none of the arrays offset"),
        ({"offset": np.array([0.0, 1600.0])}, "allowed are counts in a row"),
        ({"offset": np.array([-1, 1600])}, "allowed are counts in a row"),
        ({"offset": np.array([0, 1600, 5])}, "allowed is one of each a clip"),
        ({"offset": np.array([0, None])}, "cannot be read"),
        ({"dtype": np.array(["int16", "float32"], dtype=object)}, r"dtype is \['float32', 'int16'\]; allowed is int16"),
    ],
)
def test_shards_that_are_not_what_they_say_are_refused(shards, changes, message):
    folder, _ = shards(**changes)
    with pytest.raises(ValueError, match=message):
        LegacyShards(folder)


def test_folders_without_shards_and_indexes_without_data(shards, tmp_path):
    with pytest.raises(ValueError, match="allowed is a folder that holds"):
        LegacyShards(tmp_path)
    folder, _ = shards()
    (folder / "shard_00000.dat").unlink()
    with pytest.raises(ValueError, match=r"shard_00000.dat: cannot be read"):
        LegacyShards(folder)


@pytest.mark.parametrize("array", ["key", "relpath", "dtype", "offset", "length"])
def test_an_index_with_one_bit_flipped_is_refused(shards, array):
    folder, _ = shards()
    index = folder / "shard_00000.index.npz"
    content = bytearray(index.read_bytes())
    content[content.index(f"{array}.npy".encode()) + 100] ^= 1
    index.write_bytes(content)
    with pytest.raises(ValueError, match=r"shard_00000.index.npz"):
        LegacyShards(folder)
