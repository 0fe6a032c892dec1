"""What test_evaluation.py and test_datasets.py compare: one test file measured at 1, 2 and 3 real ranks, and the drops
of all of them joined. Run by tests/distributed/ranks.py in a folder that holds test.json and its audio.
"""

from dataclasses import replace
from pathlib import Path

import torch

from bin.bank import embed_bank
from bin.datasets import merge_drops
from bin.evaluation import Evaluator, encode_terms
from data.clips import load_clips
from data.drops import DropLog
from data.glossary import Entry, Glossary
from data.reader import AudioReader
from data.settings import DataSettings
from distributed import processes
from distributed.atomic import json_bytes, write_tensors
from distributed.processes import World
from model.build import Built
from retrieval.measured import account
from tests.bin.ranks_step import build
from tests.bin.tones import TERMS
from tests.distributed.ranks import fork_rank, forks_itself, wait_all

WORLD_SIZES = (1, 2, 3)
BATCH_SIZES = (2, 6)  # 11 clips: 6 batches, and 2, of which a third rank gets none
RANKED = (*TERMS, "parking lot", "hash key", "operator")
SEEN = frozenset(TERMS[:3])
UNREADABLE = (2, 3, 5)  # with batches of 2: one has no clip that can be read, and no rank has all three


def evaluator(folder: Path, batch_size: int, world: World) -> Evaluator:
    drops = DropLog(max_bad_fraction=0.5)
    clips = load_clips(folder / "test.json", DataSettings(data_root=str(folder)), drops)
    return Evaluator(clips, list(RANKED), SEEN, AudioReader(1), drops, batch_size, world)


def with_distractors(measure: Evaluator) -> Evaluator:
    """The same clips at three sizes of the glossary, terms in batches of their own size."""
    distractors = tuple(f"distractor {i}" for i in range(40))
    return replace(measure, distractors=distractors, distractor_sizes=(10, 40), term_batch_size=3)


def small_model(folder: Path) -> Built:
    return build(folder, torch.float32)[0]


@forks_itself
def one_file_at_all_world_sizes(port: int, folder: Path) -> None:
    for world_size in WORLD_SIZES:

        def body(world_size: int = world_size) -> None:
            world = processes.start("cpu", 20.0, 30.0)
            built = small_model(folder)
            for batch_size in BATCH_SIZES:
                measure = evaluator(folder, batch_size, world)
                result = measure(built.model, built.tokenizer)
                own_drops = measure.drops.lines()
                whole = with_distractors(measure).measure(built.model, built.tokenizer)
                name = f"{batch_size} {world_size}"
                merge_drops(measure.drops, world, folder / f"bad {name}.jsonl")
                found = {
                    "result": result.to_json(),
                    "own drops": own_drops,
                    "merged drops": measure.drops.lines(),
                    "counts": dict(measure.drops.counts),
                    "examples": [[clip.clip_id, terms] for clip, terms in whole.examples(4)],
                    "facts": [ranks.pack().tolist() for ranks in whole.ranks_by_size.values()],
                    "account": account(whole, num_resamples=20),
                    "over the limit": over_the_limit(own_drops, len(measure.clips), world, folder),
                }
                (folder / f"{name} {world.rank}.json").write_bytes(json_bytes(found))
                glossary = Glossary("", [Entry(term, term) for term in RANKED])
                bank = embed_bank(built.model, built.tokenizer, glossary, batch_size, world)
                terms_NE = encode_terms(built.model.eval(), built.tokenizer, RANKED, batch_size, world)
                built.model.train()
                write_tensors(
                    folder / f"{name} {world.rank}.safetensors", {"terms": terms_NE, "bank": bank.embeddings_KE}
                )
            processes.stop()

        codes = wait_all([fork_rank(rank, world_size, port, body) for rank in range(world_size)])
        assert not any(codes.values()), (world_size, codes)


def over_the_limit(lines: list[dict[str, str]], num_clips: int, world: World, folder: Path) -> str:
    """What merge_drops raises when no rank alone is over the limit, but all together are."""
    drops = DropLog(max_bad_fraction=2.5 / 11)
    drops.seen(num_clips)
    for line in lines:
        drops.add(line["reason"], line["source"], line["detail"])
    try:
        merge_drops(drops, world, folder / "over.jsonl")
    except ValueError as error:
        return str(error).splitlines()[0]
    return ""
