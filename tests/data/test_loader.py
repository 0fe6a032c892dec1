import gc
import itertools
import os
import signal
import time

import numpy as np
import pytest

from data.drops import DropLog
from data.loader import Loader, iterate_in_order
from data.packing import pack_clips
from data.pool import WorkerError
from data.settings import DataSettings
from data.shards import open_packed
from data.terms import variant_group
from data.windows import Prompt, Windows
from tests.data.processes import child_processes
from tests.data.tokens import NoTokens


@pytest.fixture
def clips(clip, wav):
    """Ten clips of 0.1 to 1.0 s, whose samples tell them apart by length."""
    made = []
    for number in range(10):
        seconds = 0.1 * (number + 1)
        path = wav(f"{number}.wav", seconds=seconds)
        made.append(clip(f"c{number}", path, text=f"text {number}", terms=(f"term {number}",), duration_s=seconds))
    return made


@pytest.fixture
def loader(clips, tokenize, settings):
    def make(batch_size=4, **changes):
        return Loader(changes.pop("clips", clips), batch_size, tokenize, changes.pop("settings", settings), **changes)

    return make


def ids(batches):
    return [batch.clip_ids for batch in batches]


def flat(lists):
    return list(itertools.chain.from_iterable(lists))


def test_an_epoch_holds_every_clip_once_in_an_order_of_seed_and_epoch(loader):
    first = ids(loader(seed=1).epoch(0))
    assert sorted(flat(first)) == [f"c{number}" for number in range(10)]
    assert [len(batch) for batch in first] == [4, 4, 2], "the last, smaller batch is kept from 2 clips a rank on"
    assert ids(loader(seed=1).epoch(0)) == first
    assert ids(loader(seed=1).epoch(1)) != first
    assert ids(loader(seed=2).epoch(0)) != first


def test_a_last_batch_too_small_is_left_out_and_said(loader, caplog):
    caplog.set_level("INFO")
    small = loader(batch_size=3)
    assert small.steps_per_epoch == 3
    assert len(ids(small.epoch(0))) == 3
    assert "the last 1 of 10 clips of each epoch's order fill no batch" in caplog.text


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_the_ranks_of_a_step_cover_the_global_batch_whatever_their_number(loader, world_size):
    whole = [set(batch) for batch in ids(loader(batch_size=6).epoch(3))]
    ranks = [ids(loader(batch_size=6, rank=rank, world_size=world_size).epoch(3)) for rank in range(world_size)]
    steps = loader(batch_size=6, world_size=world_size).steps_per_epoch
    assert all(len(batches) == steps for batches in ranks)
    for step in range(steps):
        together = flat(batches[step] for batches in ranks)
        assert len(together) == len(set(together))
        assert set(together) == whole[step]
        sizes = [len(batches[step]) for batches in ranks]
        assert max(sizes) - min(sizes) <= 1
        assert min(sizes) >= 1


def test_ranks_get_about_the_same_seconds(loader):
    loads = [sum(batch.duration_s for batch in loader(10, rank=rank, world_size=2).epoch(0)) for rank in range(2)]
    assert abs(loads[0] - loads[1]) <= 0.11 * sum(loads)


def test_resuming_in_an_epoch_sees_the_next_batch(loader):
    whole = ids(loader().epoch(5))
    assert ids(loader().epoch(5, start_step=1)) == whole[1:]
    assert ids(loader().epoch(5, start_step=3)) == []


@pytest.fixture(params=["loose", "packed"])
def many(request, clip, wav, tmp_path):
    """42 clips, 3 batches of 12 and one of 6, as loose files or in a packed folder."""
    made = []
    for number in range(42):
        seconds = 0.05 + 0.01 * number
        path = wav(f"many-{number}.wav", seconds=seconds, hertz=200.0 + 10 * number)
        made.append(clip(f"c{number}", path, text=f"text {number}", terms=(f"term {number % 9}",), duration_s=seconds))
    if request.param == "loose":
        return made
    pack_clips(made, tmp_path / "packed", DropLog())
    return open_packed(tmp_path / "packed")


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 3), (3, 1)])
@pytest.mark.parametrize("stopped_at", [1, 3])
def test_a_run_that_goes_on_at_another_world_size_sees_each_clip_once_in_the_epoch(
    loader, many, before, after, stopped_at
):
    def seen(world_size, start, stop):
        ranks = [loader(12, clips=many, seed=5, rank=rank, world_size=world_size) for rank in range(world_size)]
        assert {rank.steps_per_epoch for rank in ranks} == {4}
        parts = [list(itertools.islice(rank.epoch(2, start), stop - start)) for rank in ranks]
        assert all(len(part) == stop - start for part in parts)
        return [(name, size) for part in parts for batch in part
                for name, size in zip(batch.clip_ids, batch.num_samples, strict=True)]  # fmt: skip

    first, rest = seen(before, 0, stopped_at), seen(after, stopped_at, 4)
    assert sorted(first + rest) == sorted((f"c{number}", 800 + 160 * number) for number in range(42))
    whole = loader(12, clips=many, seed=5)
    assert {name for name, _ in rest} == set(flat(ids(whole.epoch(2, stopped_at)))), "exactly what was to come"
    assert whole.fingerprint == loader(12, clips=many, seed=5, world_size=after).fingerprint


