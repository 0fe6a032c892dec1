"""What several ranks find is what one finds, and what torch's DistributedDataParallel finds: the checks of
bench/scaling_rank.py.

A run with one rank keeps its gradients and trained weights in a folder; those with more compare with them. In bf16 at
full size every other cut of a batch rounds otherwise, one rank's own in two passes too: there the distance of each to
the gradient in fp32 tells how much of that between ranks is rounding.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bench.drawn import as_batch, dealt, draw, on_device
from bench.limits import free_memory
from bench.ours import LEARNING_RATE, Shapes, Training, build, wake_adapters, without_dropout
from bin.feed import FedBatch
from bin.step import encode_all
from distributed.atomic import read_tensors, write_tensors
from distributed.gradsync import sync_gradients
from distributed.processes import World
from losses.settings import LossSettings
from model.build import Built

OBJECTIVE = LossSettings(learn_temperature=True)
"""A run's own, hard negatives of the batch included; the temperature learns, so that its gradient is compared too."""
CHECKED_CLIPS, CHECKED_CLIPS_AT_FULL_SIZE = 16, 64  # of all ranks together
CHECKED_STEPS = 4
TO_FP32 = "bf16, gradient to that in fp32"
GIB_A_CLIP_IN_FP32 = 0.3  # what backward needs of it: more than twice the 0.12 of bf16
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


def summed_gradients(training: Training, fed: FedBatch, clips_per_pass: int = 0) -> dict[str, Tensor]:
    """By name, over all ranks."""
    training.zero()
    training.backward(fed, clips_per_pass)
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


def against_kept(kept: Path, name: str, world: World, found: dict[str, Tensor]) -> dict[str, Any]:
    """Compare on rank 0 with what a run with one rank has kept under this name."""
    path = kept / f"{name}.safetensors"
    if not world.is_main or not path.exists():
        return {}
    return {"check": name, "ranks": world.world_size, **compare(found, read_tensors(path))}


def against_one_rank(kept: Path, name: str, world: World, found: dict[str, Tensor]) -> dict[str, Any]:
    """The same, where what is to be kept is what one rank finds here."""
    if world.world_size == 1:
        write_tensors(kept / f"{name}.safetensors", found)
    return against_kept(kept, name, world, found)


def check_small(world: World, kept: Path) -> list[dict[str, Any]]:
    """fp32, small shapes: N ranks against one, flat and plain, and after steps; DDP against ours.

    Raises RuntimeError where DDP differs."""
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


def check_at_full_size(
    world: World, kept: Path, shapes: Shapes, built: Built, wire_dtype: torch.dtype | None
) -> list[dict[str, Any]]:
    """In bf16: N ranks against one, gradients and after steps; both against fp32; one rank against itself, cut."""
    training = Training(built, OBJECTIVE, True, "off", world, wire_dtype)
    fed = batch_of_rank(shapes, world, CHECKED_CLIPS_AT_FULL_SIZE, seed=2)
    gradients = summed_gradients(training, fed)
    lines = [against_one_rank(kept, "bf16, flat", world, gradients)]
    if world.world_size == 1 and (exact := fp32_gradients(shapes, built, fed)) is not None:
        write_tensors(kept / f"{TO_FP32}.safetensors", exact)
        del exact
        free_memory(world.device)
    lines.append(against_kept(kept, TO_FP32, world, gradients))
    for num_passes in (2, 4) if world.world_size == 1 else ():
        cut = summed_gradients(training, fed, -(-fed.batch.num_clips // num_passes))
        lines.append({"check": f"bf16, one rank in {num_passes} passes", "ranks": 1, **compare(cut, gradients)})
    return lines + check_trained(world, kept, "bf16", training, fed)


def fp32_gradients(shapes: Shapes, built: Built, fed: FedBatch) -> dict[str, Tensor] | None:
    """One rank's, of the same weights and in the same mode; None where the device has no room for both models."""
    num_weights = sum(param.numel() for param in built.model.parameters())
    needed = 4 * num_weights + fed.batch.num_clips * GIB_A_CLIP_IN_FP32 * 2**30
    if torch.cuda.mem_get_info()[0] < needed:
        return None
    exact = build(shapes, built.model.device, without_dropout(), torch.float32)
    exact.model.train(built.model.training)
    exact.model.load_state_dict(built.model.state_dict())
    was_allowed = torch.backends.cudnn.allow_tf32
    torch.backends.cudnn.allow_tf32 = False
    try:
        return summed_gradients(Training(exact, OBJECTIVE, True, "off"), fed)
    finally:
        torch.backends.cudnn.allow_tf32 = was_allowed
