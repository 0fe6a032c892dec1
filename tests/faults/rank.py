"""One process of a run: bin/train.py, if asked with a fault planted in it first. Run by torchrun or forked.

    rank.py FAULT[:STEP] FLAGS...        FAULT is a function of this file, or none

A fault is planted by replacing something that bin/train.py calls; the program itself is the real one.
"""

import logging
import os
import resource
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
HERE = Path(__file__).resolve().parent
sys.path[:] = [p for p in sys.path if Path(p).resolve() != HERE]

import bin.evaluation  # noqa: E402
import bin.rundir  # noqa: E402
import bin.step  # noqa: E402
import bin.train  # noqa: E402

RANK = os.environ.get("RANK", "0")


def at_step(step: int, action: Callable[[], None]) -> None:
    """Before the loss of the given step (from 1)."""
    real, calls = bin.step.loss_share, 0

    def counting(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == step:
            action()
        return real(*args)

    bin.step.loss_share = counting


def before(module: Any, name: str, number: int, action: Callable[[], None]) -> None:
    """Before the given call (from 1) of a function."""
    real, calls = getattr(module, name), 0

    def counting(*args: Any, **more: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number:
            action()
        return real(*args, **more)

    setattr(module, name, counting)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def term_mid_step(step: int) -> None:
    at_step(step, terminate)


def term_twice(step: int) -> None:
    at_step(step, lambda: (terminate(), terminate()))


def term_in_evaluation(number: int) -> None:
    """Evaluation encodes the terms first; number 1 is the test before training, 2 the first glossary bank."""
    before(bin.evaluation, "encode_in_fixed_batches", number, terminate)


def term_in_save(number: int) -> None:
    before(bin.rundir, "write_tensors", number, terminate)


def term_at_start(number: int) -> None:
    before(bin.train, "build_model", number, terminate)


def term_one_rank(step: int) -> None:
    if RANK == "1":
        term_mid_step(step)


def nan_on_one_rank(step: int) -> None:
    """Its loss of one step, and so its gradients."""
    if RANK != "1":
        return
    real, calls = bin.step.loss_share, 0

    def poisoned(*args: Any) -> Any:
        nonlocal calls
        calls += 1
        share, parts, relations = real(*args)
        return (share * float("nan") if calls == step else share), parts, relations

    bin.step.loss_share = poisoned


def nan_and_term(step: int) -> None:
    nan_on_one_rank(step)
    term_mid_step(step)


def stop_one_rank(step: int) -> None:
    """The process is there, but does nothing any more."""
    if RANK == "1":
        at_step(step, lambda: os.kill(os.getpid(), signal.SIGSTOP))


def stall_one_rank(step: int) -> None:
    """A read that never comes back: the main thread waits, the others live."""
    if RANK == "1":
        at_step(step, lambda: time.sleep(3600))


def die_while_the_others_wait(step: int) -> None:
    """As on GPUs: the others' main threads wait for a device that waits for the dead rank's, and hear of nothing."""

    def wait() -> None:
        # Held back in this thread a signal comes to another one, and Python's handler waits for this one to return.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
        time.sleep(3600)

    at_step(step, wait if RANK != "1" else lambda: os.kill(os.getpid(), signal.SIGKILL))


def clock_goes_back(step: int) -> None:
    """A day, from some step on, for everything that asks for the time of day."""
    real = time.time, time.localtime, time.gmtime

    def set_back() -> None:
        time.time = lambda: real[0]() - 86_400
        time.localtime = lambda seconds=None: real[1](time.time() if seconds is None else seconds)
        time.gmtime = lambda seconds=None: real[2](time.time() if seconds is None else seconds)

    if step:
        at_step(step, set_back)
    else:
        set_back()


def log_disk_gone(step: int) -> None:
    """Writes of log, metrics and TensorBoard fail from some step on; checkpoints and status do not."""
    if RANK != "0":
        return

    def unplug() -> None:
        full = os.open("/dev/full", os.O_WRONLY)
        for link in Path("/proc/self/fd").iterdir():
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.endswith("metrics.jsonl") or "/train_" in target or "/tb/" in target:
                os.dup2(full, int(link.name))

    at_step(step, unplug)


def small_disk(kilobytes: int) -> None:
    """No file may grow beyond this: the kernel stops a save half-way through a file."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (kilobytes * 1024, resource.RLIM_INFINITY))


def slow_steps(milliseconds: int) -> None:
    """So that there is time to hit a step from outside."""
    real = bin.step.loss_share

    def slow(*args: Any) -> Any:
        time.sleep(milliseconds / 1000)
        return real(*args)

    bin.step.loss_share = slow


FAULTS = (
    term_mid_step, term_one_rank, term_twice, term_in_evaluation, term_in_save, term_at_start, nan_on_one_rank,
    nan_and_term, stop_one_rank, stall_one_rank, die_while_the_others_wait, clock_goes_back, log_disk_gone, small_disk,
    slow_steps,
)  # fmt: skip


def run(fault: str, flags: list[str]) -> int:
    name, _, number = fault.partition(":")
    if name != "none":
        {f.__name__: f for f in FAULTS}[name](int(number))
    sys.argv = ["bin/train.py", *flags]
    try:
        return bin.train.main()
    finally:
        logging.shutdown()


if __name__ == "__main__":
    sys.exit(run(sys.argv[1], sys.argv[2:]))
