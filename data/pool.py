"""Worker processes that fill shared memory: started, asked, watched and ended.

    trainer                                   worker 0 (of 2)
      submit(0, {...}) ---- command pipe ---->  job(command, slot): writes into the slot
      result(0, ticket) <--- answer pipe -----  {"result": where what lies, "capacity": ..., "logs": [...]}

Each worker owns a few slots and answers in the order in which it was asked. A slot that was handed to the caller comes
back when the last array over it is gone. A caller that keeps more than all slots but one gets copies from then on.
"""

from __future__ import annotations

import json
import logging
import os
import select
import signal
import subprocess
import sys
import time
import weakref
from collections import deque
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data.slots import Pin, Slot, anonymous_file
from data.worker import Inheritance, receive, send

logger = logging.getLogger(__name__)

ROOT = Path(__file__).resolve().parent.parent
POLL_S = 0.5  # how often a waiting trainer looks whether all workers live
SLOW_S = 30.0  # an answer that takes longer is worth a line in the log
STOP_S = 2.0  # until a worker that was told to end is killed
# A worker computes on one thread: the others belong to the trainer and to the other workers.
ONE_THREAD = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS")

# glibc gives freed memory back at once and takes it anew for the next batch, page by page, which may take a fifth of a
# worker's time; up to these sizes it is kept. Other C libraries do not look.
KEEP_FREED = {"MALLOC_TRIM_THRESHOLD_": str(64 << 20), "MALLOC_MMAP_THRESHOLD_": str(32 << 20)}


class WorkerError(RuntimeError):
    """A worker process that died, or failed in a way that is no user's error."""


class _Worker:
    def __init__(self, index: int, process: subprocess.Popen[bytes], commands: int, answers: int, slots: list[Slot]):
        self.index, self.process, self.commands, self.answers, self.slots = index, process, commands, answers, slots
        self.poll = select.poll()  # select() knows no descriptors above 1023
        self.poll.register(answers, select.POLLIN)
        self.free = deque(range(len(slots)))
        self.asked: deque[tuple[int, int]] = deque()  # (ticket, slot) of commands without an answer


