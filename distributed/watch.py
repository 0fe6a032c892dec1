"""Who keeps the others waiting: names a stalled rank, and the line of code it is at, before the time limit strikes.

    rank 0   in collective 118                       posts  118  bin/train.py:230 train
    rank 1   in collective 118                       posts  118  bin/train.py:230 train
    rank 2   still reading a file after collective 117      117  data/audio.py:88 decode     <- named
    rank 3   stopped, or its machine is gone         posts nothing any more                  <- named

A rank that fails leaves its last words at the store, so that rank 0, which only sees a connection closed, can tell why.
One that was killed leaves none: it is known by its process, which has ended without a mark that it left.

    rank 0   waits for its GPU, which waits for rank 1's        no line of Python runs, signals included
    rank 1   killed

With NCCL that is what a death mostly looks like: the host is ahead of its GPU, a kernel polls the memory of a GPU that
does not write any more, and no socket is closed. So the thread also ends its own process, with the reason told, when a
rank of this machine is gone, or any has left last words, and the main thread has not come to its next collective for a
while; torchrun alone would wait until it may kill. Likewise just before NCCL's own time limit strikes, if it is known
who is waited for.

All ranks make the same collectives in the same order, so that the rank with the fewest behind it is the one that all
others wait for. A thread in each process posts that count and the place of the main thread to the store that the ranks
met at; those of other ranks are not read until one has been waiting for long, but for the process numbers of this
machine's, once.
"""

import contextlib
import itertools
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch.distributed as dist

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
LONGEST_WAIT_S = 60.0  # then the rank that is waited for is named, or at half the time limit when that is sooner
LAST_WORDS_KEY = "last-words"
LAST_WORDS_S = 3.0  # for leaving or reading them; the store may be gone as well
GONE_S = 10.0  # from noticing that a rank is gone to the end of this one; torchrun kills after 30 s, or what was set
SEEN_GONE_S = 2.0  # a killed process is there for as long as its memory is being freed
MISSED_POSTS = 4  # looks at the posts before a rank that changes none of them is taken for stopped

_count = itertools.count(1)
_num_collectives = 0
_current: "RankWatch | None" = None


def count_collective() -> None:
    """To be called at the start of each collective."""
    global _num_collectives
    _num_collectives = next(_count)


def last_words(error: BaseException, words: str) -> str:
    """Leave to the others what ended this rank; or, for an error that another rank's end has caused, tell the cause.

    Returns `rank 1: its words` of the first rank that failed, else who is gone or whom this one has been waiting for,
    or nothing. From here on this process is left to end by itself.
    """
    if _current is None:
        return ""
    watch, found = _current, ""
    watch.is_leaving = True
    # What gloo raises has no type of its own.
    is_consequence = isinstance(error, dist.DistError) or "gloo" in str(error)

    def ask() -> None:
        nonlocal found
        with contextlib.suppress(RuntimeError):  # no store any more: its process or machine was the one that ended
            if not is_consequence:
                watch.store.compare_set(LAST_WORDS_KEY, "", f"rank {watch.rank}: {words}")
            elif watch.store.check([LAST_WORDS_KEY]):
                found = watch.store.get(LAST_WORDS_KEY).decode()
            else:
                found = watch.tell_gone(SEEN_GONE_S)

    asking = threading.Thread(target=ask, name="last-words", daemon=True)
    asking.start()
    asking.join(LAST_WORDS_S)
    return found or (f"waiting for: {watch.verdict}" if watch.verdict else "")


def gone() -> str:
    """`rank 1 is gone: process 4711 has ended; ` for those of this machine, or nothing. From here on this process is
    left to end by itself."""
    if _current is None:
        return ""
    _current.is_leaving = True
    with contextlib.suppress(RuntimeError):
        told = _current.tell_gone()
        return f"{told}; " if told else ""
    return ""


def speaks() -> bool:
    """Whether this rank is the one that writes down what ended the run: rank 0; once that was seen to have been killed,
    the first of its machine that lives."""
    return _current is None or _current.speaks


