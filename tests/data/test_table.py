import numpy as np
import pytest

from data.columns import map_columns
from data.recipe import shared_table
from data.table import ClipTable, rows_shared_with, terms_of
from data.table_writer import TableWriter, rows_of
from data.terms import key64, run_groups, variant_group


@pytest.fixture
def clips(clip):
    return [
        clip("a", "x.wav", text="Press the pound key", terms=("pound key", "press"), start_s=0.5, end_s=2.0),
        clip("b", "键.wav", text=""),
        clip("c", "y.wav", text="pound", terms=("pound key",), ignored=("press", "other"), duration_s=1.25),
    ]


@pytest.fixture
def packed(clips, tmp_path):
    writer = TableWriter(tmp_path, packed=True)
    samples = {"sample_start": [0, 100, 200], "num_samples": [50] * 3, "audio_key": [1, 2, 3]}
    writer.extend(rows_of(clips, packed=True) | {name: np.array(values) for name, values in samples.items()})
    path = tmp_path / "index"
    with open(path, "wb") as file:
        writer.write(file)
    return map_columns(path)


def test_a_table_reads_like_the_list(clips):
    _, table = shared_table(clips)
    assert list(table) == clips
    assert table[-1] == clips[2]
    assert table[0:2] == clips[:2]
    with pytest.raises(IndexError):
        table[3]


def test_terms_are_stored_once_with_their_keys_and_groups(clips):
    _, table = shared_table(clips)
    terms = [table.terms[row] for row in range(len(table.terms))]
    assert terms == ["pound key", "press", "other"]
    assert table.term_keys_V.tolist() == [key64(term) for term in terms]
    assert table.term_groups_V.tolist() == [variant_group(term) for term in terms]
    assert terms_of(table) == terms_of(clips) == ["pound key", "press"], "an ignored term is no positive"
    assert table.is_no_term_C.tolist() == [False, True, False]


def test_a_packed_clip_lies_in_its_shard(packed, clips):
    table = ClipTable(packed, ["s0.pcm", "s1.pcm"], [0, 200, 250])
    assert table.shard_of(1) == ("s0.pcm", 100, 50)
    assert table.audio(1) == ("s0.pcm:200+100", None, None)
    assert table.audio(2) == ("s1.pcm:0+100", None, None)
    assert table.as_listed(0).audio_path == "x.wav"
    assert (table.as_listed(0).start_s, table.as_listed(0).end_s) == (0.5, 2.0)
    assert table.spoken_groups[: table.spoken_indptr[1]].tolist() == run_groups("press the pound key")


def test_an_index_that_reaches_beyond_the_shards_is_refused(packed):
    with pytest.raises(ValueError, match="reach to sample 250, the shards hold 240"):
        ClipTable(packed, ["s0.pcm"], [0, 240])


def test_columns_that_do_not_fit_one_another_are_refused(packed):
    with pytest.raises(ValueError, match="no column text_key"):
        ClipTable({name: column for name, column in packed.items() if name != "text_key"}, ["s"], [0, 250])
    with pytest.raises(ValueError, match=r"have sizes \{'duration_s': 2\}"):
        ClipTable({**packed, "duration_s": packed["duration_s"][:2]}, ["s"], [0, 250])


def test_rows_that_other_clips_share_are_found_by_keys(packed, clip):
    table = ClipTable(packed, ["s"], [0, 250])
    near, rows = rows_shared_with(table, [clip("b", "else.wav"), clip("z", "y.wav")], [3, 9])
    assert [found.clip_id for found in near] == ["b", "c"]
    assert near[1].audio_path == "y.wav"
    assert rows == [2]


def damaged(table, **columns):
    return ClipTable({**table.columns, **columns}, ["a"], [0, 1 << 40])


def test_a_damaged_row_is_refused_when_it_is_read(clips):
    _, table = shared_table(clips)
    far = np.full_like(table.columns["positive_terms"], 1 << 30)
    with pytest.raises(ValueError, match="the index is damaged"):
        list(damaged(table, positive_terms=far))
    with pytest.raises(ValueError, match="the index is damaged"):
        damaged(table, positive_terms=far).positive_term_places  # noqa: B018 - reading it is the test
    with pytest.raises(ValueError, match="the index is damaged"):
        list(damaged(table, positive_surfaces=-far))
    ends = table.columns["positive_indptr"].copy()
    ends[1:] += 1 << 20
    with pytest.raises(ValueError, match="the index is damaged"):
        list(damaged(table, positive_indptr=ends))


def test_columns_of_another_kind_or_half_of_those_of_packed_clips_are_refused(clips):
    _, table = shared_table(clips)
    with pytest.raises(ValueError, match="positive_terms"):
        damaged(table, positive_terms=table.columns["positive_terms"].astype(np.float32))
    with pytest.raises(ValueError, match="num_samples"):
        damaged(table, sample_start=np.zeros(len(table), np.int64))
