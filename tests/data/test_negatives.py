"""Mined negatives: what a file may hold, whose clip a line is, what a clip is never given."""

import json
from pathlib import Path

import numpy as np
import pytest

from data.clips import Clip
from data.drops import DropLog
from data.glossary import Entry, Glossary
from data.negatives import load_hard_negatives, match_negatives, terms_sha256


def clip(clip_id: str, audio_path: str, terms: tuple[str, ...] = (), text: str = "", ignored: tuple[str, ...] = ()):
    return Clip(clip_id, audio_path, None, None, text, terms, ignored, terms, not terms, "test")


def write(path: Path, *lines: object) -> Path:
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_a_stamped_file_and_a_bare_one_are_read(tmp_path: Path) -> None:
    lines = [{"audio_key": "a", "hard_negs": ["Artisan ", "MODESTO", "artisan"]}, {"audio_key": "b", "hard_negs": []}]
    bare = load_hard_negatives(write(tmp_path / "bare.jsonl", *lines), DropLog())
    stamped = load_hard_negatives(write(tmp_path / "x.jsonl", {"model_sha256": "m"}, *lines), DropLog())
    assert bare.stamp == {}
    assert stamped.stamp == {"model_sha256": "m"}
    for found in (bare, stamped):
        assert found.of("a") == ["artisan", "modesto"]
        assert found.of("b") == []
        assert found.of("c") is None


def test_bad_lines_are_noted_and_an_empty_file_is_an_error(tmp_path: Path) -> None:
    drops = DropLog()
    lines = [
        {"audio_key": "a", "hard_negs": ["modesto", "x", "1234"]},
        {"audio_key": 3, "hard_negs": ["artisan"]},
        {"audio_key": "b", "hard_negs": "artisan"},
        {"audio_key": "a", "hard_negs": ["artisan"]},
    ]
    found = load_hard_negatives(write(tmp_path / "x.jsonl", *lines), drops)
    assert found.of("a") == ["artisan"]  # the last line counts
    assert drops.notes == {"bad_hard_negatives": 2, "unusable_hard_negative": 1, "repeated_hard_negatives": 1}
    with pytest.raises(ValueError, match="no hard negatives"):
        load_hard_negatives(write(tmp_path / "y.jsonl", {"audio_key": "a", "hard_negs": []}), drops)
    with pytest.raises(ValueError, match="nowhere"):
        load_hard_negatives(tmp_path / "nowhere.jsonl", drops)


def test_clips_are_found_by_id_path_or_unique_name_and_never_get_what_they_speak(tmp_path: Path) -> None:
    glossary = Glossary("g", [Entry("pound key", "pound key", aliases=["hash key"]), Entry("mailbox", "mailbox")])
    clips = [
        clip("a", "/x/1.wav", ("pound key",), "press the pound key for extensions"),
        clip("b", "/x/2.wav", ignored=("mail box",)),
        clip("c", "/x/3.wav"),
        clip("d", "/y/3.wav"),
        clip("e", "/x/5.wav"),
    ]
    negs = ["hash key", "Pound-Keys", "extension", "mailboxes", "keypad"]
    path = write(
        tmp_path / "x.jsonl", *({"audio_key": key, "hard_negs": negs} for key in ("a", "/x/2.wav", "3.wav", "5.wav"))
    )
    found = match_negatives(clips, load_hard_negatives(path, DropLog()), glossary)
    assert found.draw(0, 9, 0, 0) == ["mailboxes", "keypad"]  # alias, variant, spoken without a label
    assert found.draw(1, 9, 0, 0) == ["hash key", "pound-keys", "extension", "keypad"]  # "mail box" is cut
    assert found.draw(2, 9, 0, 0) == found.draw(3, 9, 0, 0) == []  # two files of that name
    assert len(found.draw(4, 9, 0, 0)) == 5
    assert (found.num_matched, found.num_refused) == (3, 4)


def test_draws_depend_on_seed_epoch_and_clip_alone_and_reach_every_term(tmp_path: Path) -> None:
    negs = [f"term {i:02d}x" for i in range(6)]
    path = write(tmp_path / "x.jsonl", {"audio_key": "a", "hard_negs": negs}, {"audio_key": "b", "hard_negs": negs})
    found = match_negatives([clip("a", "/1"), clip("b", "/2")], load_hard_negatives(path, DropLog()), None)
    assert found.draw(0, 2, 7, 3) == found.draw(0, 2, 7, 3)
    drawn = [tuple(found.draw(0, 2, 7, epoch)) for epoch in range(40)]
    assert all(len(set(two)) == 2 for two in drawn)
    assert {term for two in drawn for term in two} == set(negs)
    assert drawn != [tuple(found.draw(1, 2, 7, epoch)) for epoch in range(40)]
    assert found.indices.dtype == np.int32


def test_the_hash_of_terms_knows_order_and_bounds() -> None:
    assert len({terms_sha256(terms) for terms in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])}) == 4
