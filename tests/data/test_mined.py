"""Mined negatives by clip: whose a line is, what a clip is never given, what is drawn."""

import numpy as np

from data.clips import Clip
from data.glossary import Entry, Glossary
from data.mined import match_negatives, terms_sha256


def clip(clip_id: str, audio_path: str, terms: tuple[str, ...] = (), text: str = "", ignored: tuple[str, ...] = ()):
    return Clip(clip_id, audio_path, None, None, text, terms, ignored, terms, not terms, "test")


def test_clips_are_found_by_id_path_or_unique_name_and_never_get_what_they_speak() -> None:
    glossary = Glossary("g", [Entry("pound key", "pound key", aliases=["hash key"]), Entry("mailbox", "mailbox")])
    clips = [
        clip("a", "/x/1.wav", ("pound key",), "press the pound key for extensions"),
        clip("b", "/x/2.wav", ignored=("mail box",)),
        clip("c", "/x/3.wav"),
        clip("d", "/y/3.wav"),
        clip("e", "/x/5.wav"),
    ]
    negs = ("hash key", "pound-keys", "extension", "mailboxes", "keypad")
    found = match_negatives(clips, dict.fromkeys(("a", "/x/2.wav", "3.wav", "5.wav"), negs), glossary)
    assert found.draw(0, 9, 0, 0) == ["mailboxes", "keypad"]  # alias, variant, spoken without a label
    assert found.draw(1, 9, 0, 0) == ["hash key", "pound-keys", "extension", "keypad"]  # "mail box" is cut
    assert found.draw(2, 9, 0, 0) == found.draw(3, 9, 0, 0) == []  # two files of that name
    assert len(found.draw(4, 9, 0, 0)) == 5
    assert (found.num_matched, found.num_refused) == (3, 4)


def test_draws_depend_on_seed_epoch_and_clip_alone_and_reach_every_term() -> None:
    negs = tuple(f"term {i:02d}x" for i in range(6))
    found = match_negatives([clip("a", "/1"), clip("b", "/2")], {"a": negs, "b": negs}, None)
    assert found.draw(0, 2, 7, 3) == found.draw(0, 2, 7, 3)
    drawn = [tuple(found.draw(0, 2, 7, epoch)) for epoch in range(40)]
    assert all(len(set(two)) == 2 for two in drawn)
    assert {term for two in drawn for term in two} == set(negs)
    assert drawn != [tuple(found.draw(1, 2, 7, epoch)) for epoch in range(40)]
    assert found.indices.dtype == np.int32


def test_the_hash_of_terms_knows_order_and_bounds() -> None:
    assert len({terms_sha256(terms) for terms in (["ab", "c"], ["a", "bc"], ["c", "ab"], ["ab", "c", ""])}) == 4
