"""One rank of bench/scaling.py, started by torchrun: checks first, then steps on the clock; rank 0 prints JSON lines.

    torchrun --nproc_per_node=8 bench/scaling_rank.py --clips 16 256 --kept DIR [--tiny]

Checks (bench/scaling_parity.py), dropout off: gradients, and adapters, heads and temperature after some steps, are
those of one rank with the whole batch, which a run with one rank has left in DIR, and DistributedDataParallel's. Sides
on the clock: ours; on a GPU ours without CUDA graphs too, as DDP has to be; DDP.
"""

import sys
from pathlib import Path

if __package__ != "bench":  # run as a file: the root goes first on sys.path, and bench/ comes off it
    here = Path(__file__).resolve().parent
    sys.path[:] = [str(here.parent), *(p for p in sys.path if Path(p).resolve() != here)]

import argparse
import json
import os
import time
import warnings
from collections.abc import Sequence
from typing import Any

import torch

from bench.drawn import NUM_BATCHES
from bench.limits import free_memory, synchronize
from bench.ours import Shapes, Training, build, time_steps, wake_adapters
from bench.scaling_parity import OBJECTIVE, DdpTraining, batch_of_rank, check_at_full_size, check_small
from bench.traffic import recorded
from bin.feed import FedBatch
from distributed import processes
from distributed.collectives import agree, barrier
from distributed.processes import World, ranks_per_gpu

TIME_LIMIT_S = 60.0  # of a collective


def time_side(training: Training, fed: list[FedBatch], steps: int) -> dict[str, Any]:
    """Steps on the clock, then each batch once with its collectives recorded. The slowest rank counts."""
    ranks, is_cuda = training.world.world_size, training.device.type == "cuda"
    timed = time_steps(training, fed, steps, steps)
    synchronize(training.device)
    barrier()
    started = time.perf_counter()
    with recorded() as whole:
        for one in fed:
            training.step(one)
        synchronize(training.device)
    recorded_s = (time.perf_counter() - started) / len(fed)
    with recorded() as first:
        training.step(fed[0])
    if isinstance(training, DdpTraining) and ranks > 1:
        first.floats.num_bytes["all_reduce"] += training.reduced_bytes
    in_collectives_s = (whole.device_s if is_cuda else whole.host_s) / len(fed)
    numbers = agree(
        seconds=timed.seconds_in_a_row,
        peak_gib=timed.peak_gib or 0.0,
        recorded_s=recorded_s,
        most_s=in_collectives_s,
        minus_least_s=-in_collectives_s,
        ids_s=whole.host_s / len(fed) if is_cuda else 0.0,
        sent=first.floats.sent(ranks),
        ids_sent=first.ids.sent(ranks),
    )
    numbers["least_s"] = -numbers.pop("minus_least_s")
    return {**numbers, "payload": dict(first.floats.num_bytes), "collectives": first.num_calls,
            "captures": timed.captures}  # fmt: skip


def expected_bytes(training: Training, fed: FedBatch) -> float:
    """What a rank should send a step but for ids: rows there, their gradient back, gradients and 16 numbers.

    With gloo the gradient of the rows is all-reduced, which is twice a reduce-scatter.
    """
    most = agree(clips=fed.batch.num_clips, terms=fed.batch.num_terms)
    ranks, head = training.world.world_size, training.model.audio_head
    row_elements = (2 * most["clips"] + most["terms"]) * head.out_features
    wire = (training.wire_dtype or head.weight.dtype).itemsize
    back = head.weight.dtype.itemsize * (1 if training.device.type == "cuda" else 2)
    flat = training.update.flat
    assert flat is not None
    reduced = flat.gradients_F.nbytes + flat.tail_X.nbytes
    return (ranks - 1) * row_elements * (wire + back) + 2 * (ranks - 1) / ranks * reduced


def run(world: World, sizes: Sequence[int], kept: Path, tiny: bool) -> None:
    def tell(line: dict[str, Any]) -> None:
        if world.is_main and line:
            print(json.dumps(line), flush=True)

    for line in check_small(world, kept):
        tell(line)
    free_memory(world.device)
    is_cuda = world.device.type == "cuda"
    shapes, wire_dtype = Shapes.of(tiny), torch.bfloat16 if is_cuda else None
    torch.manual_seed(0)
    built = build(shapes, world.device)
    if is_cuda:
        wake_adapters(built.model.eval())  # without dropout
        for line in check_at_full_size(world, kept, shapes, built, wire_dtype):
            tell(line)
        built.model.train()
    torch.manual_seed(1 + world.rank)  # dropout differs between ranks
    few = tiny or ranks_per_gpu() > 1  # steps of ranks that share a GPU say nothing but that they work
    sides = {"ours": "auto", **({"ours, no graphs": "off"} if is_cuda else {}), "DDP": ""}
    for side, graphs in sides.items():
        if side == "DDP" and world.world_size == 1:
            continue
        built.model.zero_grad(set_to_none=True)
        training = (
            DdpTraining(built, world, wire_dtype)
            if side == "DDP"
            else Training(built, OBJECTIVE, True, graphs, world, wire_dtype)
        )
        for size in sizes:
            found: dict[str, Any] = {"side": side, "ranks": world.world_size, "clips": size}
            fed = [
                batch_of_rank(shapes, world, size * world.world_size, seed=3 + i)
                for i in range(2 if few else NUM_BATCHES)
            ]
            found |= time_side(training, fed, 3 if few else 12)
            if side == "ours":
                found["expected"] = expected_bytes(training, fed[0])
            tell(found)
            del fed
            if side != "DDP":
                training.release()
        built.model.graphs = None
        del training
        free_memory(world.device)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="One rank of bench/scaling.py.")
    parser.add_argument("--clips", type=int, nargs="+", required=True, help="of each rank")
    parser.add_argument("--kept", type=Path, required=True, help="folder with the gradients of one rank")
    parser.add_argument("--device", choices=("cpu", "cuda"), required=True)
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args(argv)
    warnings.filterwarnings("ignore", category=FutureWarning)  # DDP's flag has another name from torch 2.13 on
    if args.device == "cpu":
        torch.set_num_threads(1)
    rank = os.environ.get("RANK", "0")
    try:
        world = processes.start(args.device, TIME_LIMIT_S, TIME_LIMIT_S)
        run(world, args.clips, args.kept, args.tiny)
    except Exception as error:
        print(json.dumps({"error": f"rank {rank}: {type(error).__name__}: {error}"}), flush=True)
        raise
    finally:
        processes.stop()
    return 0


if __name__ == "__main__":
    sys.exit(main())
