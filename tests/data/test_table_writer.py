import io

import numpy as np
import pytest

from data.clip import Clip
from data.columns import StringSpool
from data.table_writer import TableWriter, Vocabulary, joined_rows, rows_of
from data.terms import key64, normalise_term, run_groups


@pytest.fixture
def clips(clip) -> list[Clip]:
    """Twenty clips with terms that come again, in other clips and under other surfaces."""
    made = []
    for number in range(20):
        terms, ignored = (f"term {number % 3}", f"键 {number % 7}")[: number % 3], (f"term {number % 5}",)
        changes = {"start_s": None if number % 2 else 0.5, "speaker": "ann" * (number % 2), "ignored": ignored}
        changes["surfaces"] = tuple(term.title() for term in terms)
        made.append(clip(f"c{number}", f"{number}.wav", f"Text of term {number % 4}, long", terms, **changes))
    return made


def written(blocks: list[dict[str, np.ndarray]], **kind: bool) -> bytes:
    writer, file = TableWriter(**kind), io.BytesIO()
    for block in blocks:
        writer.extend(block)
    writer.write(file)
    return file.getvalue()


@pytest.mark.parametrize("size", [1, 3, 20])
def test_blocks_of_any_size_joined_or_not_give_the_same_bytes(clips, size):
    def block(first: int, count: int) -> dict[str, np.ndarray]:
        numbers = np.arange(first, first + count)
        places = {"sample_start": numbers * 9, "num_samples": numbers + 1, "audio_key": numbers}
        return rows_of(clips[first : first + count], packed=True) | places

    blocks = [block(first, min(size, 20 - first)) for first in range(0, 20, size)]
    whole = written([block(0, 20)], packed=True)
    assert written(blocks, packed=True) == whole
    assert written([joined_rows(blocks)], packed=True) == whole
    assert written([rows_of([]), rows_of(clips)]) == written([rows_of(clips)]), "a block may be empty"


def test_a_block_holds_the_keys_and_the_word_runs_of_its_clips(clips):
    rows = rows_of(clips, packed=True)
    texts = [normalise_term(clip.text) for clip in clips]
    assert rows["text_key"].tolist() == [key64(text) for text in texts]
    assert rows["path_key"].tolist() == [key64(clip.audio_path) for clip in clips]
    assert rows["spoken_groups"].tolist() == [group for text in texts for group in run_groups(text)]
    assert len(rows["term_key"]) == len(set(rows["term_key"].tolist())), "each term once"


def test_a_vocabulary_numbers_equal_strings_alike_in_order_of_appearance():
    vocabulary, out = Vocabulary(), StringSpool()
    for words in (["b", "a"], [], ["c", "b"], ["键", "a"]):
        encoded = [word.encode() for word in words]
        content, sizes = np.frombuffer(b"".join(encoded), np.uint8), np.array(list(map(len, encoded)), np.int64)
        columns = {"word_bytes": content, "word_sizes": sizes, "word_key": np.array(list(map(key64, words)), np.int64)}
        first = vocabulary.extend(columns, "word")
    assert first == 4
    places, settled = vocabulary.settle(out), out.settled()
    assert [settled[row] for row in range(len(settled))] == ["b", "a", "c", "键"]
    assert places.tolist() == [0, 1, 2, 0, 3, 1]