class WorkerPool:
    """`num_workers` processes that run `job` ("module:function", see data/worker.py).

    files   memory files (descriptors) that each worker inherits; they stay the caller's to close
    spec    what else the job needs, of JSON
    pin     called with the bytes of each slot (uint8) when it is mapped; gives what undoes that
    """

    def __init__(
        self,
        num_workers: int,
        job: str,
        spec: Mapping[str, Any],
        files: Mapping[str, int],
        slots_each: int = 3,
        pin: Pin | None = None,
    ) -> None:
        self._tickets = 0
        self._workers: list[_Worker] = []
        self._stop = weakref.finalize(self, _stop, self._workers)  # also at exit of the program
        spec_file = anonymous_file("spec")  # may be long, and a command line may not
        try:
            with open(spec_file, "wb", closefd=False) as file:
                file.write(json.dumps(spec).encode())
            for index in range(num_workers):
                self._workers.append(_start(index, job, {**files, "spec": spec_file}, slots_each, pin))
        finally:
            os.close(spec_file)

    @property
    def process_ids(self) -> list[int]:
        return [worker.process.pid for worker in self._workers]

    @property
    def slots(self) -> list[Slot]:
        return [slot for worker in self._workers for slot in worker.slots]

    def has_room(self, index: int) -> bool:
        """Whether the worker has a slot for another command."""
        return bool(self._workers[index].free)

    def is_answered(self, index: int) -> bool:
        """Whether the worker's next answer can be had without waiting for it."""
        return bool(self._workers[index].poll.poll(0))

    def submit(self, index: int, command: Mapping[str, Any]) -> int:
        """Ask a worker, which must have room. Returns a ticket for `result`."""
        worker = self._workers[index]
        self._tickets += 1
        slot = worker.free.popleft()
        worker.asked.append((self._tickets, slot))
        try:
            send(worker.commands, {**command, "ticket": self._tickets, "slot": slot})
        except BrokenPipeError:
            self._raise_if_dead()
            raise WorkerError(f"{_name(worker)} closed its pipe") from None
        return self._tickets

    def result(self, index: int, ticket: int) -> tuple[dict[str, Any], memoryview, bool]:
        """(the job's answer, the slot's bytes, whether to copy them) of a ticket; older answers are thrown away.

        Raises ValueError with the worker's words for a ValueError there, WorkerError for other failures and for a
        worker that died. The slot is free again when all that was made of the bytes is gone.
        """
        worker = self._workers[index]
        answer, place = self._next_answer(worker)
        while answer["ticket"] != ticket:
            worker.free.append(place)
            answer, place = self._next_answer(worker)
        if "error" in answer:
            worker.free.append(place)
            kind, message, trace = answer["error"]
            if kind == "ValueError":
                raise ValueError(message)
            raise WorkerError(f"{_name(worker)} failed: {kind}: {message}\n{trace}")
        held = len(worker.slots) - len(worker.free) - len(worker.asked)
        view = worker.slots[place].view(answer["capacity"], _Release(worker.free, place))
        return answer["result"], view, held >= len(worker.slots)

    def make_room(self, index: int) -> None:
        """Wait until the worker has a slot for another command; answers that nobody asks for any more are dropped."""
        worker = self._workers[index]
        while not worker.free:
            worker.free.append(self._next_answer(worker)[1])

    def _next_answer(self, worker: _Worker) -> tuple[dict[str, Any], int]:
        answer = self._await(worker)
        ticket, place = worker.asked.popleft()
        assert answer["ticket"] == ticket, (answer["ticket"], ticket)
        for name, level, message in answer["logs"]:
            logging.getLogger(name).log(level, "%s", message)
        return answer, place

    def _await(self, worker: _Worker) -> dict[str, Any]:
        started, told = time.monotonic(), False
        while True:
            self._raise_if_dead()
            if worker.poll.poll(POLL_S * 1000):
                answer = receive(worker.answers)
                if answer is not None:
                    return answer
                worker.process.wait(STOP_S)  # the pipe ended: the process is ending
            waited = time.monotonic() - started
            if waited > SLOW_S and not told:
                told = True
                logger.warning("%s has not answered for %.0f s; is the file system slow?", _name(worker), waited)

    def _raise_if_dead(self) -> None:
        for worker in self._workers:
            code = worker.process.poll()
            if code is not None:
                self.close()
                how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
                hint = " (out of memory?)" if code == -signal.SIGKILL else ""
                raise WorkerError(f"{_name(worker)} {how}{hint}")

    def close(self) -> None:
        """End all workers. Arrays that the caller still holds stay good."""
        self._stop()


class _Release:
    """Gives a slot back. An object, so that it holds the deque and not the worker."""

    def __init__(self, free: deque[int], place: int) -> None:
        self.free, self.place = free, place

    def __call__(self) -> None:
        self.free.append(self.place)


def _name(worker: _Worker) -> str:
    return f"worker {worker.index} (process {worker.process.pid})"


def _start(index: int, job: str, files: dict[str, int], slots_each: int, pin: Pin | None) -> _Worker:
    command_read, command_write = os.pipe()
    answer_read, answer_write = os.pipe()
    slots = [anonymous_file(f"slot-{index}-{place}") for place in range(slots_each)]
    mine = Inheritance(index, os.getpid(), command_read, answer_write, files, slots, job)
    # The root goes first: the current folder, or site-packages, may hold another package named data or model.
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); from data.worker import main; main(sys.argv[1])"
    # The new process inherits the mask, so that no Ctrl-C can hit it before it is ready to ignore one.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
    try:
        process = subprocess.Popen(
            [sys.executable, "-c", code, json.dumps(asdict(mine))],
            stdin=subprocess.DEVNULL,
            pass_fds=(command_read, answer_write, *slots, *files.values()),
            env={**KEEP_FREED, **os.environ, **dict.fromkeys(ONE_THREAD, "1"), "TOKENIZERS_PARALLELISM": "false"},
        )
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        os.close(command_read)
        os.close(answer_write)
    return _Worker(index, process, command_write, answer_read, [Slot(descriptor, pin) for descriptor in slots])


def _stop(workers: Iterable[_Worker]) -> None:
    for worker in workers:
        os.close(worker.commands)
    deadline = time.monotonic() + STOP_S
    for worker in workers:
        try:
            worker.process.wait(max(0.01, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            worker.process.kill()
            worker.process.wait()
        os.close(worker.answers)
        for slot in worker.slots:
            slot.close()
