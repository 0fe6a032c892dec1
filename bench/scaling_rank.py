"""One rank of bench/scaling.py, started by torchrun: checks first, then steps on the clock; rank 0 prints JSON lines.

    torchrun --nproc_per_node=8 bench/scaling_rank.py --clips 16 256 --kept DIR [--tiny]

Checks, dropout off: the gradients of all ranks, summed, are those of one rank with the whole batch (which a run with
one rank has left in DIR), with the flat all-reduce and with the plain one; so are adapters, heads and temperature after
some steps; and DistributedDataParallel over the same model finds the same. Sides on the clock: ours; on a GPU ours
without CUDA graphs too, as DDP has to be; DDP.
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
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.drawn import NUM_BATCHES, as_batch, dealt, draw, on_device
from bench.limits import free_memory, synchronize
from bench.ours import LEARNING_RATE, Shapes, Training, build, time_steps, wake_adapters, without_dropout
from bench.traffic import recorded
from bin.feed import FedBatch
from bin.step import encode_all
from distributed import processes
from distributed.atomic import read_tensors, write_tensors
from distributed.collectives import agree, barrier
from distributed.gradsync import sync_gradients
from distributed.processes import World, ranks_per_gpu
from losses.settings import LossSettings
from model.build import Built

OBJECTIVE = LossSettings(learn_temperature=True)
"""A run's own, hard negatives of the batch included; the temperature learns, so that its gradient is compared too."""
TIME_LIMIT_S = 60.0  # of a collective
CHECKED_CLIPS, CHECKED_CLIPS_AT_FULL_SIZE = 16, 64  # of all ranks together
CHECKED_STEPS = 4
MOST_DDP_DIFFERENCE = {"cpu": 1e-5, "cuda": 1e-3}  # fp32; convolutions on a GPU may round to TF32


class DdpTraining(Training):
    """The same model, loss and gathers under torch's DistributedDataParallel, with clipping and fused AdamW as users
    write them. DDP averages gradients, so that the loss is the share times the number of ranks."""

    def __init__(self, built: Built, world: World, wire_dtype: torch.dtype | None) -> None:
        super().__init__(built, OBJECTIVE, flat=False, cuda_graphs="off", world=world, wire_dtype=wire_dtype)
        for param in self.params:
            param.grad = None  # DDP keeps gradients in its own buckets
        self.ddp = DistributedDataParallel(
            _Whole(self), broadcast_buffers=False, gradient_as_bucket_view=True, init_sync=False
        )
        self.optimizer = torch.optim.AdamW(self.params, lr=LEARNING_RATE, fused=True)

    def gradients(self, fed: FedBatch) -> dict[str, Tensor]:
        self.ddp(fed).backward()
        return {name: param.grad for name, param in self.named if param.grad is not None}

    def step(self, fed: FedBatch, clips_per_pass: int = 0, num_kept: int = 1) -> Tensor:
        assert clips_per_pass == 0, "DDP would reduce after each pass"
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.ddp(fed)
        loss.backward()
        nn.utils.clip_grad_norm_(self.params, 1.0)
        self.optimizer.step()
        return loss.detach()

    @property
    def reduced_bytes(self) -> int:
        """Of the buckets that are all-reduced in a step, as DDP logs them."""
        logged = self.ddp._get_ddp_logging_data()
        sizes = logged.get("rebuilt_bucket_sizes") or logged["bucket_sizes"]
        return sum(int(size) for size in str(sizes).split(","))


class _Whole(nn.Module):
    """Batch to loss in one `forward`, which is all that DDP looks at."""

    def __init__(self, steps: Training) -> None:
        super().__init__()
        self.model, self.temperature = steps.model, steps.temperature
        self._share, self._num_ranks = steps.share, steps.world.world_size

    def forward(self, fed: FedBatch) -> Tensor:
        return self._share(fed, encode_all(self.model, fed)) * self._num_ranks


def batch_of_rank(shapes: Shapes, world: World, num_clips: int, seed: int) -> FedBatch:
    """This rank's part of a batch of `num_clips` over all ranks, which does not depend on how many there are."""
    whole = as_batch(draw(num_clips, torch.Generator().manual_seed(seed)), seed, shapes.vocabulary)
    return on_device(dealt(whole, world.world_size)[world.rank], world.device)


