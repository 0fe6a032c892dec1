"""Starting without torchrun, and environments that cannot be right. What needs other ranks: checks_processes.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from distributed import processes

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def no_torchrun(monkeypatch):
    for name in processes.TORCHRUN_VARIABLES:
        monkeypatch.delenv(name, raising=False)


def test_no_environment_is_one_process():
    world = processes.start("cpu")
    assert (world.rank, world.world_size, world.backend, world.is_main) == (0, 1, "none", True)
    assert world.device == torch.device("cpu")
    processes.stop()


def test_torchrun_with_one_process_needs_no_store(monkeypatch):
    for name, value in zip(processes.TORCHRUN_VARIABLES, ("0", "1", "0", "nowhere.invalid", "1"), strict=True):
        monkeypatch.setenv(name, value)
    assert processes.start("cpu").world_size == 1


def test_half_an_environment_is_refused(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(ValueError, match="not WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT; start with torchrun"):
        processes.start("cpu")
    for name, value in zip(processes.TORCHRUN_VARIABLES, ("4", "4", "0", "localhost", "1"), strict=True):
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match="RANK is 4; allowed: 0 to WORLD_SIZE - 1 = 3"):
        processes.start("cpu")
    monkeypatch.setenv("WORLD_SIZE", "many")
    with pytest.raises(ValueError, match="WORLD_SIZE is 'many'"):
        processes.start("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_asked_for_cuda_without_a_gpu_is_refused():
    with pytest.raises(ValueError, match="shows 0 GPUs"):
        processes.start("cuda")


def test_ranks_share_a_gpu_only_where_that_is_wished(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.delenv(processes.SHARED, raising=False)
    assert processes.choose_device("auto", 1) == torch.device("cuda", 1)
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 2 .* at most 2 processes.* EARMARK_RANKS_PER_GPU lets"):
        processes.choose_device("auto", 2)
    monkeypatch.setenv(processes.SHARED, "4")
    assert [processes.choose_device("cuda", rank).index for rank in range(8)] == [0, 0, 0, 0, 1, 1, 1, 1]
    with pytest.raises(ValueError, match=r"LOCAL_RANK is 8 .* at most 8 processes"):
        processes.choose_device("auto", 8)
    for wrong, told in (("0", "is 0 in"), ("two", "is 'two' in")):
        monkeypatch.setenv(processes.SHARED, wrong)
        with pytest.raises(ValueError, match=f"EARMARK_RANKS_PER_GPU {told}"):
            processes.choose_device("cuda", 0)


def test_device_memory_grows_in_place_unless_the_environment_says_otherwise(monkeypatch):
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:64")
    processes.use_growing_segments()
    assert "PYTORCH_ALLOC_CONF" not in os.environ
    monkeypatch.delenv("PYTORCH_CUDA_ALLOC_CONF")
    processes.use_growing_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "expandable_segments:True"
    monkeypatch.setenv("PYTORCH_ALLOC_CONF", "garbage_collection_threshold:0.8")
    processes.use_growing_segments()
    assert os.environ["PYTORCH_ALLOC_CONF"] == "garbage_collection_threshold:0.8"


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: its allocator")
def test_a_started_process_has_memory_that_grows():
    program = (
        "import torch; from distributed import processes; world = processes.start('cuda'); "
        "x = torch.zeros(1 << 24, device=world.device); "
        "print(all(s['is_expandable'] for s in torch.cuda.memory_snapshot()))"
    )
    unset = {k: v for k, v in os.environ.items() if not k.endswith("ALLOC_CONF")}
    done = subprocess.run([sys.executable, "-c", program], env=unset, capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "True", done.stderr
