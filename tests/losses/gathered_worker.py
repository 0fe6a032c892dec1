"""One rank of test_gathered.py: encode the own part, gather, take the loss, sum the gradients over ranks.

    RANK=.. WORLD_SIZE=.. STORE=file python gathered_worker.py out.json

Rank 0 writes, for each case, the loss, every gradient's largest difference to the one-process reference, and the
reference's largest gradient (so that a comparison of zeros shows).
"""

import json
import os
import sys
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import cases  # beside this script

from distributed.collectives import gather_rows
from losses.relations import BatchIds, Relations
from losses.settings import LossSettings
from losses.temperature import Temperature
from losses.total import Embeddings, total_loss

NUM_KEYS, NUM_FEATURES, DIM = 9, 6, 4
SETTINGS = LossSettings(no_term_loss_ratio=0.4, hard_neg_k=3, temperature=0.2, learn_temperature=True)


class TinyEncoders(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.audio = nn.Linear(NUM_FEATURES, DIM, dtype=torch.float64)
        self.text = nn.Linear(NUM_FEATURES, DIM, dtype=torch.float64)
        self.temperature = Temperature(SETTINGS.temperature, learned=True).double()

    def encode(self, side: str, features: Tensor) -> Tensor:
        return nn.functional.normalize(getattr(self, side)(features), dim=1)


def one_step(model: TinyEncoders, case: dict, parts: list[BatchIds], rank: int, gather) -> Tensor:
    """The share of `rank`; `gather(rows, counts)` brings the rows of all ranks together."""
    relations = Relations.build(parts)
    local, clips = relations.local(rank), relations.clips_of(rank)
    clip_counts = [part.text_keys_B.numel() for part in parts]
    term_counts = [part.term_keys_N.numel() for part in parts]
    audio_BE = model.encode("audio", case["audio_GF"][clips.start : clips.stop])
    text_BE = model.encode("text", case["text_GF"][clips.start : clips.stop])
    own_terms = model.encode("text", case["table_VF"][parts[rank].term_keys_N - 10])
    embeddings = Embeddings(
        audio_BE=audio_BE,
        text_BE=text_BE,
        term_UE=own_terms[local.own_term_rows_U],
        audio_GE=gather(audio_BE, clip_counts),
        text_GE=gather(text_BE, clip_counts),
        term_NE=gather(own_terms, term_counts)[local.first_copy_N],
    )
    return total_loss(embeddings, local, model.temperature(), SETTINGS)[0]


def make_case(counts: list[int], seed: int) -> tuple[list, dict]:
    generator = torch.Generator().manual_seed(seed)
    num_clips = sum(counts)
    case = {
        name: torch.randn(rows, NUM_FEATURES, dtype=torch.float64, generator=generator)
        for name, rows in (("audio_GF", num_clips), ("text_GF", num_clips), ("table_VF", NUM_KEYS))
    }
    return cases.random_clips(seed, num_clips, NUM_KEYS), case


def compare(counts: list[int], seed: int, rank: int) -> dict[str, float]:
    clips, case = make_case(counts, seed)
    model = TinyEncoders()
    starts = [sum(counts[:r]) for r in range(len(counts))]
    parts = [cases.batch_ids(clips[a : a + n]) for a, n in zip(starts, counts, strict=True)]
    loss = one_step(model, case, parts, rank, gather_rows)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    for parameter in model.parameters():
        dist.all_reduce(parameter.grad)  # SUM; nothing is divided by the world size

    reference = TinyEncoders()
    expected = one_step(reference, case, [cases.batch_ids(clips)], 0, lambda rows, _: rows)
    expected.backward()
    result = {"loss": float((total - expected.detach()).abs())}
    for (name, parameter), other in zip(model.named_parameters(), reference.parameters(), strict=True):
        result[name] = float((parameter.grad - other.grad).abs().max())
        result[f"scale of {name}"] = float(other.grad.abs().max())
    return result


def main() -> None:
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    store = dist.FileStore(os.environ["STORE"], world_size)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world_size, timeout=timedelta(seconds=60))
    results = {}
    even = [3] * world_size
    unequal = [1 + (5 * r) % 4 for r in range(world_size)]
    one_without_clips = [0 if r == 1 else 4 for r in range(world_size)]
    for name, counts in (("even", even), ("unequal", unequal), ("one rank without clips", one_without_clips)):
        for seed in (1, 2, 3):
            results[f"{name} {seed}"] = compare(counts, seed, rank)
    if rank == 0:
        Path(sys.argv[1]).write_text(json.dumps(results))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
