"""Checks that run in every rank, or fork their own processes: checkpoints and the run lock. See ranks.py."""

import os
import random
import resource
import signal
import time

import pytest
import torch
from ranks import forks_itself

import distributed.checkpoints as checkpoints
from distributed.atomic import damage, write_tensors
from distributed.checkpoints import CheckpointError, CheckpointStore
from distributed.collectives import barrier
from distributed.rundir import RunLock


def write_ones(folder):
    write_tensors(folder / "heads.safetensors", {"w": torch.ones(1000)})


def write_several(folder):
    for name in "abcd":
        write_tensors(folder / f"{name}.safetensors", {"w": torch.ones(20_000)})


def all_ranks_save_and_resume(world, folder):
    store = CheckpointStore(folder / "together", keep=2)
    store.prepare()
    assert store.latest_good() is None
    for step in (5, 10, 15):
        path = store.save(step, write_ones)
    expected = torch.rand(4)
    torch.manual_seed(99)
    assert store.latest_good() == path
    assert store.restore_rng(path)
    assert torch.equal(torch.rand(4), expected)  # each rank goes on with its own random numbers
    assert store.steps() == [10, 15]
    rng_files = {f"rng-rank{r}.safetensors" for r in range(world.world_size)}
    assert {file.name for file in path.iterdir()} == rng_files | {"heads.safetensors", "MANIFEST.json"}
    assert damage(path) is None

    barrier()
    if world.rank == 0:  # damage to a file that another rank wrote is found as well
        (path / "rng-rank1.safetensors").unlink()
    chosen = store.latest_good()
    assert chosen is not None
    assert chosen.name == "step-00000010"


def failure_on_one_rank_fails_the_save_on_all(world, folder):
    store = CheckpointStore(folder / "failing")
    store.prepare()
    good = store.save(1, write_ones)
    genuine = checkpoints.write_tensors

    def full_disk(path, tensors):
        raise OSError(28, "No space left on device")

    if world.rank == world.world_size - 1:
        checkpoints.write_tensors = full_disk
    with pytest.raises(CheckpointError, match=rf"rank {world.world_size - 1}: the disk is full"):
        store.save(2, write_ones)
    checkpoints.write_tensors = genuine

    def broken(path):
        raise RuntimeError("boom")

    with pytest.raises(CheckpointError, match="rank 0: RuntimeError: boom"):
        store.save(3, broken)
    assert [item.name for item in store.root.iterdir()] == ["step-00000001"]
    assert store.latest_good() == good


def second_job_is_refused_on_all_ranks(world, folder):
    lock = RunLock(folder / "locked")
    with pytest.raises(ValueError if world.rank == 0 else RuntimeError, match="in use by process"):
        RunLock(folder / "locked")
    lock.release()


@forks_itself
def killed_at_random_points_of_a_save(port, folder):
    """kill -9 a process that saves in a loop: always a loadable checkpoint, never older than what was announced."""
    store = CheckpointStore(folder / "killed", keep=2)
    store.prepare()
    generator = random.Random(0)
    num_strays = 0
    for attempt in range(12):
        first = (store.steps() or [0])[-1] + 1
        pid = os.fork()
        if pid == 0:
            for step in range(first, first + 1000):
                store.save(step, write_several)
                (folder / "announced").write_text(str(step))
            os._exit(0)
        while not store.steps():
            time.sleep(0.001)
        time.sleep(generator.uniform(0.05, 0.2))
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        num_strays += any(".tmp-" in item.name for item in store.root.iterdir())
        good = store.latest_good()
        assert good is not None, attempt
        assert int(good.name[5:]) >= int((folder / "announced").read_text() or 0)
        store.prepare()
        for item in store.root.iterdir():  # not merely passed over: a folder that bears its name is whole
            assert item.name.startswith("step-"), item
            assert damage(item) is None, item
    assert num_strays, "no kill fell into a save: the test shows nothing"


@forks_itself
def a_real_write_limit_leaves_the_previous_checkpoint(port, folder):
    """The kernel refuses the bytes half-way through a file, as a full disk does."""
    store = CheckpointStore(folder / "limited")
    store.prepare()
    good = store.save(1, write_ones)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, resource.RLIM_INFINITY))
    with pytest.raises(CheckpointError, match="checkpoint of step 2 was not saved"):
        store.save(2, lambda path: write_tensors(path / "big.safetensors", {"w": torch.ones(200_000)}))
    assert [item.name for item in store.root.iterdir()] == ["step-00000001"]
    assert store.latest_good() == good


@forks_itself
def lock_dies_with_its_process(port, folder):
    pid = os.fork()
    if pid == 0:
        RunLock(folder)
        (folder / "held").touch()
        time.sleep(60)
    while not (folder / "held").exists():
        time.sleep(0.005)
    with pytest.raises(ValueError, match=f"in use by process {pid} on"):
        RunLock(folder)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    RunLock(folder).release()
