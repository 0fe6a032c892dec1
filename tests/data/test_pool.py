"""Workers as processes: how they end, whatever ends them or the trainer, and that nothing stays behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from data.pool import WorkerError, WorkerPool
from tests.data.processes import child_processes

ROOT = Path(__file__).resolve().parents[2]
TRAINER = """
import signal, sys, time
from data.pool import WorkerPool
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs are born deaf to it
pool = WorkerPool(2, "tests.data.test_pool:counting", {"add": 1}, {})
tickets = [pool.submit(index, {"value": 5}) for index in range(2)]
answers = [pool.result(index, ticket)[0] for index, ticket in enumerate(tickets)]
pool.submit(0, {"value": -1})  # one is busy for long, one waits
print(*pool.process_ids, flush=True)
END
"""


def counting(spec, files):
    """A job: numbers up to value + add; a negative value takes a minute."""

    def job(command, slot):
        if command["value"] < 0:
            time.sleep(60)
        if command["value"] > 1000:
            raise KeyError("too much")
        slot.allocate(command["value"])[:] = np.arange(command["value"]) + spec["add"]
        return {"count": command["value"]}

    return job


@pytest.fixture
def pool():
    made = WorkerPool(1, "tests.data.test_pool:counting", {"add": 1}, {})
    yield made
    made.close()
    assert not child_processes()


def test_a_job_is_done_in_shared_memory(pool):
    tickets = [pool.submit(0, {"value": value}) for value in (3, 500, 7)]
    assert not pool.has_room(0)
    answer, memory, is_scarce = pool.result(0, tickets[1])  # the first one is not asked for any more
    assert (answer, is_scarce) == ({"count": 500}, False)
    np.testing.assert_array_equal(np.frombuffer(memory, np.int16, 500), np.arange(500) + 1)
    assert pool.has_room(0)


def test_a_failure_that_is_no_users_error_comes_with_its_trace(pool):
    with pytest.raises(WorkerError, match=r"(?s)worker 0 \(process \d+\) failed: KeyError: 'too much'.*in job"):
        pool.result(0, pool.submit(0, {"value": 2000}))
    assert pool.result(0, pool.submit(0, {"value": 1}))[0] == {"count": 1}, "and the worker goes on"


def test_a_worker_that_cannot_start_is_told():
    pool = WorkerPool(1, "tests.data.test_pool:absent", {}, {})
    with pytest.raises(WorkerError, match="has no attribute 'absent'"):
        pool.result(0, pool.submit(0, {"value": 1}))
    pool.close()


def test_a_worker_killed_while_it_works_is_named_within_five_seconds(pool):
    ticket = pool.submit(0, {"value": -1})
    time.sleep(0.5)
    os.kill(pool.process_ids[0], signal.SIGKILL)
    started = time.monotonic()
    with pytest.raises(WorkerError, match=r"worker 0 \(process \d+\) was killed by SIGKILL \(out of memory\?\)"):
        pool.result(0, ticket)
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    ("end", "blow"),
    [
        ("time.sleep(60)", signal.SIGKILL),
        ("time.sleep(60)", signal.SIGINT),
        ("raise RuntimeError('a step failed')", None),
        ("import os; os._exit(3)", None),
    ],
    ids=["killed", "Ctrl-C", "exception", "hard exit"],
)
def test_however_the_trainer_ends_no_process_and_no_shared_memory_stays(end, blow):
    before = set(os.listdir("/dev/shm")) if os.path.isdir("/dev/shm") else set()
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER.replace("END", end)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    workers = [int(pid) for pid in trainer.stdout.readline().split()]
    assert len(workers) == 2
    if blow == signal.SIGINT:
        os.killpg(trainer.pid, blow)  # as a terminal does: all processes of the group get it
    elif blow is not None:
        os.kill(trainer.pid, blow)
    trainer.wait(timeout=20)
    trainer.stdout.close()
    deadline = time.monotonic() + 5
    while any(map(runs, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(runs, workers))
    if before:
        assert not {name for name in set(os.listdir("/dev/shm")) - before if "earmark" in name}


def runs(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def test_workers_leave_ctrl_c_and_sigterm_to_the_trainer(pool):
    assert pool.result(0, pool.submit(0, {"value": 1}))[0] == {"count": 1}
    for number in (signal.SIGINT, signal.SIGTERM):
        os.kill(pool.process_ids[0], number)
    assert pool.result(0, pool.submit(0, {"value": 2}))[0] == {"count": 2}
