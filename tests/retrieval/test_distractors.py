"""Draws are the same everywhere, nested, and free of what would be right."""

import random
from pathlib import Path

import pytest

from data.glossary import load_glossary
from data.terms import variant_group
from retrieval.distractors import check_sizes, draw_distractors, gold_first, in_draw_order, part_sizes

WORDS = [f"word {i}" for i in range(50)]


def test_order_depends_on_terms_and_seed_alone() -> None:
    shuffled = WORDS.copy()
    random.Random(0).shuffle(shuffled)
    assert in_draw_order(shuffled + shuffled) == in_draw_order(WORDS) != sorted(WORDS)
    assert in_draw_order(WORDS, seed=1) != in_draw_order(WORDS)
    assert in_draw_order(["beta", "alpha", "gamma"]) == ["beta", "gamma", "alpha"]  # the same on every machine


def test_right_terms_come_first() -> None:
    ordered = gold_first(WORDS, {"word 3", "word 40", "elsewhere"})
    assert set(ordered[:2]) == {"word 3", "word 40"}
    assert ordered[2:] == [term for term in in_draw_order(WORDS) if term not in ordered[:2]]


@pytest.mark.parametrize(
    ("num_gold", "num_terms", "expected"),
    [(53, 96, [96]), (53, 20_000, [100, 1000, 10_000, 20_000]), (100, 1000, [100, 1000]), (150, 200, [200])],
)  # fmt: skip
def test_parts_of_a_glossary(num_gold: int, num_terms: int, expected: list[int]) -> None:
    assert part_sizes(num_gold, num_terms) == expected


def test_draws_are_nested_and_hold_no_variant_of_a_right_term(tmp_path: Path) -> None:
    path = tmp_path / "words.txt"
    path.write_text("\n".join([*WORDS, "Mailboxes", "mail-box", "word 3"]))
    candidates = load_glossary(path)
    gold = {variant_group("mailbox")}
    glossary = ["mailbox", "word 3"]
    drawn = draw_distractors(candidates, glossary, gold, 49)
    assert drawn[:10] == draw_distractors(candidates, glossary, gold, 10)
    assert set(drawn) == {*WORDS} - {"word 3"}
    with pytest.raises(ValueError, match=r"distractor_sizes: got 50, but .*words.txt holds 49 of 52 terms"):
        draw_distractors(candidates, glossary, gold, 50)


def test_an_alias_of_a_right_term_is_no_distractor(tmp_path: Path) -> None:
    path = tmp_path / "aliases.json"
    path.write_text('{"voice mail box": {"term": "mailbox"}, "pound key": {}}')
    candidates = load_glossary(path)
    assert draw_distractors(candidates, [], {candidates.group("mailbox")}, 1) == ["pound key"]


def test_sizes_are_checked() -> None:
    assert check_sizes([10, 5, 10]) == [5, 10]
    with pytest.raises(ValueError, match=r"distractor_sizes: got \[0\]; allowed: numbers of 1 and above"):
        check_sizes([0])
