"""What batches are made of, and how it travels to the processes that make them: as columns and JSON, never pickled."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from data.clip import Clip
from data.columns import map_columns, write_columns
from data.glossary import Glossary
from data.groups import GroupMap, GroupSet
from data.mined import ClipNegatives
from data.phrases import Found
from data.settings import DataSettings
from data.slots import anonymous_file
from data.table import ClipTable
from data.table_writer import TableWriter, rows_of
from data.terms import variant_group
from data.timed_words import Prompt
from data.windows import Windows

TABLE_BLOCK = 1024  # clips: temporary lists of one block only
NUMBERS = ("batch_size", "seed", "rank", "world_size", "num_windows")


@dataclass
class Recipe:
    """All that a batch depends on beside the step."""

    table: ClipTable
    settings: DataSettings
    batch_size: int  # over all ranks
    seed: int
    rank: int
    world_size: int
    num_windows: int
    windows: Windows | None
    negatives: ClipNegatives | None
    groups: GroupMap
    maskable: GroupSet

    @property
    def num_items(self) -> int:
        """Clips and windows of an epoch."""
        return len(self.table) + self.num_windows


def shared_table(clips: Sequence[Clip]) -> tuple[int, ClipTable]:
    """Clips as a table in a memory file, and that file's descriptor (closed with the process)."""
    writer = TableWriter()
    for first in range(0, len(clips), TABLE_BLOCK):
        writer.extend(rows_of(clips[first : first + TABLE_BLOCK]))
    descriptor = anonymous_file("table")
    with open(descriptor, "wb", closefd=False) as file:
        writer.write(file)
    return descriptor, ClipTable(map_columns(descriptor, "table"))


def maskable_groups(
    table: ClipTable,
    groups: GroupMap,
    windows: Windows | None,
    glossary: Glossary | None,
    negatives: ClipNegatives | None = None,
) -> GroupSet:
    """Variant groups of all terms that a batch, or the glossary's bank of negatives, may hold."""
    ours = groups.apply(table.term_groups_V[table.positive_term_places])
    others = windows.possible_terms() if windows else set()
    others |= set(glossary.terms) if glossary else set()
    others |= set(negatives.terms) if negatives else set()
    return GroupSet(np.concatenate([ours, np.array([groups[variant_group(term)] for term in others], dtype=np.int64)]))


def recipe_file(recipe: Recipe) -> int:
    """The recipe's arrays in a memory file; the descriptor is the caller's to close."""
    descriptor = anonymous_file("recipe")
    columns = {"maskable": recipe.maskable.sorted_M, "replaced": recipe.groups.replaced_R, "by": recipe.groups.by_R}
    if recipe.negatives is not None:
        columns |= {"mined_indptr": recipe.negatives.indptr, "mined": recipe.negatives.indices}
    with open(descriptor, "wb", closefd=False) as file:
        write_columns(file, columns)
    return descriptor


def recipe_spec(recipe: Recipe, tokenizer: tuple[str, str]) -> dict[str, Any]:
    """The rest of the recipe as JSON."""
    table, windows = recipe.table, recipe.windows
    return {
        "table": [table.name, table.shard_paths, table.shard_starts.tolist()],
        "settings": asdict(recipe.settings),
        **{name: getattr(recipe, name) for name in NUMBERS},
        "windows": None if windows is None else [[asdict(prompt) for prompt in windows.prompts], windows.occurrences],
        "mined": None if recipe.negatives is None else recipe.negatives.terms,
        "tokenizer": list(tokenizer),
    }


def restore_recipe(spec: dict[str, Any], files: dict[str, int]) -> Recipe:
    """The recipe out of `recipe_spec`, `recipe_file` and, for clips that are in no packed folder, `shared_table`."""
    name, shard_paths, shard_starts = spec["table"]
    table = ClipTable(map_columns(files.get("table", name), name), shard_paths, shard_starts, name)
    shared = map_columns(files["recipe"], "recipe")
    settings = DataSettings(**_with_tuples(spec["settings"]))
    windows = None
    if spec["windows"] is not None:
        prompts, occurrences = spec["windows"]
        windows = Windows([Prompt(**_with_tuples(prompt)) for prompt in prompts], (), settings)
        windows.occurrences = [[Found(*one) for one in found] for found in occurrences]
    negatives = None
    if spec["mined"] is not None:
        negatives = ClipNegatives(spec["mined"], shared["mined_indptr"], shared["mined"], 0, 0)
    return Recipe(
        table=table,
        settings=settings,
        windows=windows,
        negatives=negatives,
        groups=GroupMap(dict(zip(shared["replaced"].tolist(), shared["by"].tolist(), strict=True))),
        maskable=GroupSet(shared["maskable"], is_sorted=True),
        **{field: spec[field] for field in NUMBERS},
    )


def _with_tuples(values: dict[str, Any]) -> dict[str, Any]:
    """JSON knows no tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}
