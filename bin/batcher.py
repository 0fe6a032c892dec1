"""Clips of many callers, encoded and searched together by one thread that owns the model.

While a batch is computed, further clips wait; then all that wait are the next batch. So a lone caller never waits for
company, and the busier it is the larger are the batches.

Shapes: S samples.
"""

import logging
import queue
import threading
from concurrent.futures import Future
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from retrieval.matches import Hits
from retrieval.stream import Finder

logger = logging.getLogger(__name__)


class Busy(Exception):
    """The queue is full, or the batcher is closed: the caller should come again later."""


@dataclass(frozen=True)
class _Job:
    pcm_S: NDArray[np.int16]
    k: int
    future: "Future[Hits]" = field(default_factory=Future)


class Batcher:
    """Safe between threads. A cancelled future's clip is left out of the batch."""

    def __init__(self, finder: Finder, max_batch: int = 64, max_waiting: int = 1024) -> None:
        self.finder, self.max_batch = finder, max_batch
        self.num_batches = self.num_clips = 0
        self._jobs: queue.Queue[_Job | None] = queue.Queue(max_waiting)
        self._is_closed = threading.Event()
        self._thread = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._thread.start()

    @property
    def is_closed(self) -> bool:
        return self._is_closed.is_set() and not self._thread.is_alive()

    @property
    def num_waiting(self) -> int:
        return self._jobs.qsize()

    def submit(self, pcm_S: NDArray[np.int16], k: int) -> "Future[Hits]":
        """int16 [S], 16 kHz mono, of a length that the model takes. Raises Busy."""
        job = _Job(pcm_S, k)
        if self._is_closed.is_set():
            raise Busy("the service is closing")
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise Busy(f"{self._jobs.maxsize} clips are waiting") from None
        return job.future

    def close(self) -> None:
        """Finish the batch at hand, cancel what waits, end the thread."""
        self._is_closed.set()
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job.future.cancel()
        self._jobs.put(None)
        self._thread.join()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            jobs = [job]
            while len(jobs) < self.max_batch:
                try:
                    waiting = self._jobs.get_nowait()
                except queue.Empty:
                    break
                if waiting is None:
                    self._jobs.put(None)  # close was called meanwhile: seen again after this batch
                    break
                jobs.append(waiting)
            self._run([one for one in jobs if one.future.set_running_or_notify_cancel()])

    def _run(self, jobs: list[_Job]) -> None:
        if not jobs:
            return
        try:
            hits = self.finder.find([job.pcm_S for job in jobs], max(job.k for job in jobs))
        except Exception as error:  # whatever it is, each caller is told, and the thread lives on
            logger.exception("a batch of %d clips failed", len(jobs))
            for job in jobs:
                job.future.set_exception(error)
            return
        self.num_batches += 1
        self.num_clips += len(jobs)
        for job, one in zip(jobs, hits, strict=True):
            job.future.set_result(one.first(job.k))
