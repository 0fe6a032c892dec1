import numpy as np
import pytest

from data.shards import audio_key
from data.stored import OpenShard, Stored
from data.table_writer import rows_of


@pytest.fixture
def add(tmp_path, clip):
    """add(shard, clips) gives a block of clips (int16 arrays; an empty one was dropped) as a worker's answer."""

    def give(shard: OpenShard, pcms: list[np.ndarray]) -> None:
        samples = np.concatenate([*pcms, np.zeros(0, np.int16)]).astype(np.int16).tobytes()
        samples += bytes(-len(samples) % 8)
        kept = [(number, pcm_S) for number, pcm_S in enumerate(pcms) if len(pcm_S)]
        rows = rows_of([clip(str(number)) for number, _ in kept], packed=True)
        rows["audio_key"] = np.array([audio_key(pcm_S) for _, pcm_S in kept], dtype=np.int64)
        rows["num_samples"] = np.array([len(pcm_S) for _, pcm_S in kept], dtype=np.int64)
        columns, content = {}, samples
        for name, values in rows.items():
            columns[name] = (len(content), len(values), values.dtype.name)
            content += values.tobytes() + bytes(-values.nbytes % 8)
        complaints = [[place, "silent", "test", "quiet"] for place, pcm_S in enumerate(pcms) if not len(pcm_S)]
        answer = {"columns": columns, "complaints": complaints, "num_listed": len(pcms)}
        shard.add(answer, memoryview(content))

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
    starts = [rows["sample_start"].tolist() for rows, _ in stored.rows()]
    assert starts == [[0, 500, 0, 1000, 1500, 500], [1000, 2000]]
    assert [complaints for _, complaints in stored.rows()] == [[["silent", "test", "quiet"]], []]
    assert stored.num_clips == 9, "dropped ones are dealt with too"
    assert stored.num_samples == 2500
    whole = b"".join((tmp_path / f"shard-0000{number}.pcm").read_bytes() for number in range(2))
    assert whole == np.concatenate([some(seed) for seed in range(5)]).tobytes()


def test_an_equal_key_is_not_taken_for_equal_samples(add, tmp_path, monkeypatch):
    stored = Stored(tmp_path, tmp_path / "work")
    shard = OpenShard(stored)
    monkeypatch.setattr("tests.data.test_stored.audio_key", lambda pcm_S: 5)
    add(shard, [some(0), some(1)])
    shard.finish()
    assert next(stored.rows())[0]["sample_start"].tolist() == [0, 500]


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
    assert [rows["sample_start"].tolist() for rows, _ in again.rows()] == [[0, 500], [500]]


def test_a_shard_that_was_changed_is_refused(add, tmp_path):
    shard = OpenShard(Stored(tmp_path, tmp_path / "work"))
    add(shard, [some(0)])
    shard.finish()
    (tmp_path / "shard-00000.pcm").write_bytes(b"ab")
    with pytest.raises(ValueError, match="was changed; remove the folder and pack again"):
        Stored(tmp_path, tmp_path / "work")
