import numpy as np
import pytest

from data.shards import audio_key
from data.stored import OpenShard, Stored


@pytest.fixture
def add(tmp_path):
    """add(shard, clips) gives a block of clips (int16 arrays; an empty one was dropped) as a worker's answer."""

    def give(shard: OpenShard, pcms: list[np.ndarray]) -> None:
        samples = np.concatenate([*pcms, np.zeros(0, np.int16)]).astype(np.int16).tobytes()
        samples += bytes(-len(samples) % 8)
        numbers = [
            [audio_key(pcm_S) for pcm_S in pcms], [len(pcm_S) for pcm_S in pcms], [7] * len(pcms), [1] * len(pcms),
        ]  # fmt: skip
        columns, content = [], samples
        for values in numbers:
            columns.append((len(content), len(values)))
            content += np.array(values, dtype=np.int64).tobytes()
        complaints = [[place, "silent", "quiet"] for place, pcm_S in enumerate(pcms) if not len(pcm_S)]
        shard.add({"columns": columns, "complaints": complaints}, memoryview(content))

    (tmp_path / "work").mkdir()
    return give


def some(seed: int, length: int = 500) -> np.ndarray:
    return np.random.default_rng(seed).integers(-3000, 3000, length).astype(np.int16)


def test_samples_are_stored_once_within_a_block_a_shard_and_a_folder(add, tmp_path):
    stored = Stored(tmp_path, tmp_path / "work")
    shard = OpenShard(stored)
    add(shard, [some(0), some(1), some(0), some(2)])
    add(shard, [some(3), some(1), np.zeros(0, np.int16)])
    shard.finish()
    shard = OpenShard(stored)
    add(shard, [some(2), some(4)])
    shard.finish()
    starts = [rows["start"].tolist() for rows in stored.rows()]
    assert starts == [[0, 500, 0, 1000, 1500, 500, -1], [1000, 2000]]
    assert stored.num_samples == 2500
    whole = b"".join((tmp_path / f"shard-0000{number}.pcm").read_bytes() for number in range(2))
    assert whole == np.concatenate([some(seed) for seed in range(5)]).tobytes()


def test_an_equal_key_is_not_taken_for_equal_samples(add, tmp_path, monkeypatch):
    stored = Stored(tmp_path, tmp_path / "work")
    shard = OpenShard(stored)
    monkeypatch.setattr("tests.data.test_stored.audio_key", lambda pcm_S: 5)
    add(shard, [some(0), some(1)])
    shard.finish()
    assert next(stored.rows())["start"].tolist() == [0, 500]


def test_what_is_finished_is_found_again_and_what_is_not_is_removed(add, tmp_path):
    stored = Stored(tmp_path, tmp_path / "work")
    shard = OpenShard(stored)
    add(shard, [some(0), some(1)])
    shard.finish()
    left = OpenShard(stored)
    add(left, [some(2)])
    again = Stored(tmp_path, tmp_path / "work")
    assert (again.num_clips, again.num_samples) == (2, 1000)
    assert not left.partial.exists()
    shard = OpenShard(again)
    add(shard, [some(1)])
    shard.finish()
    assert [rows["start"].tolist() for rows in again.rows()] == [[0, 500], [500]]


def test_a_shard_that_was_changed_is_refused(add, tmp_path):
    shard = OpenShard(Stored(tmp_path, tmp_path / "work"))
    add(shard, [some(0)])
    shard.finish()
    (tmp_path / "shard-00000.pcm").write_bytes(b"ab")
    with pytest.raises(ValueError, match="was changed; remove the folder and pack again"):
        Stored(tmp_path, tmp_path / "work")
