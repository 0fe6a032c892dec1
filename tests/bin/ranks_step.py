"""What test_step.py compares: one step, and centred heads, at 1, 2 and 3 real ranks. Run by tests/distributed/ranks.py.

Eight clips with shared texts, shared terms, variants of terms, clips without a term and clips without anything.
"""

import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from bin.step import center_heads, encode_batch, encode_in_passes, loss_share
from data.batches import Batch, collate
from data.clips import Clip
from data.glossary import Entry, Glossary
from data.terms import key64
from distributed import processes
from distributed.atomic import write_tensors
from distributed.collectives import sum_over_ranks
from distributed.gradsync import sync_gradients
from distributed.processes import World
from losses.settings import LossSettings
from losses.temperature import Temperature
from losses.terms import TermBank
from model.build import Built, build_model
from model.settings import ModelSettings
from tests.bin.tones import AUDIO, TEXT
from tests.distributed.ranks import fork_rank, forks_itself, wait_all

CLIPS = (
    ("press the pound key now", ("pound key", "pound")),
    ("your voicemail", ("voicemail",)),
    ("press the pound key now", ("pound key",)),
    ("mailboxes and a keypad", ("mailboxes", "keypad")),
    ("the mailbox", ("mailbox",)),
    ("nothing of note", ()),
    ("", ()),
    ("", ()),
)
SPREADS = {  # clips of each rank, in order
    "unequal": {2: (5, 3), 3: (1, 4, 3)},
    "a rank with neither text nor term": {2: (6, 2), 3: (4, 2, 2)},
    "a rank without clips": {2: (8, 0), 3: (3, 0, 5)},
}
GLOSSARY = Glossary(
    "", [Entry(term, term) for term in ("voicemail", "extension", "hash keys", "Mailbox", "conference")]
)
SETTINGS = LossSettings(learn_temperature=True, temperature=0.2, no_term_loss_ratio=0.4, hard_neg_k=3)
WIDTH = 8


def build(folder: Path, compute_dtype: torch.dtype = torch.float64, **more: object) -> tuple[Built, Temperature]:
    """A small model in training mode and a temperature, the same each time."""
    for name, architecture in (("audio", AUDIO), ("text", TEXT)):
        if not (folder / f"{name}.json").exists():  # several ranks come here, the first alone
            (folder / f"{name}.json").write_text(json.dumps(architecture))
    paths = {f"{name}_model": str(folder / f"{name}.json") for name in ("audio", "text")}
    torch.manual_seed(0)
    built = build_model(ModelSettings(**paths, trainable="full", proj_dim=WIDTH, **more), "cpu", compute_dtype)
    built.model.train()
    return built, Temperature(SETTINGS.temperature, learned=True).to(compute_dtype)


def batch_of(built: Built, indices: range | list[int]) -> Batch:
    """The clips of CLIPS with these numbers; the audio of each is its own."""
    clips, pcms = [], []
    for i in indices:
        text, terms = CLIPS[i]
        clips.append(Clip(f"c{i}", "", None, None, text, terms, (), terms, not terms, f"c{i}"))
        rng = np.random.default_rng(i)
        time_S = np.arange(4000 + 700 * i) / 16_000
        wave_S = 6000 * np.sin(2 * np.pi * (200 + 150 * i) * time_S) + rng.normal(0, 300, time_S.shape)
        pcms.append(wave_S.astype(np.int16))
    return collate(clips, pcms, built.tokenizer, GLOSSARY)


def bank_of(glossary: Glossary = GLOSSARY, dtype: torch.dtype = torch.float64) -> TermBank:
    """Random unit rows for the glossary's terms."""
    rows_KE = torch.randn(len(glossary.terms), WIDTH, generator=torch.Generator().manual_seed(5), dtype=dtype)
    groups_K = torch.tensor([glossary.group(term) for term in glossary.terms])
    keys_K = torch.tensor([key64(term) for term in glossary.terms])
    return TermBank(torch.nn.functional.normalize(rows_KE, dim=1), keys_K, groups_K)


def one_step(folder: Path, world: World, indices: range, clips_per_pass: int = 0, **more: object) -> dict[str, Tensor]:
    """Summed gradients by name, and the summed loss and its parts as "loss of ...". `more`: settings of the model."""
    built, temperature = build(folder, **more)
    named = [(n, p) for m in (built.model, temperature) for n, p in m.named_parameters() if p.requires_grad]
    batch = batch_of(built, indices)
    passes = encode_in_passes(built.model, batch, clips_per_pass)
    share, parts, relations = loss_share(
        built.model, temperature, batch, SETTINGS, world, None, bank_of(), passes.encoded
    )
    assert relations.num_clips == len(CLIPS)
    share.backward()
    passes.finish()
    sync_gradients(param for _, param in named)
    totals = sum_over_ranks(total=float(share.detach()), **{name: float(value) for name, value in parts.items()})
    losses = {f"loss of {name}": torch.tensor(value, dtype=torch.float64) for name, value in totals.items()}
    return {name: param.grad for name, param in named} | losses


def centred(folder: Path, world: World) -> dict[str, Tensor]:
    """Both heads' biases after center_heads, and what the heads then give for this rank's batches."""
    built, _ = build(folder)
    batches = [[0, 1, 2], [3, 4], [5, 6, 7], [6]]
    mine = [batch_of(built, indices) for indices in batches[world.rank :: world.world_size]]
    center_heads(built.model, mine)
    return head_outputs(built, mine) | {
        f"{name} bias": getattr(built.model, f"{name}_head").bias for name in ("audio", "text")
    }


def head_outputs(built: Built, batches: list[Batch]) -> dict[str, Tensor]:
    """The rows "audio" and "text" that the heads give before they are normalised."""
    rows: dict[str, list[Tensor]] = {name: [torch.zeros(0, WIDTH, dtype=torch.float64)] for name in ("audio", "text")}
    handles = [
        getattr(built.model, f"{name}_head").register_forward_hook(lambda _, __, out, name=name: rows[name].append(out))
        for name in rows
    ]
    with torch.no_grad():
        for batch in batches:
            encode_batch(built.model, batch)
    for handle in handles:
        handle.remove()
    return {name: torch.cat(parts) for name, parts in rows.items()}


@forks_itself
def steps_at_all_world_sizes(port: int, folder: Path) -> None:
    for world_size in (1, 2, 3):

        def body(world_size: int = world_size) -> None:
            world = processes.start("cpu", 20.0, 30.0)
            cases = {"one process": {1: (len(CLIPS),)}} if world_size == 1 else SPREADS
            for name, spread in cases.items():
                counts = spread[world_size]
                first = sum(counts[: world.rank])
                mine = range(first, first + counts[world.rank])
                write_tensors(folder / f"{name} {world_size} {world.rank}.safetensors", one_step(folder, world, mine))
                found = one_step(folder, world, mine, clips_per_pass=2)
                write_tensors(folder / f"{name} in passes {world_size} {world.rank}.safetensors", found)
            write_tensors(folder / f"centred {world_size} {world.rank}.safetensors", centred(folder, world))
            processes.stop()

        codes = wait_all([fork_rank(rank, world_size, port, body) for rank in range(world_size)])
        assert not any(codes.values()), (world_size, codes)