def start(
    store: dist.Store,
    rank: int,
    world_size: int,
    time_limit_s: float,
    neighbours: range = range(0),
    has_nccl: bool = False,
) -> None:
    """Watch from now on. store: a client of its own. neighbours: the ranks of this machine."""
    global _current
    stop()
    _current = RankWatch(store, rank, world_size, time_limit_s, neighbours=neighbours, has_nccl=has_nccl)
    _current.thread.start()


def report_to(report: Callable[[str], None]) -> None:
    """`report` is given the reason when the thread has to end this process, if it is the one that `speaks`."""
    if _current is not None:
        _current.report = report


def stop() -> None:
    """Leave in order: the others must not take this process for killed."""
    global _current
    if _current is not None:
        watch, _current = _current, None
        watch.ended.set()
        leaving = threading.Thread(target=watch.leave, name="leave-watch", daemon=True)
        leaving.start()
        leaving.join(LAST_WORDS_S)


class RankWatch:
    """The posts of one rank, and what it reads out of those of the others.

    Tests give their own store, counter, place and times; `beat` is what the thread does every `every_s` seconds.
    """

    def __init__(
        self,
        store: Any,
        rank: int,
        world_size: int,
        time_limit_s: float,
        count: Callable[[], int] = lambda: _num_collectives,
        place: Callable[[], str] | None = None,
        neighbours: range = range(0),
        has_nccl: bool = False,
    ) -> None:
        main_thread = threading.main_thread().ident
        self.store, self.rank, self.world_size = store, rank, world_size
        self.wait_s = min(LONGEST_WAIT_S, time_limit_s / 2)
        self.every_s = self.wait_s / 8
        self.gone_s = min(GONE_S, time_limit_s / 2)
        self.limit_s = time_limit_s - self.every_s if has_nccl else float("inf")
        self.neighbours = [r for r in neighbours if r != rank]
        self.count = count
        self.place = place or (lambda: _place_of(sys._current_frames().get(main_thread or 0)))
        self.verdict = ""
        self.must_end = ""  # why the main thread is not waited for any longer
        self.is_leaving = False
        self.speaks = rank == 0
        self.report: Callable[[str], None] = lambda reason: None
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._num_posts = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (its last post, when that was new to us)
        self._pids: dict[int, int] = {}
        self._gone_at: tuple[int, float] | None = None  # the count, and when, as a rank was first seen to be gone
        self._last, self._since, self._told = count(), time.monotonic(), False

    def beat(self, now: float) -> None:
        """Post; and when the last collective is long ago, see who is behind, and say so once."""
        self._num_posts += 1
        post = {"post": self._num_posts, "count": self.count(), "at": self.place(), "pid": os.getpid()}
        self.store.set(f"watch-{self.rank}", json.dumps(post))
        if self.count() != self._last:
            self._last, self._since, self._told, self.verdict = self.count(), now, False, ""
        self._look_for_gone(now)
        waited_s = now - self._since
        if waited_s < self.wait_s - MISSED_POSTS * self.every_s:
            return
        posts = self._read(now)
        if waited_s >= self.wait_s:
            silent = {r for r in posts if now - self._seen[r][1] >= (MISSED_POSTS - 1) * self.every_s}
            furthest = max(post["count"] for post in posts.values())
            waiting = [r for r, post in posts.items() if post["count"] == furthest and r not in silent]
            self.verdict = self._describe(posts, silent, furthest)
            if self.verdict and not self._told and waiting[:1] == [self.rank]:  # one rank speaks for all that wait
                logger.warning("waiting for %.0f s: %s", waited_s, self.verdict)
                self._told = True
            if self.verdict and waited_s >= self.limit_s and self.rank in waiting:
                self.must_end = f"waited for {waited_s:.0f} s: {self.verdict}"

    def tell_gone(self, wait_s: float = 0.0) -> str:
        """Which ranks of this machine have ended without a word, looking for up to `wait_s`.

        For a rank 0 among them the first that lives `speaks`; not for one that failed, which has left its last words
        and told them.
        """
        deadline = time.monotonic() + wait_s
        while not (ranks := self._gone()) and self.neighbours and time.monotonic() < deadline:
            time.sleep(0.05)
        first_living = min({self.rank, *self.neighbours} - set(ranks))
        self.speaks |= 0 in ranks and first_living == self.rank and not self.store.check([LAST_WORDS_KEY])
        return "; ".join(f"rank {r} is gone: process {self._pids[r]} has ended" for r in ranks)

    def leave(self) -> None:
        with contextlib.suppress(RuntimeError):  # the store may have gone first
            self.store.set(f"left-{self.rank}", "")

    def _gone(self) -> list[int]:
        for r in self.neighbours:
            if r not in self._pids and self.store.check([f"watch-{r}"]):
                self._pids[r] = json.loads(self.store.get(f"watch-{r}"))["pid"]
        ended = [r for r in self.neighbours if r in self._pids and not _is_alive(self._pids[r])]
        return [r for r in ended if not self.store.check([f"left-{r}"])]

    def _look_for_gone(self, now: float) -> None:
        told = self.tell_gone()
        if not told and self.store.check([LAST_WORDS_KEY]):
            told = self.store.get(LAST_WORDS_KEY).decode()
        if not told:
            self._gone_at = None
        elif self._gone_at is None or self._gone_at[0] != self.count():
            self._gone_at = (self.count(), now)
        elif now - self._gone_at[1] >= self.gone_s:
            self.must_end = f"{told}; this rank still waited"

    def _run(self) -> None:
        try:
            while True:
                self.beat(time.monotonic())
                self._end_if_it_must()
                if self.ended.wait(self.every_s):
                    return
        except RuntimeError as error:  # the store is gone, with the process or machine that kept it
            if self._gone_at is not None:
                self.must_end = "a rank of this machine is gone, and so is the store"
                self._end_if_it_must()
            if not self.ended.is_set():
                logger.debug("the watch over the ranks ends: %s", error)

    def _end_if_it_must(self) -> None:
        if self.must_end and not self.is_leaving and not self.ended.is_set():
            logger.error("ends here: %s", self.must_end)
            if self.speaks:
                self.report(self.must_end)
            self.leave()  # the others name the cause alone
            os._exit(1)  # the main thread cannot be woken

    def _read(self, now: float) -> dict[int, dict[str, Any]]:
        """The posts of all ranks that have posted."""
        present = [r for r in range(self.world_size) if self.store.check([f"watch-{r}"])]
        posts = {r: json.loads(self.store.get(f"watch-{r}")) for r in present}
        for r, post in posts.items():
            if self._seen.get(r, (0, 0.0))[0] != post["post"]:
                self._seen[r] = (post["post"], now)
        return posts

    def _describe(self, posts: dict[int, dict[str, Any]], silent: set[int], furthest: int) -> str:
        parts = [f"rank {r} never reported" for r in range(self.world_size) if r not in posts]
        for r, post in posts.items():
            if r in silent:
                parts.append(f"rank {r} does not answer, last seen at {post['at']}")
            elif post["count"] < furthest:
                parts.append(f"rank {r} is at {post['at']}")
        return "; ".join(parts[:8]) + (f"; and {len(parts) - 8} more" if len(parts) > 8 else "")


def _is_alive(pid: int) -> bool:
    """Whether a process is there and not just waiting to be collected by its parent."""
    try:
        if sys.platform == "linux":
            return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in ("Z", "X")
        os.kill(pid, 0)
    except (FileNotFoundError, ProcessLookupError):
        return False
    return True


def _place_of(frame: FrameType | None) -> str:
    """The innermost lines of this repository on a thread's stack: `bin/train.py:230 train > data/audio.py:88 read`."""
    places: list[str] = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            places.append(f"{file.relative_to(ROOT).as_posix()}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(places[:2])) or "no line of this program"
