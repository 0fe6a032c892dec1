"""What test_step_maxsim.py compares: one step with the maxsim read-out at 1 and 2 real ranks."""

from pathlib import Path

from distributed import processes
from distributed.atomic import write_tensors
from tests.bin.ranks_step import CLIPS, SPREADS, one_step
from tests.distributed.ranks import fork_rank, forks_itself, wait_all

READOUT = {"readout": "maxsim", "maxsim_windows": (2, 5, 9), "maxsim_stride": 2}


@forks_itself
def maxsim_steps(port: int, folder: Path) -> None:
    for world_size in (1, 2):

        def body(world_size: int = world_size) -> None:
            world = processes.start("cpu", 20.0, 30.0)
            cases = {"one process": {1: (len(CLIPS),)}} if world_size == 1 else SPREADS
            for name, spread in cases.items():
                counts = spread[world_size]
                first = sum(counts[: world.rank])
                # In passes where there are ranks: with the gather, the windows of several chunks meet the terms.
                found = one_step(
                    folder, world, range(first, first + counts[world.rank]), 2 if world_size > 1 else 0, **READOUT
                )
                write_tensors(folder / f"{name} {world.rank}.safetensors", found)
            if world_size == 1:
                write_tensors(folder / "mean 0.safetensors", one_step(folder, world, range(len(CLIPS))))
            processes.stop()

        codes = wait_all([fork_rank(rank, world_size, port, body) for rank in range(world_size)])
        assert not any(codes.values()), (world_size, codes)
