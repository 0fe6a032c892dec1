"""Ids without special tokens, from bytes and from a checkpoint's folder."""

import importlib.util
from pathlib import Path

import pytest

from model.tokenizer import ByteTokenizer, CheckpointTokenizer


def test_bytes_round_trip_and_leave_id_0_free():
    tokenizer = ByteTokenizer()
    texts = ["Artesia", "Zürich 東京", "a"]
    ids = tokenizer(texts)
    assert [bytes(i - 1 for i in row).decode() for row in ids] == texts
    assert min(map(min, ids)) >= 1
    assert max(ByteTokenizer()([chr(0x10FFFF)])[0]) < tokenizer.vocab_size == 257


def test_a_folder_with_only_the_two_tokenizer_files(qwen2_folder, tmp_path):
    folder = tmp_path / "tokenizer-only"
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((qwen2_folder / name).read_bytes())
    tokenizer = CheckpointTokenizer(folder)
    ids = tokenizer(["hehe", "he", "x"])
    assert ids[:2] == [[256, 256], [256]], "no special tokens, no chat template, no padding"
    assert len(ids[2]) == 1
    assert tokenizer.vocab_size == 258
    assert tokenizer([]) == []
    # The same beside a whole checkpoint.
    assert CheckpointTokenizer(qwen2_folder)(["hehe"]) == [[256, 256]]


@pytest.mark.parametrize("kind", ["bytes", "checkpoint"])
def test_an_empty_string_is_named(kind, qwen2_folder):
    tokenizer = ByteTokenizer() if kind == "bytes" else CheckpointTokenizer(qwen2_folder)
    with pytest.raises(ValueError, match=r"texts\[1\]: got '', which has no tokens"):
        tokenizer(["he", ""])


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"tokenizer: no tokenizer.json in .*add it from"):
        CheckpointTokenizer(tmp_path)


def test_bytes_need_no_transformers():
    """Its import takes seconds, and byte-level towers never use it."""
    spec = importlib.util.find_spec("model.tokenizer")
    assert spec is not None
    top_level = [
        line for line in Path(str(spec.origin)).read_text().splitlines() if line.startswith(("import", "from"))
    ]
    assert not [line for line in top_level if "transformers" in line]