def summed_gradients(training: Training, fed: FedBatch) -> dict[str, Tensor]:
    """By name, over all ranks."""
    training.zero()
    training.backward(fed)
    flat = training.update.flat
    if flat is None:
        sync_gradients(training.params)
    else:
        flat.sum_over_ranks()
    return {name: param.grad.clone() for name, param in training.named if param.grad is not None}


def train(training: Training, fed: FedBatch) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By name: what some steps on a batch lead to, and how far from where they started."""
    before = {name: param.detach().clone() for name, param in training.named}
    for _ in range(CHECKED_STEPS):
        training.step(fed)
    after = {name: param.detach().clone() for name, param in training.named}
    return after, {name: value - before[name] for name, value in after.items()}


def compare(found: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    """Of all tensors as one vector: the norm of the difference over the norm, and the cosine. The largest difference
    within one tensor, of its largest value, which is more where a gradient nearly cancels out. The temperature's
    difference, of its own value."""
    assert found.keys() == expected.keys(), found.keys() ^ expected.keys()
    differences, ours, theirs = [], [], []
    for name, value in expected.items():
        own, other = found[name].detach().double().cpu().flatten(), value.detach().double().cpu().flatten()
        assert float(other.abs().max()) > 0, f"{name} is zero: its comparison says nothing"
        differences.append(float((own - other).abs().max() / other.abs().max()))
        ours.append(own)
        theirs.append(other)
    one, other = torch.cat(ours), torch.cat(theirs)
    cosine = torch.nn.functional.cosine_similarity(one, other, dim=0)
    difference = (one - other).norm() / other.norm()
    temperature = differences[list(expected).index("log_inv_temperature")]
    return {"difference": float(difference), "cosine": float(cosine), "within_a_tensor": max(differences),
            "temperature": temperature}  # fmt: skip


def against_one_rank(kept: Path, name: str, world: World, found: dict[str, Tensor]) -> dict[str, Any]:
    """Compare on rank 0 with what a run with one rank has kept; that run itself keeps it."""
    path = kept / f"{name}.safetensors"
    if world.world_size == 1:
        write_tensors(path, found)
    if not world.is_main or not path.exists():
        return {}
    return {"check": name, "ranks": world.world_size, **compare(found, read_tensors(path))}


def check_small(world: World, kept: Path) -> list[dict[str, Any]]:
    """fp32, small shapes: N ranks against one, flat and plain, and after steps; DDP against ours. RuntimeError where DDP
    differs."""
    shapes, lines = Shapes.of(tiny=True), []
    torch.manual_seed(0)
    built = build(shapes, world.device, without_dropout(), torch.float32)
    wake_adapters(built.model)
    fed = batch_of_rank(shapes, world, CHECKED_CLIPS, seed=1)
    ours: dict[str, Tensor] = {}
    for flat in (False, True):
        training = Training(built, OBJECTIVE, flat, cuda_graphs="off", world=world)
        ours = summed_gradients(training, fed)
        lines.append(against_one_rank(kept, "fp32, flat" if flat else "fp32, plain", world, ours))
        built.model.zero_grad(set_to_none=True)
    if world.world_size > 1:
        theirs = compare(DdpTraining(built, world, None).gradients(fed), ours)
        lines.append({"check": "fp32, DDP", "ranks": world.world_size, **theirs})
        most = MOST_DDP_DIFFERENCE[world.device.type]
        if not theirs["difference"] <= most:
            raise RuntimeError(
                f"gradients of DDP differ by {theirs['difference']:.1e} from ours (allowed {most:g}): no time compares"
            )
        built.model.zero_grad(set_to_none=True)
    return lines + check_trained(world, kept, "fp32", Training(built, OBJECTIVE, True, "off", world), fed)


def check_trained(world: World, kept: Path, dtype: str, training: Training, fed: FedBatch) -> list[dict[str, Any]]:
    """Adapters, heads and temperature after steps: N ranks against one."""
    after, moved = train(training, fed)
    return [
        against_one_rank(kept, f"{dtype}, after {CHECKED_STEPS} steps", world, after),
        against_one_rank(kept, f"{dtype}, after {CHECKED_STEPS} steps, their way", world, moved),
    ]


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
        training = Training(built, OBJECTIVE, True, "off", world, wire_dtype)
        fed_once = batch_of_rank(shapes, world, CHECKED_CLIPS_AT_FULL_SIZE, seed=2)
        tell(against_one_rank(kept, "bf16, flat", world, summed_gradients(training, fed_once)))
        for line in check_trained(world, kept, "bf16", training, fed_once):
            tell(line)
        built.model.train()
        del training, fed_once
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
