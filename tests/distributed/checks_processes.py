"""Checks that fork their own ranks: start, stop, time limits, restarts. See ranks.py."""

import datetime
import os
import time

import pytest
import torch.distributed as dist
from ranks import fork, fork_rank, forks_itself, wait_all

from distributed import collectives, processes


@forks_itself
def silent_rank_ends_the_run_within_the_limit(port, folder):
    def body():
        world = processes.start("cpu", 2.0, 30.0)
        collectives.barrier()
        if world.rank == 1:
            time.sleep(60)
        begin = time.monotonic()
        with pytest.raises(RuntimeError):
            collectives.agree(stop=0)
        processes.stop()
        assert time.monotonic() - begin < 10

    begin = time.monotonic()
    pids = [fork_rank(rank, 2, port, body) for rank in range(2)]
    assert wait_all(pids[:1]) == {pids[0]: 0}
    os.kill(pids[1], 9)
    os.waitpid(pids[1], 0)
    assert time.monotonic() - begin < 20


@forks_itself
def missing_rank_is_named(port, folder):
    def body():
        with pytest.raises(TimeoutError, match=r"never heard of ranks \[2\]"):
            processes.start("cpu", 2.0, 2.0)

    pids = [fork_rank(0, 3, port, body)]

    def other():
        with pytest.raises(Exception):  # noqa: B017, PT011 - how the store's end shows is torch's matter
            processes.start("cpu", 2.0, 4.0)

    pids.append(fork_rank(1, 3, port, other))
    assert not any(wait_all(pids).values())


@forks_itself
def restarts_share_a_store_and_nodes_count_them_differently(port, folder):
    """torchrun's agent hosts one store for all attempts: each must start clean of the keys of killed ones."""

    def agent():  # in its own process: the store's thread must not be forked into the ranks
        store = dist.TCPStore("127.0.0.1", port, None, True, datetime.timedelta(seconds=30), wait_for_workers=False)
        store.get("the end")

    agent_pid = fork(agent)

    def dies_early():
        processes.start("cpu", 5.0, 10.0)
        os._exit(9)  # no clean end: all keys stay behind, and a rank that still connects may fail of its own

    def lives():
        world = processes.start("cpu", 5.0, 10.0)
        assert collectives.sum_over_ranks(n=world.rank) == {"n": 3}
        processes.stop()

    for counts in ([0, 0, 0], [0, 1, 1], [1, 1, 2]):  # a node counts only the restarts that it caused itself
        for body in (dies_early, lives):
            pids = [
                fork_rank(r, 3, port, body, TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=str(n))
                for r, n in enumerate(counts)
            ]
            codes = wait_all(pids)
            assert set(codes.values()) <= ({1, 9} if body is dies_early else {0}), (counts, codes)
    os.kill(agent_pid, 9)
    os.waitpid(agent_pid, 0)
