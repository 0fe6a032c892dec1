"""Who keeps the others waiting: names a stalled rank, and the line of code it is at, before the time limit strikes.

    rank 0   in collective 118                       posts  118  bin/train.py:230 train
    rank 1   in collective 118                       posts  118  bin/train.py:230 train
    rank 2   still reading a file after collective 117      117  data/audio.py:88 decode     <- named
    rank 3   stopped, or its machine is gone         posts nothing any more                  <- named

A rank that fails leaves its last words at the store, so that rank 0, which only sees a connection closed, can tell why.

All ranks make the same collectives in the same order, so that the rank with the fewest behind it is the one that all
others wait for. A thread in each process posts that count and the place of the main thread to the store that the ranks
met at; nothing is read from there until a rank has been waiting for long.
"""

import contextlib
import itertools
import json
import logging
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

    Returns `rank 1: its words` of the first rank that failed, else whom this one has been waiting for, or nothing.
    """
    if _current is None:
        return ""
    watch, found = _current, ""
    # What gloo raises has no type of its own.
    is_consequence = isinstance(error, dist.DistError) or "gloo" in str(error)

    def ask() -> None:
        nonlocal found
        with contextlib.suppress(RuntimeError):  # no store any more: its process or machine was the one that ended
            if not is_consequence:
                watch.store.compare_set(LAST_WORDS_KEY, "", f"rank {watch.rank}: {words}")
            elif watch.store.check([LAST_WORDS_KEY]):
                found = watch.store.get(LAST_WORDS_KEY).decode()

    asking = threading.Thread(target=ask, name="last-words", daemon=True)
    asking.start()
    asking.join(LAST_WORDS_S)
    return found or (f"waiting for: {watch.verdict}" if watch.verdict else "")


def start(store: dist.Store, rank: int, world_size: int, time_limit_s: float) -> None:
    """Watch from now on. store: a client of its own, shared with no other thread."""
    global _current
    stop()
    _current = RankWatch(store, rank, world_size, time_limit_s)
    _current.thread.start()


def stop() -> None:
    global _current
    if _current is not None:
        _current.ended.set()
        _current = None


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
    ) -> None:
        main_thread = threading.main_thread().ident
        self.store, self.rank, self.world_size = store, rank, world_size
        self.wait_s = min(LONGEST_WAIT_S, time_limit_s / 2)
        self.every_s = self.wait_s / 8
        self.count = count
        self.place = place or (lambda: _place_of(sys._current_frames().get(main_thread or 0)))
        self.verdict = ""
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._run, name="rank-watch", daemon=True)
        self._num_posts = 0
        self._seen: dict[int, tuple[int, float]] = {}  # rank -> (its last post, when that was new to us)
        self._last, self._since, self._told = count(), time.monotonic(), False

    def beat(self, now: float) -> None:
        """Post; and when the last collective is long ago, see who is behind, and say so once."""
        self._num_posts += 1
        post = {"post": self._num_posts, "count": self.count(), "at": self.place()}
        self.store.set(f"watch-{self.rank}", json.dumps(post))
        if self.count() != self._last:
            self._last, self._since, self._told, self.verdict = self.count(), now, False, ""
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

    def _run(self) -> None:
        try:
            while True:
                self.beat(time.monotonic())
                if self.ended.wait(self.every_s):
                    return
        except RuntimeError as error:  # the store is gone, with the process or machine that kept it
            if not self.ended.is_set():
                logger.debug("the watch over the ranks ends: %s", error)

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


def _place_of(frame: FrameType | None) -> str:
    """The innermost lines of this repository on a thread's stack: `bin/train.py:230 train > data/audio.py:88 read`."""
    places: list[str] = []
    while frame is not None:
        file = Path(frame.f_code.co_filename)
        if file.is_relative_to(ROOT) and "site-packages" not in file.parts:
            places.append(f"{file.relative_to(ROOT).as_posix()}:{frame.f_lineno} {frame.f_code.co_name}")
        frame = frame.f_back
    return " > ".join(reversed(places[:2])) or "no line of this program"
