"""Start and stop the processes of a run: torchrun's environment in, a `World` out.

Without torchrun's variables the run is a single process with no process group; every collective is then the identity.
With them there is one group with two backends: gloo moves CPU tensors (ids, decisions, JSON), so a decision never waits
for the GPU's queue, and NCCL moves CUDA tensors (embeddings, gradients).
"""

import ctypes
import logging
import os
import secrets
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from distributed import watch

logger = logging.getLogger(__name__)

TORCHRUN_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
SHARED = "EARMARK_RANKS_PER_GPU"  # how many processes a GPU is shared by, to rehearse NCCL where there are too few
STOP_LIMIT_S = 10.0  # within torchrun's 30 s between SIGTERM and SIGKILL
PR_SET_PDEATHSIG = 1  # of Linux' prctl


@dataclass(frozen=True)
class World:
    """This process's place among all processes of the run."""

    rank: int
    world_size: int
    local_rank: int
    device: torch.device
    backend: str
    attempt: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def use_growing_segments() -> None:
    """Let the device's memory be held in segments that grow (torch's `expandable_segments`), unless the environment
    says otherwise. Without, pieces of the wrong size lie idle: under 40 GiB, a fifth fewer clips fit in a step.

    To be called before the first tensor on a device.
    """
    if not any(name in os.environ for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")):
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def start(device: str = "auto", collective_timeout_s: float = 600.0, start_timeout_s: float = 600.0) -> World:
    """Read the environment, choose the device and join the other processes.

    device: "auto" (CUDA when there is a GPU), "cpu" or "cuda". The time limits are in seconds; the first holds for
    every later collective, the second for this call. Raises ValueError for an environment that cannot be right and
    TimeoutError, naming the missing ranks, when the others do not come in time.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; allowed: auto, cpu, cuda")
    if dist.is_initialized():
        raise RuntimeError("the process group is already there: processes.start() runs once in a process")
    use_growing_segments()
    present = [name for name in TORCHRUN_VARIABLES if name in os.environ]
    if "RANK" not in present and "WORLD_SIZE" not in present:
        return World(0, 1, 0, choose_device(device, 0), "none", 0)
    missing = [name for name in TORCHRUN_VARIABLES if name not in present]
    if missing:
        raise ValueError(
            f"the environment has {', '.join(present)} but not {', '.join(missing)}; "
            "start with torchrun, which sets all of them, or unset them for a single process"
        )
    rank, world_size, local_rank, port = (
        _env_int(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    attempt = _env_int("TORCHELASTIC_RESTART_COUNT", default=0)
    if not 0 <= rank < world_size:
        raise ValueError(f"RANK is {rank}; allowed: 0 to WORLD_SIZE - 1 = {world_size - 1}")
    chosen = choose_device(device, local_rank)
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    _follow_launcher()
    if world_size == 1:
        return World(rank, world_size, local_rank, chosen, "none", attempt)

    if os.environ.get("TORCH_NCCL_ASYNC_ERROR_HANDLING") == "0":
        logger.warning("TORCH_NCCL_ASYNC_ERROR_HANDLING is 0: no time limit holds on GPUs; unset it")
    if chosen.type == "cuda" and ranks_per_gpu() > 1:
        _share_gpu(rank)
    backend = "cpu:gloo,cuda:nccl" if chosen.type == "cuda" else "gloo"
    agent_hosts = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"

    def connect(is_host: bool) -> dist.TCPStore:
        return dist.TCPStore(
            os.environ["MASTER_ADDR"],
            port,
            world_size,
            is_master=is_host,
            timeout=timedelta(seconds=start_timeout_s),
            wait_for_workers=False,
            multi_tenant=True,
        )

    store = connect(is_host=rank == 0 and not agent_hosts)
    prefix = _meet(store, rank, world_size, start_timeout_s)
    dist.init_process_group(
        backend,
        store=dist.PrefixStore(prefix, store),
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_timeout_s),
    )
    first = rank - local_rank
    neighbours = range(first, min(world_size, first + _env_int("LOCAL_WORLD_SIZE", default=world_size)))
    own_store = dist.PrefixStore(prefix, connect(is_host=False))
    watch.start(own_store, rank, world_size, collective_timeout_s, neighbours, "nccl" in backend)
    return World(rank, world_size, local_rank, chosen, backend, attempt)


def stop() -> None:
    """Leave the group. Safe on an error path: a peer that is stuck in a collective is waited for 10 s, no longer."""
    watch.stop()
    if not dist.is_initialized():
        return
    device_index = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def leave() -> None:
        if device_index is not None:
            torch.cuda.set_device(device_index)
        dist.destroy_process_group()

    thread = threading.Thread(target=leave, name="leave-process-group", daemon=True)
    thread.start()
    thread.join(STOP_LIMIT_S)
    if thread.is_alive():
        logger.warning(
            "the process group did not close within %.0f s; leaving it to the end of the process", STOP_LIMIT_S
        )


def ranks_per_gpu() -> int:
    """1, or what EARMARK_RANKS_PER_GPU says."""
    found = _env_int(SHARED, default=1)
    if found < 1:
        raise ValueError(f"{SHARED} is {found} in the environment; allowed: 1 or above")
    return found


def _share_gpu(rank: int) -> None:
    """NCCL refuses two ranks on one GPU of one host; under other names of the host it takes them for two machines, and
    they talk through sockets. All its calls, limits and failures are then real; its speed is not."""
    os.environ["NCCL_HOSTID"] = f"earmark-rank-{rank}"
    if rank == 0:
        logger.warning("%s is %d: ranks share a GPU, by turns; for rehearsals, not for speed", SHARED, ranks_per_gpu())


def _follow_launcher() -> None:
    """Get SIGTERM when torchrun dies: it cannot tell its workers of its own SIGKILL, and they would train on unseen,
    in the way of the next attempt. (Elsewhere than on Linux they go on until they are done.)"""
    if "TORCHELASTIC_RUN_ID" not in os.environ or sys.platform != "linux":
        return
    if ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM) != 0:
        reason = os.strerror(ctypes.get_errno())
        logger.warning("prctl failed (%s): when torchrun dies, end its workers by hand", reason)


def _meet(store: dist.TCPStore, rank: int, world_size: int, timeout_s: float) -> str:
    """Agree on a store prefix that no earlier attempt has used.

    torchrun keeps one store over all its restarts, and the keys of a killed attempt would pair new ranks with dead
    addresses. TORCHELASTIC_RESTART_COUNT cannot be the prefix on several nodes: it is each node's own count, and a node
    that restarts because *another* node failed does not raise it, so the nodes would wait under different prefixes.
    So each rank announces a fresh word, rank 0 answers each word it finds with this attempt's prefix, and is done when
    all have picked it up; words of dead attempts get an answer that nobody reads.
    """
    deadline = time.monotonic() + timeout_s
    if rank != 0:
        word = secrets.token_hex(8)
        store.set(f"word-of-{rank}", word)
        try:
            prefix = store.get(f"answer-to-{word}").decode()
        except dist.DistStoreError as error:
            raise TimeoutError(f"rank 0 did not answer rank {rank} within {timeout_s:g} s (start_timeout_s)") from error
        store.add(f"{prefix}-arrived", 1)
        return prefix

    prefix = f"attempt-{secrets.token_hex(8)}"
    announced: list[int] = []
    answered: set[bytes] = set()
    while store.add(f"{prefix}-arrived", 0) < world_size - 1:
        silent = sorted(set(range(1, world_size)) - set(announced))
        announced += [r for r in silent if store.check([f"word-of-{r}"])]
        words = set(store.multi_get([f"word-of-{r}" for r in announced])) if announced else set()
        new = [word.decode() for word in words - answered]
        if new:
            for word in new:
                store.set(f"answer-to-{word}", prefix)
            answered |= words
        elif time.monotonic() > deadline:
            raise TimeoutError(
                f"not all of {world_size} ranks came within {timeout_s:g} s (start_timeout_s): "
                + (f"never heard of ranks {silent[:8]}" if silent else "a rank left again while it started")
            )
        else:
            time.sleep(0.02)
    return prefix


def choose_device(device: str, local_rank: int) -> torch.device:
    """`auto`, `cpu` or `cuda` as the device of this process. ValueError when there is no such GPU."""
    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count, index = torch.cuda.device_count(), local_rank // ranks_per_gpu()
    if index >= count:
        raise ValueError(
            f"LOCAL_RANK is {local_rank} but this machine shows {count} GPUs; start at most {count * ranks_per_gpu()} "
            f"processes here (torchrun --nproc-per-node), or set --device cpu; {SHARED} lets several share a GPU"
        )
    return torch.device("cuda", index)


def _env_int(name: str, default: int | None = None) -> int:
    text = os.environ.get(name)
    if text is None and default is not None:
        return default
    try:
        return int(text or "")
    except ValueError:
        raise ValueError(f"{name} is {text!r} in the environment; allowed: a whole number") from None
