import numpy as np
import pytest

from data.batches import collate
from data.glossary import Entry, Glossary
from data.terms import key64, variant_group


def pcm(length, value=1):
    return np.full(length, value, dtype=np.int16)


@pytest.fixture
def batch(clip, tokenize):
    clips = [
        clip("0", text="press the pound key", terms=("pound key", "pound")),
        clip("1", text=""),
        clip("2", text="pound", terms=("pound",), ignored=("key",)),
        clip("3", text="Press the  Pound key"),
        clip("4", text="press the pound key", terms=("pound key",)),
    ]
    return collate(clips, [pcm(10), pcm(20, 2), pcm(30), pcm(5), pcm(5)], tokenize)


def test_audio_is_packed_one_after_another(batch):
    assert batch.pcm_S.dtype == np.int16
    assert batch.num_samples == [10, 20, 30, 5, 5]
    assert len(batch.pcm_S) == 70
    assert set(batch.pcm_S[10:30]) == {2}
    assert batch.clip_ids == ["0", "1", "2", "3", "4"]
    assert batch.is_no_term_B.tolist() == [False, True, False, True, False]


def test_strings_are_the_texts_then_the_unique_terms(batch):
    strings = ["press the pound key", "pound", "Press the  Pound key", "pound key", "pound"]
    assert batch.num_texts == 3
    assert batch.terms == ["pound key", "pound"]
    assert batch.token_lengths == [len(string) for string in strings]
    assert bytes(batch.token_ids_P.tolist()).decode() == "".join(strings)


def test_texts_share_rows_when_written_alike_and_keys_when_meant_alike(batch):
    assert batch.text_row_B.tolist() == [0, -1, 1, 2, 0], "an empty text gets no row"
    assert batch.text_keys_B[1] == 0
    assert batch.text_keys_B[0] == batch.text_keys_B[3] == batch.text_keys_B[4] == key64("press the pound key")
    assert batch.text_keys_B[2] == key64("pound")


def test_positives_and_ignored_are_compressed_rows(batch):
    assert batch.pos_indptr_B1.tolist() == [0, 2, 2, 3, 3, 4]
    assert batch.pos_terms.tolist() == [0, 1, 1, 0]
    assert batch.term_keys_N.tolist() == [key64("pound key"), key64("pound")]
    assert batch.term_groups_N.tolist() == [variant_group("pound key"), variant_group("pound")]
    rows = [
        set(batch.ign_groups[a:b].tolist())
        for a, b in zip(batch.ign_indptr_B1[:-1], batch.ign_indptr_B1[1:], strict=True)
    ]
    key, pound, both = variant_group("key"), variant_group("pound"), variant_group("pound key")
    assert rows == [{both, pound}, set(), {pound, key}, set(), {both}], (
        "variants of positives are masked as cut terms are"
    )


def test_integers_are_64_bit(batch):
    for name in (
        "token_ids_P",
        "text_row_B",
        "text_keys_B",
        "term_keys_N",
        "term_groups_N",
        "pos_indptr_B1",
        "pos_terms",
    ):
        assert getattr(batch, name).dtype == np.int64, name
    assert all(type(length) is int for length in batch.num_samples + batch.token_lengths)


def test_aliases_of_the_glossary_are_variants(clip, tokenize):
    glossary = Glossary("g", [Entry("pound key", "pound key", aliases=["hash"])])
    batch = collate([clip("0", terms=("hash",))], [pcm(10)], tokenize, glossary)
    assert batch.term_groups_N.tolist() == [variant_group("pound key")]


def test_a_batch_without_any_string(clip, tokenize):
    batch = collate([clip("0", text="")], [pcm(10)], tokenize)
    assert (batch.num_texts, batch.num_terms, batch.token_lengths) == (0, 0, [])
    assert batch.token_ids_P.shape == (0,)
    assert batch.pos_indptr_B1.tolist() == [0, 0]


def test_a_string_without_tokens_is_an_error(clip):
    with pytest.raises(ValueError, match="no token for 'press the pound key'"):
        collate([clip("0")], [pcm(10)], lambda strings: [[] for _ in strings])


def test_terms_that_the_text_speaks_unlabelled_are_no_negatives(clip, tokenize):
    names = ("pound key", "press", "asterisk", "touch-tone")
    maskable = {variant_group(name) for name in names}
    clips = [clip("0", text="Press the pound keys", terms=()), clip("1", text="touchtone, asterisks", terms=())]
    batch = collate(clips, [pcm(10), pcm(10)], tokenize, maskable=maskable)
    rows = np.split(batch.ign_groups, batch.ign_indptr_B1[1:-1])
    assert set(rows[0].tolist()) == {variant_group("press"), variant_group("pound key")}
    assert set(rows[1].tolist()) == {variant_group("touch-tone"), variant_group("asterisk")}
    assert collate(clips, [pcm(10), pcm(10)], tokenize).ign_groups.tolist() == []


def test_aliases_that_the_text_speaks_count_too(clip, tokenize):
    glossary = Glossary("g", [Entry("pound key", "pound key", aliases=["hash"])])
    pound_key = variant_group("pound key")
    batch = collate([clip("0", text="press hash")], [pcm(10)], tokenize, glossary, maskable={pound_key})
    assert batch.ign_groups.tolist() == [pound_key]
