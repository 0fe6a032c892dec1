import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.phrases import Found, Phrases, words_of


def phrases(*terms):
    return Phrases({term.lower(): term for term in terms})


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Press the Pound-Key, please!", ["press", "the", "pound", "key", "please"]),
        ("it's AT&T’s C++ (U.S. only).", ["it's", "at&t’s", "c++", "u.s", "only"]),
        ("井号键 key", ["井", "号", "键", "key"]),
        ("שלום עולם", ["שלום", "עולם"]),
        ("café ＰＯＵＮＤ 🎧 42", ["café", "pound", "42"]),
        ("", []),
    ],
)
def test_words_have_neither_case_nor_punctuation(text, words):
    assert words_of(text) == words


def test_the_longest_match_wins_and_nested_ones_are_told_apart():
    taken, others = phrases("York", "New York", "york harbour", "New York Times").longest(
        words_of("in new york, the new york times of york harbour")
    )
    assert taken == [Found("new york", 1, 2), Found("new york times", 4, 6), Found("york harbour", 8, 9)]
    assert {one.term for one in others} == {"york", "new york"}


def test_every_match_is_listed_in_order():
    assert phrases("pound key", "pound", "key").all(["pound", "key"]) == [
        Found("pound", 0, 0),
        Found("pound key", 0, 1),
        Found("key", 1, 1),
    ]


def test_terms_of_a_text_are_as_the_glossary_writes_them():
    assert phrases("Pound Key", "pound", "井号键").in_text("Press the POUND-KEY: 井号键. Pound key") == (
        ["Pound Key", "井号键"],
        ["pound"],
    )


def test_a_longer_term_is_not_looked_for_beyond_the_last_word():
    assert phrases("pound key", "pound").all(["pound"]) == [Found("pound", 0, 0)]


def test_terms_without_a_word_match_nothing():
    assert phrases("---", "pound").all(["pound"]) == [Found("pound", 0, 0)]


@given(st.lists(st.sampled_from("abc"), max_size=12), st.sets(st.text("abc ", min_size=1, max_size=7), max_size=8))
def test_longest_and_others_are_all_and_none_of_the_longest_overlap(words, terms):
    found = phrases(*terms)
    taken, others = found.longest(words)
    assert sorted([*taken, *others]) == sorted(found.all(words))
    assert all(earlier.last < later.first for earlier, later in itertools.pairwise(taken))
    assert len(set(found.all(words))) == len(found.all(words))
    for one in found.all(words):
        assert one.first <= one.last < len(words)
        assert tuple(words_of(one.term)) == tuple(words[one.first : one.last + 1])