@pytest.mark.parametrize("num_workers", [1, 3])
def test_workers_change_nothing(loader, settings, num_workers):
    settings.augment_speed, settings.augment_noise = 0.1, 0.5
    plain = list(loader().epoch(0))
    settings.num_workers = num_workers
    for expected, batch in zip(plain, loader().epoch(0), strict=True):
        assert batch.clip_ids == expected.clip_ids
        np.testing.assert_array_equal(batch.pcm_S, expected.pcm_S)
        np.testing.assert_array_equal(batch.token_ids_P, expected.token_ids_P)


def test_augmentation_differs_between_epochs_but_not_between_ranks(loader, settings):
    settings.augment_gain_db = 6.0

    def samples(epoch, **changes):
        batches = list(loader(batch_size=10, **changes).epoch(epoch))
        cut = [np.split(batch.pcm_S, np.cumsum(batch.num_samples)[:-1]) for batch in batches]
        return {
            name: pcm_S
            for batch, pcms in zip(batches, cut, strict=True)
            for name, pcm_S in zip(batch.clip_ids, pcms, strict=True)
        }

    alone, part = samples(0), samples(0, rank=1, world_size=2)
    assert part
    for name, pcm_S in part.items():
        np.testing.assert_array_equal(pcm_S, alone[name])
    assert not np.array_equal(samples(1)["c3"], alone["c3"])


def test_an_error_while_building_reaches_the_consumer_and_ends_the_workers(clips, settings):
    settings.num_workers = 2
    broken = Loader(clips, 4, NoTokens(), settings)
    batches = broken.epoch(0)
    with pytest.raises(ValueError, match="no token"):
        list(batches)
    assert not child_processes()


def test_a_tokenizer_that_no_worker_could_rebuild_is_refused(clips, settings):
    settings.num_workers = 2
    with pytest.raises(ValueError, match="num_workers is 2, but function has no recipe"):
        Loader(clips, 4, lambda strings: [[1] for _ in strings], settings)


def test_workers_live_from_epoch_to_epoch_and_end_with_the_loader(loader, settings):
    settings.num_workers = 2
    source = loader(batch_size=2)
    batches = source.epoch(0)
    first = next(batches)
    names, samples = first.clip_ids, first.pcm_S.copy()
    workers = child_processes()
    assert len(workers) == 2
    assert ids(source.epoch(0))[0] == names, "a new iteration begins anew, whatever was asked for before"
    with pytest.raises(RuntimeError, match="another epoch of this loader was begun"):
        next(batches)
    np.testing.assert_array_equal(first.pcm_S, samples)
    del batches, source
    gc.collect()
    assert not child_processes()
    np.testing.assert_array_equal(first.pcm_S, samples), "what was handed out stays good"


def test_a_batch_keeps_its_memory_until_it_is_dropped(loader, settings):
    """Fewer slots than batches: those that the caller keeps must not be written over."""
    plain = list(loader(batch_size=2).epoch(0))
    settings.num_workers = 1
    source = loader(batch_size=2)
    kept = list(source.epoch(0))
    for expected, batch in zip(plain, kept, strict=True):
        np.testing.assert_array_equal(batch.pcm_S, expected.pcm_S)
    assert kept[0].pcm_S.base is not None, "a view of the slot"
    assert kept[-1].pcm_S.base is None, "a copy, since the slots were taken"


def test_a_killed_worker_is_named_at_once(loader, clips, settings):
    settings.num_workers = 2
    batches = loader(batch_size=2, clips=clips * 20).epoch(0)  # far more than is built ahead
    next(batches)
    victim = min(child_processes())
    os.kill(victim, signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=rf"worker 0 \(process {victim}\) was killed by SIGKILL"):
        list(batches)
    assert time.monotonic() - started < 5
    assert not child_processes()


def test_audio_that_fails_in_a_worker_is_counted_and_logged_here(loader, settings, tmp_path, caplog):
    settings.num_workers = 2
    bad = ids(loader(batch_size=2, rank=0, world_size=2).epoch(0))[0]
    (tmp_path / f"{bad[0][1:]}.wav").unlink()
    drops = DropLog()
    first = next(loader(batch_size=2, rank=0, world_size=2, drops=drops).epoch(0))
    assert first.num_clips == 1
    assert drops.counts == {"missing": 1}
    assert "stands in" in caplog.text


# ---------------------------------------------------------------- audio that fails


