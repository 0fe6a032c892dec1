import gzip
import io
import json
import os
import time

import pytest

from data.records import MAX_DEPTH, DepthGuard, find_file, iterate_array_in, iterate_records, keys_at_start


def read(path):
    return [record for _, record in iterate_records(path)]


@pytest.mark.parametrize("content", ['[{"a": 1}, {"a": 2.5}]', '{"a": 1}\n\n{"a": 2.5}\n', '\n  {"a": 1}\n{"a": 2.5}'])
def test_arrays_and_lines_read_alike(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert list(iterate_records(path)) == [(0, {"a": 1}), (1, {"a": 2.5})]


@pytest.mark.parametrize("content", ['[{"a": "é"}]', '{"a": "é"}\n'])
def test_a_byte_order_mark_is_skipped(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(content, encoding="utf-8-sig")
    assert read(path) == [{"a": "é"}]


def test_an_array_is_streamed_not_loaded_whole(tmp_path):
    path = tmp_path / "x.json"
    path.write_text("[" + ",".join(['{"a": 1}'] * 100_000) + ", broken")  # the end is never reached
    records = iterate_records(path)
    assert next(records) == (0, {"a": 1})
    records.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty"),
        (b" \n ", "the file is empty"),
        (b'[{"a": 1}, {"a"', "ends in the middle .* at record 1"),
        (b'[{"a": 1}', "ends in the middle"),
        (b'[{"a": NaN}]', "is not JSON at record 0"),
        (b'{"a": 1}\n{"a": NaN}\n', "line 2 is not JSON: NaN is not a JSON number"),
        (b'{"a": 1}\n{"a": Infinity}\n', "Infinity is not a JSON number"),
        (b'{"a": 1}\n{"a": ', "line 2 is not JSON.*may be cut off"),
        (b'{"a": 1}\n{"a": \xff}\n', "line 2"),
        (b'{\n "s1": {"a": 1}\n}', "one JSON object over several lines; expected an array"),
        (b"segment_id,term\n", "expected a JSON array"),
        (b'"text"', "expected a JSON array"),
        (b"RIFF....", "expected a JSON array"),
        ("[]".encode("utf-16"), "UTF-16; save it as UTF-8"),
        (b'[{"a": 1}][{"a": 2}]', "trailing garbage"),
        (b'[{"a": 1,}]', "is not JSON"),
        (b"{" + b'"a":[' * 100_000, "one JSON object over several lines"),
    ],
)
def test_files_that_are_not_records_are_refused_with_the_place(tmp_path, content, message):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read(path)


@pytest.mark.parametrize("opening", [b"[", b'{"a":', b'[{"a":', b'[{"s": "]]]", "a":'])
def test_lists_nested_100_000_deep_are_refused_at_once(tmp_path, opening):
    # Without a guard this took all memory: the parser's path to each level grows with the level.
    path = tmp_path / "x.json"
    path.write_bytes(b"[" + opening * 100_000)
    start = time.monotonic()
    with pytest.raises(ValueError, match=rf"nested more than {MAX_DEPTH} deep"):
        read(path)
    assert time.monotonic() - start < 30, "it hangs"
    path.write_bytes(b'{"audios": ' + opening * 100_000)
    with pytest.raises(ValueError, match=rf"nested more than {MAX_DEPTH} deep"):
        list(iterate_array_in(path, "audios"))


def test_lines_nested_too_deep_are_refused_too(tmp_path):
    path = tmp_path / "x.jsonl"
    good = json.dumps({"text": "[{" * 500})
    path.write_text(good + "\n" + '{"a":' + "[" * 300 + "]" * 300 + "}\n")
    with pytest.raises(ValueError, match=rf"line 2 is not JSON: .*nested more than {MAX_DEPTH} deep"):
        read(path)
    path.write_text(good + "\n")
    assert read(path) == [json.loads(good)]


