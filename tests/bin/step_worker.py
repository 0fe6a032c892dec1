"""One rank of test_step.py: gradients of its share, summed over ranks, against one process with the whole batch.

    python step_worker.py FOLDER out.json       with torchrun's variables set

Rank 0 writes, for each read-out, the loss, the largest gap of any gradient, and the largest gradient there is.
"""

import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from bin.step import loss_share
from data.batches import Batch, collate
from data.clips import Clip
from data.terms import key64, variant_group
from distributed import processes
from distributed.processes import World
from losses.settings import LossSettings
from losses.temperature import Temperature
from losses.terms import TermBank
from model.build import Built, build_model
from model.settings import ModelSettings

TERMS = ("voicemail", "pound key", "mailbox", "conference", "extension", "keypad")
SETTINGS = LossSettings(temperature=0.2, learn_temperature=True, no_term_loss_ratio=0.3, hard_neg_k=4)
COUNTS = {1: [7], 2: [5, 2]}


def make_batch(built: Built, first: int, stop: int) -> Batch:
    """Clips `first` up to `stop` of seven, of different lengths; the third and sixth have no term."""
    clips, pcms, extra = [], [], []
    for i in range(first, stop):
        terms = () if i % 3 == 2 else (TERMS[i % 6], TERMS[(i * i + 1) % 6])
        clips.append(
            Clip(str(i), "", None, None, f"chunk {i % 5}", tuple(dict.fromkeys(terms)), (), terms, not terms, "")
        )
        pcms.append(np.random.default_rng(i).integers(-9000, 9000, 2400 + 1500 * i).astype(np.int16))
        extra.append((f"mined {i % 4}", TERMS[(i + 3) % 6]))
    return collate(clips, pcms, built.tokenizer, extra_terms=extra)


def make_bank(width: int) -> TermBank:
    rows_KE = torch.randn(9, width, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    names = [*TERMS, "parking lot", "hash key", "pound keys"]
    return TermBank(
        nn.functional.normalize(rows_KE, dim=1),
        torch.tensor([key64(name) for name in names]),
        torch.tensor([variant_group(name) for name in names]),
    )


def step(built: Built, world: World) -> tuple[Tensor, dict[str, Tensor]]:
    """(this rank's share, its gradients)."""
    counts = COUNTS[world.world_size]
    first = sum(counts[: world.rank])
    batch = make_batch(built, first, first + counts[world.rank])
    temperature = Temperature(SETTINGS.temperature, learned=True).double()
    share, _, _ = loss_share(built.model, temperature, batch, SETTINGS, world, None, make_bank(8))
    share.backward()
    named = [*built.model.named_parameters(), *temperature.named_parameters()]
    grads = {name: p.grad.clone() if p.grad is not None else torch.zeros_like(p) for name, p in named}
    built.model.zero_grad(set_to_none=True)
    return share.detach(), grads


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    common = {"audio_model": str(folder / "audio.json"), "text_model": str(folder / "text.json"), "proj_dim": 8}
    models, expected = {}, {}
    for readout in ("mean", "maxsim"):
        torch.manual_seed(0)
        settings = ModelSettings(**common, trainable="full", readout=readout, maxsim_windows=(2, 5), maxsim_stride=2)
        models[readout] = build_model(settings, compute_dtype=torch.float64)
        expected[readout] = step(models[readout], World(0, 1, 0, torch.device("cpu"), "none", 0))  # no group yet
    world = processes.start("cpu", 60, 60)
    results = {}
    for readout, built in models.items():
        loss, grads = step(built, replace(world))
        dist.all_reduce(loss)
        gap, largest = abs(float(loss - expected[readout][0])), 0.0
        gaps = {}
        for name, reference in expected[readout][1].items():
            dist.all_reduce(grads[name])
            gaps[name] = float((grads[name] - reference).abs().max())
            largest = max(largest, float(reference.abs().max()))
        untouched = [n for n, g in expected[readout][1].items() if not g.any() and "embed_positions" not in n]
        results[readout] = {"loss": gap, "gap": max(gaps.values()), "largest": largest, "untouched": untouched}
    if world.is_main:
        Path(sys.argv[2]).write_text(json.dumps(results))
    processes.stop()


if __name__ == "__main__":
    main()
