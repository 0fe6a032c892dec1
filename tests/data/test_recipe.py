import json
import os

import numpy as np

from data.building import Builder
from data.drops import DropLog
from data.glossary import Entry, Glossary
from data.groups import GroupMap
from data.mined import match_negatives
from data.reader import AudioReader
from data.recipe import Recipe, maskable_groups, recipe_file, recipe_spec, restore_recipe, shared_table
from data.terms import variant_group
from data.timed_words import Prompt
from data.windows import Windows


def test_a_restored_recipe_makes_the_same_batches(clip, wav, settings, tokenize):
    """With all that can be in one: windows, mined negatives, aliases, masked terms, tuples among the settings."""
    path = str(wav("prompt.wav", seconds=4.0))
    starts = tuple(0.4 * index for index in range(10))
    prompt = Prompt("p", path, 4.0, ("pound", "key") * 5, starts, tuple(start + 0.4 for start in starts))
    settings.augment_noise, settings.num_workers = 0.5, 1
    windows = Windows([prompt], ["pound key"], settings)
    glossary = Glossary("g", [Entry("pound key", "pound key", aliases=["hash"])])
    clips = [clip(f"c{n}", path, text="press hash", terms=("press",), start_s=0.1 * n, end_s=2.0) for n in range(6)]
    file, table = shared_table(clips)
    groups = GroupMap(glossary.replaced)
    negatives = match_negatives(clips, {"c1": ["pressed on", "presser", "pressure"], "c2": ["presser"]}, glossary)
    maskable = maskable_groups(table, groups, windows, glossary, negatives)
    known = {"press", "pound key", "pressed on", "presser", "pressure"}
    assert set(maskable.sorted_M.tolist()) == {variant_group(term) for term in known}
    recipe = Recipe(table, settings, 4, 7, 0, 2, 5, windows, negatives, groups, maskable)
    shared = recipe_file(recipe)
    spec = json.loads(json.dumps(recipe_spec(recipe, ("tests.data.tokens:restored", "ByteCodes"))))
    restored = restore_recipe(spec, {"recipe": shared, "table": file})
    assert restored.settings == settings
    assert restored.num_items == 11
    mined = 0
    made = [Builder(one, tokenize, AudioReader(), DropLog()) for one in (recipe, restored)]
    for step in range(3):
        one, other = (builder.build(3, step) for builder in made)
        assert (one.clip_ids, one.terms) == (other.clip_ids, other.terms)
        mined += len({"pressed on", "presser", "pressure"} & set(one.terms))
        for name in ("pcm_S", "token_ids_P", "term_groups_N", "pos_terms", "ign_groups"):
            np.testing.assert_array_equal(getattr(one, name), getattr(other, name))
    assert mined
    os.close(shared)
    os.close(file)
