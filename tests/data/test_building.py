import numpy as np
import pytest

from data.building import Builder
from data.clips import iterate_clips
from data.drops import DropLog
from data.groups import GroupMap
from data.packing import pack_clips
from data.reader import AudioReader
from data.recipe import Recipe, maskable_groups, shared_table
from data.shards import open_packed


@pytest.fixture
def tables(wav, record, samples, settings, tmp_path):
    """The same clips, loose and packed."""
    rows = []
    for number in range(40):
        wav(f"{number}.wav", seconds=0.1 + 0.01 * number, hertz=200 + 10 * number)
        terms = ["press", f"Term {number % 5}"] if number % 4 else []
        text = f"press term {(number + 1) % 5}" if number % 5 else ""
        rows.append(
            record(
                segment_id=f"s{number}",
                term_chunk_audio=f"{number}.wav",
                term_chunk_text=text,
                term_chunk_audio_ground_truth_terms=terms,
                partial_terms=["partly"],
            )
        )
    path = samples(rows)
    drops = DropLog()
    pack_clips(iterate_clips(path, settings, drops), tmp_path / "packed", drops)
    packed = open_packed(tmp_path / "packed")
    # Loose clips have durations after their header check; here they have those of the packed ones.
    loose = [packed.as_listed(row) for row in range(len(packed))]
    return shared_table(loose)[1], packed


def builder(table, settings, tokenize, rank=0, world_size=1):
    groups = GroupMap()
    maskable = maskable_groups(table, groups, None, None)
    recipe = Recipe(table, settings, 16, 0, rank, world_size, 0, None, None, groups, maskable)
    return Builder(recipe, tokenize, AudioReader(), DropLog())


@pytest.mark.parametrize("world_size", [1, 3])
def test_packed_clips_make_the_batches_that_loose_ones_make(tables, settings, tokenize, world_size):
    settings.augment_gain_db = 3.0
    one, other = (builder(table, settings, tokenize, world_size - 1, world_size) for table in tables)
    for step in range(2):
        loose, packed = one.build(1, step), other.build(1, step)
        assert loose.ign_groups.size > len(loose.pos_terms), "terms that a text speaks are among the ignored ones"
        for name, value in vars(loose).items():
            np.testing.assert_array_equal(getattr(packed, name), value, err_msg=name)


def test_the_samples_go_where_they_are_wanted(tables, settings, tokenize):
    room = np.zeros(100_000, dtype=np.int16)
    batch = builder(tables[1], settings, tokenize).build(0, 0, lambda count: room[:count])
    assert batch.pcm_S.base is room
    assert batch.pcm_S.any()
