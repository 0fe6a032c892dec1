"""Whatever a term holds, the page shows it as text."""

import html

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.markup import MAX_SHOWN, bdi, facts_table, text
from tests.retrieval.pages import Page

HOSTILE = [
    "</script><script>alert(1)</script>",
    '"><img src=x onerror=alert(1)>',
    "' onclick='x",
    "مفتاح المربع",
    "\u202eevil\u202c",
    "👩‍🚒 emoji",
    "a\x00b\x1b[31m",
    "half \ud800 pair",
    "<!-- comment",
    "&amp; &lt;",
    "日本語" * 3,
]


@pytest.mark.parametrize("hostile", HOSTILE)
def test_hostile_strings_are_text_and_nothing_else(hostile: str) -> None:
    page = Page(f'<p title="{text(hostile)}">{bdi(hostile)}</p>{facts_table({hostile: hostile})}')
    assert set(page.counts) == {"p", "bdi", "table", "tbody", "tr", "td"}
    page.text.encode("utf-8")  # no half of a pair is left
    assert not any(char in page.text for char in "\x00\x1b\u202e")


@given(st.text(max_size=60))
def test_ordinary_characters_come_through(value: str) -> None:
    shown = html.unescape(text(value))
    assert len(shown) == len(value)
    assert all(a == b or b == "\ufffd" for a, b in zip(value, shown, strict=True))
    assert html.unescape(text("naïve, 東京 & <b>")) == "naïve, 東京 & <b>"


def test_a_term_of_megabytes_is_cut() -> None:
    assert len(text("x" * 5_000_000)) == MAX_SHOWN
    assert text("x" * 5_000_000).endswith("…")
