"""What test_step_adapters.py compares: some steps of adapters, heads and temperature at 1, 2, 4 and 8 real ranks."""

from pathlib import Path

import torch
from torch import Tensor

from bin.optimizer import parameter_groups
from bin.step import add_gradients
from bin.update import make_update
from distributed import processes
from distributed.atomic import write_tensors
from distributed.processes import World
from lora.inject import inject_lora
from lora.settings import LoraSettings
from tests.bin.ranks_step import CLIPS, SETTINGS, bank_of, batch_of, build
from tests.distributed.ranks import fork_rank, forks_itself, wait_all

WORLD_SIZES = (1, 2, 4, 8)
NUM_STEPS = 4
SPARSE = {8: (2, 1, 1, 0, 2, 1, 1, 0)}  # clips of the ranks, where they are not alike


def train_adapters(folder: Path, world: World, dtype: torch.dtype, flat: bool) -> dict[str, Tensor]:
    """Gradients of the first step, and what has been trained after the last one; dropout off, hard negatives on."""
    built, temperature = build(folder, dtype)
    built.model.requires_grad_(False)
    inject_lora(built.model, LoraSettings(lora_r=4, lora_dropout=0.0))
    for head in (built.model.audio_head, built.model.text_head):
        head.requires_grad_(True)
    built.model.to(dtype)
    generator = torch.Generator().manual_seed(1)
    for name, param in built.model.named_parameters():
        if name.endswith("lora_B"):  # zero at the start, and lora_A would have no gradient
            param.data.copy_(torch.randn(param.shape, generator=generator) * 0.1)
    named = [(n, p) for m in (built.model, temperature) for n, p in m.named_parameters() if p.requires_grad]
    update = make_update(parameter_groups(named, built.sources, 0.01, 1.0), named, 1e-4, 0.999, flat)
    counts = SPARSE.get(world.world_size, [len(CLIPS) // world.world_size] * world.world_size)
    first = sum(counts[: world.rank])
    batch, found = batch_of(built, range(first, first + counts[world.rank])), {}
    bank = bank_of(dtype=dtype)
    for step in range(NUM_STEPS):
        update.zero()
        shares, num_clips = add_gradients(built.model, temperature, batch, SETTINGS, world, None, bank, 0, 1)
        assert num_clips == len(CLIPS)
        update.apply(step, shares, False, 1e9)  # summed over the ranks here
        if step == 0:
            found = {f"gradient of {name}": param.grad.clone() for name, param in named}
        assert update.outcomes(now=True)[-1].losses["hard"] > 0
    return found | {name: param.detach().clone() for name, param in named}


@forks_itself
def adapters_at_all_world_sizes(port: int, folder: Path) -> None:
    for world_size in WORLD_SIZES:

        def body(world_size: int = world_size) -> None:
            world = processes.start("cpu", 20.0, 30.0)
            for dtype in (torch.float32, torch.float64):
                for flat in (True, False):
                    name = f"{world_size} {dtype} {flat} {world.rank}.safetensors"
                    write_tensors(folder / name, train_adapters(folder, world, dtype, flat))
            processes.stop()

        codes = wait_all([fork_rank(rank, world_size, port, body) for rank in range(world_size)])
        assert not any(codes.values()), (world_size, codes)