@pytest.mark.parametrize("buffer", [1, 2, 3, 7, 64])
def test_brackets_within_strings_do_not_count(buffer):
    # Depth 3 at most, whatever the strings hold and wherever a read ends.
    strange = json.dumps([{"a": "[" * 500 + '\\"[{' * 500 + "\\", "b": ["\\\\", '"[[['], "c[[[": "\\"}] * 3).encode()
    guard = DepthGuard(io.BytesIO(strange))
    assert b"".join(iter(lambda: guard.read(buffer), b"")) == strange
    assert guard._depth == 0
    deep = DepthGuard(io.BytesIO(b'["]]]"' + b"[" * MAX_DEPTH))
    with pytest.raises(ValueError, match="nested more than"):
        list(iter(lambda: deep.read(buffer), b""))


@pytest.mark.parametrize("content", [b'[{"a": 1}, {"a": 2}]', b'\xef\xbb\xbf{"a": 1}\n{"a": 2}\n'])
def test_gzip_is_unpacked(tmp_path, content):
    path = tmp_path / "x.jsonl.gz"
    path.write_bytes(gzip.compress(content))
    assert read(path) == [{"a": 1}, {"a": 2}]
    path.write_bytes(gzip.compress(content)[:-10])
    with pytest.raises(ValueError, match="cannot be read"):
        read(path)


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("data.records.MAX_LINE_BYTES", 100)
    path = tmp_path / "x.jsonl"
    path.write_text(json.dumps({"a": "x" * 50}) + "\n" + json.dumps({"a": "x" * 500}) + "\n")
    with pytest.raises(ValueError, match="line 2 is longer than 100 bytes"):
        read(path)


def test_a_fifo_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "x.json")
    with pytest.raises(ValueError, match="not a file, but a folder, pipe or device"):
        read(tmp_path / "x.json")


def test_an_array_within_an_object(tmp_path):
    path = tmp_path / "x.json"
    path.write_text(json.dumps({"name": "x", "other": [1], "audios": [{"a": 1.5}, 2]}))
    assert list(iterate_array_in(path, "audios")) == [(0, {"a": 1.5}), (1, 2)]


@pytest.mark.parametrize(
    ("content", "keys"),
    [
        ('[{"a": {"x": [1]}, "b": [{"y": 1}]}, 5, {"c": 1}]', [{"a", "b"}, {"c"}]),
        ('{"a": 1}\n{"b": 2}\n', [{"a"}, {"b"}]),
        ('{"a": 1, "b": [{"c": 1}, ', [{"a", "b"}]),
        ('[{"a": 1}, {"b": NaN, "c": 1}]', [{"a"}, {"b"}]),
        ("[5, []]", []),
    ],
)
def test_the_keys_of_the_first_objects(tmp_path, content, keys):
    path = tmp_path / "x.json"
    path.write_text(content)
    assert [set(some) for some in keys_at_start(path)] == keys


def test_a_missing_file_and_a_folder_are_value_errors(tmp_path):
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path / "none.json")
    with pytest.raises(ValueError, match="cannot be read"):
        read(tmp_path)


def test_files_are_looked_for_as_given_and_then_under_the_data_root(tmp_path, monkeypatch):
    (tmp_path / "root" / "data").mkdir(parents=True)
    (tmp_path / "root" / "data" / "x.json").write_text(json.dumps([]))
    monkeypatch.chdir(tmp_path)
    found = find_file("data/x.json", str(tmp_path / "root"), "--train_samples_path")
    assert found == tmp_path / "root" / "data" / "x.json"


def test_a_missing_default_file_names_the_flag_to_set(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=r"Set --train_samples_path to the file, or --data_root") as caught:
        find_file("data/xl_term_level_chunks_merged.json", str(tmp_path / "root"), "--train_samples_path")
    assert str(tmp_path / "root" / "data") in str(caught.value)
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="a folder; it must name a file"):
        find_file("folder", ".", "--test_samples_path")
    assert find_file("folder", ".", "--test_samples_path", or_folder=True).is_dir()
