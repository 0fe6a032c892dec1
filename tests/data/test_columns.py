import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from data.columns import Spool, Strings, StringSpool, map_columns, write_columns


@pytest.fixture
def written(tmp_path):
    """A file of three columns, one of them grown."""
    words = StringSpool(tmp_path)
    for word in ("pound", "", "键"):
        words.append(word)
    grown = Spool(np.int64, tmp_path)
    for value in range(200_000):  # more than is kept in memory
        grown.append(value)
    grown.extend([-1, 7])
    path = tmp_path / "columns.safetensors"
    with open(path, "wb") as file:
        write_columns(file, {"floats": np.array([[0.5, np.nan]]), "grown": grown, **words.columns("word")})
    return path


def test_columns_come_back_mapped(written):
    columns = map_columns(written)
    np.testing.assert_array_equal(columns["floats"], [[0.5, np.nan]])
    np.testing.assert_array_equal(columns["grown"], [*range(200_000), -1, 7])
    assert not columns["grown"].flags.writeable
    assert columns["grown"].ctypes.data % 8 == 0
    words = Strings(columns, "word")
    assert [words[row] for row in range(len(words))] == ["pound", "", "键"]


def test_the_library_reads_our_files_and_we_read_its(written, tmp_path):
    theirs = load_file(written)
    for name, column in map_columns(written).items():
        np.testing.assert_array_equal(column, theirs[name])
    save_file({"a": np.arange(5), "b": np.zeros((2, 0), np.float64)}, tmp_path / "theirs.safetensors")
    ours = map_columns(tmp_path / "theirs.safetensors")
    np.testing.assert_array_equal(ours["a"], np.arange(5))
    assert ours["b"].shape == (2, 0)


def test_a_file_that_is_cut_off_or_missing_is_refused(written, tmp_path):
    content = written.read_bytes()
    for size in (0, 7, 50, len(content) - 1):
        (tmp_path / "cut").write_bytes(content[:size])
        with pytest.raises(ValueError, match="cut: "):
            map_columns(tmp_path / "cut")
    with pytest.raises(ValueError, match="cannot be read"):
        map_columns(tmp_path / "absent")


@pytest.mark.parametrize(
    "entry",
    [
        {"dtype": "F16", "shape": [1], "data_offsets": [0, 2]},
        {"dtype": "I64", "shape": [2], "data_offsets": [0, 8]},
        {"dtype": "I64", "shape": [-1], "data_offsets": [8, 0]},
        {"dtype": "U8", "shape": [1 << 62, 4], "data_offsets": [0, 1 << 64]},
        {"dtype": "U8", "shape": [99], "data_offsets": [0, 99]},
        {"dtype": "U8", "shape": "no", "data_offsets": [0, 9]},
        {"dtype": "U8"},
        [],
    ],
)
def test_a_header_that_lies_is_refused(tmp_path, entry):
    text = json.dumps({"a": entry}).encode()
    (tmp_path / "lies").write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
    with pytest.raises(ValueError, match="not a safetensors file of columns"):
        map_columns(tmp_path / "lies")


@given(st.binary(max_size=80), st.integers(0, 60))
def test_bytes_at_random_are_refused_or_read(content, declared):
    import os

    from data.slots import anonymous_file

    descriptor = anonymous_file("fuzz")
    try:
        os.write(descriptor, declared.to_bytes(8, "little") + content)
        try:
            map_columns(descriptor, "fuzz")
        except ValueError:
            return
    finally:
        os.close(descriptor)


def test_a_damaged_table_of_strings_is_told(written):
    columns = dict(map_columns(written))
    with pytest.raises(ValueError, match="does not end where its bytes do"):
        Strings({**columns, "word_indptr": columns["word_indptr"][:-1]}, "word")
    backwards = np.array([0, 6, 5, 8])
    with pytest.raises(ValueError, match="bytes 6 to 5 of 8: the index is damaged"):
        Strings({**columns, "word_indptr": backwards}, "word")[1]
    with pytest.raises(ValueError, match="not UTF-8"):
        Strings({**columns, "word_indptr": np.array([0, 6, 7, 8])}, "word")[1]
