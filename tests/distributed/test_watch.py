"""The watch over the ranks: who is behind, who is silent, who speaks. (In a real run: tests/faults.)"""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable

import pytest
import torch.distributed

from distributed import watch
from distributed.watch import RankWatch


class Store(dict):
    """What the watch uses of a torch store."""

    def get(self, key: str) -> bytes:  # type: ignore[override]
        return self[key].encode()

    def compare_set(self, key: str, expected: str, value: str) -> None:
        assert expected == ""
        self.setdefault(key, value)

    def set(self, key: str, value: str) -> None:
        self[key] = value

    def check(self, keys: list[str]) -> bool:
        return all(key in self for key in keys)


class GoneStore(Store):
    def check(self, keys: list[str]) -> bool:
        raise torch.distributed.DistNetworkError("Connection reset by peer")


class Ranks:
    """Watches of several ranks over one store, with a clock of their own."""

    def __init__(self, world_size: int, time_limit_s: float = 80.0, **more: bool | range) -> None:
        self.store, self.counts, self.places = Store(), [5] * world_size, ["bin/train.py:1 train"] * world_size
        self.alive = set(range(world_size))
        self.watches = [
            RankWatch(
                self.store, r, world_size, time_limit_s, lambda r=r: self.counts[r], lambda r=r: self.places[r], **more
            )
            for r in range(world_size)
        ]
        self.now = self.watches[0]._since

    def run(self, seconds: float) -> None:
        every_s = self.watches[0].every_s
        for _ in range(round(seconds / every_s)):
            self.now += every_s
            for r in sorted(self.alive):
                self.watches[r].beat(self.now)


