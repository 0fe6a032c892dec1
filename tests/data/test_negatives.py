"""The file of mined negatives: stamped or bare, and what of it is usable."""

import json
from pathlib import Path

import pytest

from data.drops import DropLog
from data.negatives import load_hard_negatives, read_stamp


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_stamped_file_and_a_bare_one_are_read(tmp_path: Path) -> None:
    lines = [{"audio_key": "a", "hard_negs": ["Artisan ", "MODESTO", "artisan"]}, {"audio_key": "b", "hard_negs": []}]
    bare = write(tmp_path / "bare.jsonl", *lines)
    stamped = write(tmp_path / "x.jsonl", {"model_sha256": "m", "glossary_sha256": "g", "num_clips": 2}, *lines)
    assert read_stamp(bare) == {}
    assert read_stamp(stamped) == {"model_sha256": "m", "glossary_sha256": "g"}
    for path in (bare, stamped):
        assert load_hard_negatives(path, DropLog()) == {"a": ("artisan", "modesto"), "b": ()}


def test_bad_lines_are_dropped_and_a_file_of_none_else_is_an_error(tmp_path: Path) -> None:
    drops = DropLog()
    bad = [{"audio_key": 3, "hard_negs": ["artisan"]}, {"audio_key": "b", "hard_negs": "artisan"}, ["a"]]
    good = {"audio_key": "a", "hard_negs": ["modesto", "x", "1234"]}
    assert load_hard_negatives(write(tmp_path / "x.jsonl", good, *bad), drops) == {"a": ("modesto",)}
    assert (drops.num_seen, drops.num_dropped, sum(drops.notes.values())) == (4, 3, 2)
    with pytest.raises(ValueError, match="no usable line"):
        load_hard_negatives(write(tmp_path / "y.jsonl", {"model_sha256": "m"}), DropLog())