def test_audio_that_fails_is_dropped_and_counted_never_replaced_by_silence(loader, clips, tmp_path):
    (tmp_path / "3.wav").unlink()
    (tmp_path / "5.wav").write_text("no audio")
    drops = DropLog()
    drops.seen(10)
    source = loader(drops=drops)
    for epoch in range(2):
        batches = list(source.epoch(epoch))
        names = flat(ids(batches))
        assert sorted(names) == [f"c{number}" for number in range(10) if number not in (3, 5)]
        for batch in batches:
            assert all(np.abs(part).max() > 0 for part in np.split(batch.pcm_S, np.cumsum(batch.num_samples)[:-1]))
            assert len(batch.pos_indptr_B1) == batch.num_clips + 1
    assert drops.counts == {"missing": 1, "not_audio": 1}
    assert drops.over_limit()


def test_a_rank_whose_clips_all_fail_takes_another_clip(loader, tmp_path, caplog):
    bad = ids(loader(batch_size=2, rank=0, world_size=2).epoch(0))[0]
    (tmp_path / f"{bad[0][1:]}.wav").unlink()
    drops = DropLog()
    first = next(loader(batch_size=2, rank=0, world_size=2, drops=drops).epoch(0))
    assert first.num_clips == 1
    assert first.clip_ids != bad
    assert drops.counts == {"missing": 1}
    assert "stands in" in caplog.text


def test_when_nothing_can_be_read_the_run_stops(loader, tmp_path):
    for number in range(10):
        (tmp_path / f"{number}.wav").unlink()
    with pytest.raises(ValueError, match="none of 100 others could be read"):
        next(loader().epoch(0))


# ---------------------------------------------------------------- windows, settings, state


@pytest.fixture
def windows(wav):
    path = str(wav("prompt.wav", seconds=4.0))
    starts = tuple(0.4 * index for index in range(10))
    prompt = Prompt("p", path, 4.0, ("pound", "key") * 5, starts, tuple(start + 0.4 for start in starts))
    return Windows([prompt], ["pound key"], DataSettings())


def test_windows_are_mixed_into_the_epoch_and_new_in_each(loader, settings, windows):
    settings.window_fraction = 2.0
    source = loader(batch_size=6, windows=windows)
    assert (source.num_items, source.steps_per_epoch) == (30, 5)
    names = [flat(ids(source.epoch(epoch))) for epoch in range(2)]
    for epoch in range(2):
        assert sum(name.startswith("window:") for name in names[epoch]) == 20
        assert sum(name.startswith("c") for name in names[epoch]) == 10
    batches = list(source.epoch(0))
    spans = [set(flat(batch.num_samples for batch in source.epoch(epoch))) for epoch in range(2)]
    assert spans[0] != spans[1]
    assert any(len(set(batch.clip_index_B.tolist()) & {-1}) and batch.clip_index_B.max() >= 0 for batch in batches)


def test_the_fingerprint_changes_with_what_changes_the_order(loader, clips, settings, windows):
    base = loader().fingerprint
    assert loader(rank=1, world_size=2).fingerprint == base, "a run may go on with another number of ranks"
    assert loader(seed=1).fingerprint != base
    assert loader(batch_size=5).fingerprint != base
    assert loader(clips=clips[:-1]).fingerprint != base
    settings.window_fraction = 1.0
    assert loader(windows=windows).fingerprint != base


def test_sizes_that_make_no_batch_are_refused(loader, clips):
    with pytest.raises(ValueError, match="batch_size is 1; allowed are 2"):
        loader(batch_size=1, world_size=2)
    with pytest.raises(ValueError, match="seed is -1"):
        loader(seed=-1)
    with pytest.raises(ValueError, match="1 clips make no batch"):
        loader(clips=clips[:1])
    with pytest.raises(ValueError, match="no training clip is left"):
        loader(clips=[])


def test_any_term_of_the_run_is_masked_where_a_text_speaks_it(clip, wav, tokenize, settings):
    path = wav("a.wav", seconds=2.0)
    pair = [
        clip("0", path, text="press the pound key", terms=("press",), end_s=1.0),
        clip("1", path, text="hello", terms=("pound key",), start_s=1.0),
    ]

    def ignored_of_press():
        [batch] = Loader(pair, 2, tokenize, settings).epoch(0)
        return np.split(batch.ign_groups, batch.ign_indptr_B1[1:-1])[batch.clip_ids.index("0")].tolist()

    assert ignored_of_press() == [variant_group("press"), variant_group("pound key")]
    settings.mask_spoken_terms = False
    assert ignored_of_press() == [variant_group("press")]


# ---------------------------------------------------------------- in order


def test_in_order_every_clip_once_with_its_index(clips, tokenize, tmp_path):
    (tmp_path / "3.wav").unlink()
    (tmp_path / "9.wav").unlink()
    drops = DropLog()
    batches = list(iterate_in_order(clips, 3, tokenize, drops=drops))
    assert [batch.clip_index_B.tolist() for batch in batches] == [[0, 1, 2], [4, 5], [6, 7, 8]]
    assert drops.counts == {"missing": 2}
    with pytest.raises(ValueError, match="batch_size is 0"):
        list(iterate_in_order(clips, 0, tokenize))
