"""A worker process: takes commands from a pipe, does a job into shared memory, answers through another pipe.

Started by data/pool.py as a fresh interpreter (fork and exec), since a forked copy of a process with torch's threads
may hang, and multiprocessing's "spawn" would import the training program again and pickle what it sends. Everything
crosses as JSON, or as columns in memory files whose descriptors the worker inherits.

A worker ends when its command pipe does, which is when the trainer closes it or dies, in whatever way.
"""

from __future__ import annotations

import importlib
import json
import logging
import os
import queue
import select
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.slots import Slot

Json = dict[str, Any]
Job = Callable[[Json, Slot], Json]  # a command and the slot to fill -> the answer

LENGTH_BYTES = 4  # of a message, before it
PARENT_CHECK_S = 1.0


@dataclass
class Inheritance:
    """What a worker is started with, as JSON on its command line; numbers are file descriptors."""

    index: int
    parent: int  # process id
    commands: int
    answers: int
    files: dict[str, int]  # memory files by name; `spec` is JSON, the others are columns
    slots: list[int]
    job: str  # "module:function" of (spec, files) -> Job


def restore(entry: str) -> Any:
    """The function that "module:name" stands for; also for tokenizers, which are rebuilt by name in each worker."""
    module, _, name = entry.partition(":")
    found = importlib.import_module(module)
    for part in name.split("."):
        found = getattr(found, part)
    return found


def send(descriptor: int, message: Json) -> None:
    content = json.dumps(message).encode()
    view = memoryview(len(content).to_bytes(LENGTH_BYTES, "little") + content)
    while len(view):
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Json | None:
    """The next message; None at the end of the pipe."""
    head = _read_exactly(descriptor, LENGTH_BYTES)
    content = None if head is None else _read_exactly(descriptor, int.from_bytes(head, "little"))
    return None if content is None else dict(json.loads(content))


def _read_exactly(descriptor: int, num_bytes: int) -> bytes | None:
    parts = []
    while num_bytes:
        part = os.read(descriptor, min(num_bytes, 1 << 20))
        if not part:
            return None
        parts.append(part)
        num_bytes -= len(part)
    return b"".join(parts)


class _Collected(logging.Handler):
    """Keeps what is logged, to be sent with the next answer: the trainer's log is the only one."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[tuple[str, int, str]] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append((record.name, record.levelno, record.getMessage()))


def main(argument: str) -> None:
    # Ctrl-C and a scheduler's SIGTERM reach all processes: it is for the trainer to decide what they mean. (They are
    # blocked since before this process began, see pool.py.)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, (signal.SIGINT, signal.SIGTERM))
    mine = Inheritance(**json.loads(argument))
    todo: queue.SimpleQueue[Json] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(mine, todo), daemon=True).start()
    collected = _Collected()
    logging.basicConfig(level=logging.INFO, handlers=[collected])
    slots = [Slot(descriptor) for descriptor in mine.slots]
    job: Job | None = None
    while True:
        command = todo.get()
        slot = slots[command["slot"]]
        slot.begin()
        answer: Json = {"ticket": command["ticket"]}
        try:
            if job is None:
                job = restore(mine.job)(_spec(mine.files["spec"]), mine.files)
            answer["result"] = job(command, slot)
        except Exception as error:
            answer["error"] = [type(error).__name__, str(error), traceback.format_exc()]
        answer["capacity"], answer["logs"] = slot.capacity, collected.lines
        collected.lines = []
        try:
            send(mine.answers, answer)
        except BrokenPipeError:
            os._exit(0)


def _spec(descriptor: int) -> Json:
    return dict(json.loads(os.pread(descriptor, os.fstat(descriptor).st_size, 0)))


def _listen(mine: Inheritance, todo: queue.SimpleQueue[Json]) -> None:
    """Take commands until the pipe ends, then end the process at once, whatever it is doing."""
    try:
        poll = select.poll()
        poll.register(mine.commands, select.POLLIN)
        while True:
            ready = poll.poll(PARENT_CHECK_S * 1000)
            # A copy of the trainer (a fork of some library) may keep the pipe open after the trainer is gone.
            if os.getppid() != mine.parent:
                os._exit(0)
            if ready:
                command = receive(mine.commands)
                if command is None:
                    os._exit(0)
                todo.put(command)
    finally:
        os._exit(1)


if __name__ == "__main__":
    main(sys.argv[1])