def test_the_rank_with_fewer_collectives_is_named_once_with_its_place(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(3)
    ranks.counts, ranks.places[1] = [6, 5, 6], "data/audio.py:88 decode"
    with caplog.at_level(logging.WARNING):
        ranks.run(35.0)
        assert not caplog.records  # half the limit is not over
        ranks.run(45.0)
    assert [r.getMessage() for r in caplog.records] == ["waiting for 40 s: rank 1 is at data/audio.py:88 decode"]
    assert ranks.watches[2].verdict == "rank 1 is at data/audio.py:88 decode"  # for the error at the limit


def test_a_stopped_rank_is_named_by_the_first_that_waits(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(3)
    ranks.run(1 * ranks.watches[0].every_s)
    ranks.alive.discard(0)
    ranks.counts = [5, 6, 6]
    with caplog.at_level(logging.WARNING):
        ranks.run(60.0)
    assert len(caplog.records) == 1
    assert "rank 0 does not answer, last seen at bin/train.py:1 train" in caplog.text


def test_a_rank_that_never_came_is_named() -> None:
    ranks = Ranks(2)
    ranks.alive = {0}
    ranks.run(60.0)
    assert ranks.watches[0].verdict == "rank 1 never reported"


def test_nothing_is_read_or_said_while_the_ranks_move(caplog: pytest.LogCaptureFixture) -> None:
    ranks = Ranks(2)
    with caplog.at_level(logging.WARNING):
        for step in range(12):
            ranks.counts = [6 + step, 6 + step]
            ranks.run(10.0)
    assert not caplog.records
    assert ranks.watches[0]._seen == {}
    assert ranks.watches[0].verdict == ""


def test_the_verdict_goes_when_the_wait_is_over() -> None:
    ranks = Ranks(2)
    ranks.counts = [6, 5]
    ranks.run(60.0)
    assert ranks.watches[0].verdict
    ranks.counts = [7, 7]
    ranks.run(10.0)
    assert ranks.watches[0].verdict == ""


def test_the_thread_posts_where_the_main_thread_is_and_ends() -> None:
    store = Store()
    watch.start(store, 0, 1, 2.0)  # type: ignore[arg-type]
    threads = [t for t in threading.enumerate() if t.name == "rank-watch"]
    for _ in range(400):
        if "watch-0" in store:
            break
        threads[0].join(0.01)
    assert "no line of this program" in json.loads(store["watch-0"])["at"] or "tests/" in store["watch-0"]
    assert watch.last_words(RuntimeError("[gloo] Connection closed by peer"), "") == ""
    watch.stop()
    threads[0].join(5.0)
    assert not threads[0].is_alive()


def test_the_first_rank_that_failed_is_told_by_those_whom_it_took_along(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks, closed = Ranks(3), RuntimeError("[gloo/pair.cc:5] Connection closed by peer")

    def on(rank: int, error: Exception) -> str:
        monkeypatch.setattr(watch, "_current", ranks.watches[rank])
        return watch.last_words(error, f"{type(error).__name__}: {error}")

    assert on(0, closed) == "", "a rank that was killed leaves none"
    assert on(1, OSError("no disk")) == ""
    assert on(2, ValueError("another, later")) == ""
    assert on(0, closed) == on(2, torch.distributed.DistBackendError("NCCL")) == "rank 1: OSError: no disk"
    ranks.store = GoneStore()
    ranks.watches[0].store, ranks.watches[0].verdict = ranks.store, "rank 1 never reported"
    assert on(0, closed) == "waiting for: rank 1 never reported"


def ended_process() -> int:
    """The number of a process that was there. It has ended, but nobody has collected it: torchrun may be slow to."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    return process.pid


def posts_of(ranks: Ranks, rank: int, pid: int) -> None:
    ranks.store[f"watch-{rank}"] = json.dumps({"post": 1, "count": 5, "at": "", "pid": pid})
    ranks.alive.discard(rank)


@pytest.mark.skipif(sys.platform != "linux", reason="ended and not collected is told from living by Linux' /proc")
def test_a_killed_rank_is_named_and_not_waited_for_long() -> None:
    ranks, pid = Ranks(3, neighbours=range(3)), ended_process()
    watch_0 = ranks.watches[0]
    ranks.run(5.0)
    assert watch_0.tell_gone() == ""
    posts_of(ranks, 1, pid)
    ranks.watches[0]._pids.clear()
    ranks.run(10.0)
    assert watch_0.tell_gone() == f"rank 1 is gone: process {pid} has ended"
    ranks.counts[0] += 1  # it still moves
    ranks.run(10.0)
    assert watch_0.must_end == ""
    ranks.run(5.0)
    assert watch_0.must_end == f"rank 1 is gone: process {pid} has ended; this rank still waited"


@pytest.mark.skipif(sys.platform != "linux", reason="ended and not collected is told from living by Linux' /proc")
def test_a_rank_that_has_left_in_order_or_is_elsewhere_is_not_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    here, elsewhere, pid = Ranks(2, neighbours=range(2)), Ranks(2, neighbours=range(1)), ended_process()
    for ranks in (here, elsewhere):
        posts_of(ranks, 1, pid)
    here.watches[1].leave()
    for ranks in (here, elsewhere):
        ranks.run(30.0)
        assert ranks.watches[0].must_end == ""
    del here.store["left-1"]
    monkeypatch.setattr(watch, "_current", here.watches[0])
    closed = RuntimeError("[gloo/pair.cc:5] Connection closed by peer")
    assert watch.last_words(closed, "") == f"rank 1 is gone: process {pid} has ended"
    assert watch.gone() == f"rank 1 is gone: process {pid} has ended; "
    assert here.watches[0].is_leaving
    monkeypatch.setattr(watch, "_current", None)
    assert watch.gone() == ""


@pytest.mark.skipif(sys.platform != "linux", reason="ended and not collected is told from living by Linux' /proc")
def test_for_a_rank_0_that_was_killed_the_first_that_lives_speaks(monkeypatch: pytest.MonkeyPatch) -> None:
    closed = RuntimeError("[gloo/pair.cc:5] Connection closed by peer")

    def speakers(ranks: Ranks, ask: Callable[[], str]) -> list[int]:
        found = []
        for r in sorted(ranks.alive - {0}):
            monkeypatch.setattr(watch, "_current", ranks.watches[r])
            ask()
            found += [r] if watch.speaks() else []
        return found

    def ranks_without(*killed: int, **more: range) -> Ranks:
        ranks, pid = Ranks(4, **{"neighbours": range(4), **more}), ended_process()
        ranks.run(5.0)
        for rank in killed:
            posts_of(ranks, rank, pid)
        for one in ranks.watches:
            one._pids.clear()
        return ranks

    for ask in (lambda: watch.last_words(closed, ""), watch.gone):
        assert speakers(ranks_without(0), ask) == [1]
        assert speakers(ranks_without(0, 1), ask) == [2]
        assert speakers(ranks_without(2), ask) == [], "rank 0 lives"
        assert speakers(ranks_without(0, neighbours=range(1, 4)), ask) == [], "nobody saw rank 0's process"
        failed = ranks_without(0)
        failed.store[watch.LAST_WORDS_KEY] = "rank 0: OSError: no disk"
        assert speakers(failed, ask) == [], "rank 0 has told its error itself"
        in_order = ranks_without(0)
        in_order.watches[0].leave()
        assert speakers(in_order, ask) == []
    assert speakers(ranks_without(0), lambda: watch.last_words(OSError("a disk of this rank's own"), "")) == []
    monkeypatch.setattr(watch, "_current", ranks_without().watches[0])
    assert watch.speaks()
    monkeypatch.setattr(watch, "_current", None)
    assert watch.speaks(), "a run of one process"


def test_a_rank_that_failed_is_not_waited_for_long_though_it_may_hang_in_its_end() -> None:
    ranks = Ranks(2)
    ranks.store[watch.LAST_WORDS_KEY] = "rank 1: OSError: no disk"
    ranks.run(10.0)
    assert ranks.watches[0].must_end == ""
    ranks.run(5.0)
    assert ranks.watches[0].must_end == "rank 1: OSError: no disk; this rank still waited"


def test_with_nccl_the_thread_comes_before_a_time_limit_that_would_abort_without_a_word() -> None:
    with_nccl, gloo = Ranks(2, has_nccl=True), Ranks(2)
    for ranks in (with_nccl, gloo):
        ranks.counts = [6, 5]
        ranks.run(70.0)
        assert ranks.watches[0].must_end == ""
        ranks.run(9.0)
    assert with_nccl.watches[0].must_end == "waited for 75 s: rank 1 is at bin/train.py:1 train"
    assert with_nccl.watches[1].must_end == "", "who is waited for may still come"
    assert gloo.watches[0].must_end == "", "its own time-out raises, and that is told in order"


@pytest.mark.parametrize("rank", [0, 1])
def test_ending_from_the_thread_is_told_first_by_the_rank_that_speaks(
    capfd: pytest.CaptureFixture[str], rank: int
) -> None:
    code = (
        "import sys, time; from distributed import watch\n"
        "class Store(dict):\n"
        "    def set(self, key, value): self[key] = value\n"
        "    def check(self, keys): return False\n"
        f"watch.start(Store(), {rank}, 2, 0.8); watch.report_to(lambda reason: print('told', reason, flush=True))\n"
        "watch._current.must_end = 'rank 1 is gone'; time.sleep(60)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=watch.ROOT, timeout=30)
    assert done.returncode == 1
    assert capfd.readouterr().out == ("told rank 1 is gone\n" if rank == 0 else "")
