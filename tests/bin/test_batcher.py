"""Clips wait while a batch runs and are the next one; failures, cancellations and closing leave nobody waiting."""

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import CancelledError

import numpy as np
import pytest
from numpy.typing import NDArray

from bin.batcher import Batcher, Busy
from retrieval.matches import Hits, Match


class Held:
    """A finder that answers when it is let: the length of each clip as its score, k times."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.started, self.let = threading.Semaphore(0), threading.Semaphore(0)

    def find(self, waves: Sequence[NDArray[np.int16]], k: int) -> list[Hits]:
        self.batches.append([len(wave_S) for wave_S in waves])
        self.started.release()
        self.let.acquire()
        if any(len(wave_S) == 13 for wave_S in waves):
            raise RuntimeError("out of memory")
        return [Hits(np.full(k, len(wave_S), np.float32), np.arange(k)) for wave_S in waves]

    def matches(self, hits: Hits, threshold: float | None = None) -> list[Match]:
        raise AssertionError("not the batcher's work")


@pytest.fixture
def held() -> Held:
    return Held()


@pytest.fixture
def batcher(held: Held) -> Iterator[Batcher]:
    batcher = Batcher(held, max_batch=3, max_waiting=5)
    yield batcher
    for _ in range(9):
        held.let.release()
    batcher.close()
    assert batcher.is_closed


def clip(length: int) -> NDArray[np.int16]:
    return np.zeros(length, np.int16)


def test_what_waits_is_the_next_batch_each_with_its_own_k(batcher: Batcher, held: Held) -> None:
    first = batcher.submit(clip(1), 2)
    held.started.acquire()
    futures = [batcher.submit(clip(n), n) for n in (2, 3, 4, 5)]
    for _ in range(3):
        held.let.release()
    assert first.result(5).scores_K.tolist() == [1, 1]
    assert [future.result(5).scores_K.tolist() for future in futures] == [[n] * n for n in (2, 3, 4, 5)]
    assert held.batches == [[1], [2, 3, 4], [5]]
    assert (batcher.num_batches, batcher.num_clips) == (3, 5)


def test_a_full_queue_is_told_at_once(batcher: Batcher, held: Held) -> None:
    batcher.submit(clip(1), 1)
    held.started.acquire()
    for _ in range(5):
        batcher.submit(clip(1), 1)
    with pytest.raises(Busy, match="5 clips are waiting"):
        batcher.submit(clip(1), 1)


def test_a_failed_batch_is_told_to_its_callers_alone(batcher: Batcher, held: Held) -> None:
    bad = batcher.submit(clip(13), 1)
    held.started.acquire()
    good = batcher.submit(clip(2), 1)
    held.let.release()
    with pytest.raises(RuntimeError, match="out of memory"):
        bad.result(5)
    held.let.release()
    assert good.result(5).scores_K.tolist() == [2]


def test_a_cancelled_clip_is_left_out(batcher: Batcher, held: Held) -> None:
    batcher.submit(clip(1), 1)
    held.started.acquire()
    gone, stays = batcher.submit(clip(2), 1), batcher.submit(clip(3), 1)
    assert gone.cancel()
    held.let.release()
    held.let.release()
    stays.result(5)
    assert held.batches == [[1], [3]]


def test_closing_finishes_the_batch_at_hand_and_cancels_the_rest(held: Held) -> None:
    batcher = Batcher(held)
    running = batcher.submit(clip(1), 1)
    held.started.acquire()
    waiting = batcher.submit(clip(2), 1)
    closer = threading.Thread(target=batcher.close)
    closer.start()
    with pytest.raises(CancelledError):
        waiting.result(5)
    held.let.release()
    closer.join(5)
    assert running.result(0).scores_K.tolist() == [1]
    with pytest.raises(Busy, match="closing"):
        batcher.submit(clip(1), 1)
