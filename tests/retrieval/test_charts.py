"""Charts: places follow values, numbers are kept for the pointer, edge cases draw something sensible."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from retrieval.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    Axes,
    Series,
    histogram_series,
    line_chart,
    nice_ticks,
    number,
)
from tests.retrieval.pages import Page


def drawn(series: list[Series], axes: Axes) -> tuple[Page, dict]:
    page = Page(line_chart(series, axes, "A <title>"))
    (numbers,) = [json.loads(value) for _, name, value in page.attributes if name == "data-chart"]
    return page, numbers


def test_the_range_spans_the_canvas() -> None:
    _, chart = drawn([Series("up", [0, 5, 10], [0.0, 0.25, 1.0], 1)], Axes("x", y_range=(0.0, 1.0)))
    assert chart["series"][0]["points"] == [
        [LEFT, HEIGHT - BOTTOM, 0, 0.0],
        [(LEFT + WIDTH - RIGHT) / 2, HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) / 4, 5, 0.25],
        [WIDTH - RIGHT, TOP, 10, 1.0],
    ]


def test_a_logarithmic_axis_puts_powers_of_ten_at_even_distances() -> None:
    page, chart = drawn([Series("s", [100, 1000, 10_000], [1.0, 0.5, 0.2], 1)], Axes("terms", is_log_x=True))
    x = [point[0] for point in chart["series"][0]["points"]]
    assert x[1] - x[0] == pytest.approx(x[2] - x[1], abs=0.02)
    assert all(label in page.text for label in ("100", "1,000", "10k"))


def test_gaps_bands_and_marks() -> None:
    series = Series("s<1>", [0, 1, 2], [0.5, None, 0.7], 2)
    band = Series("b", [0, 1, 2], [0.5, 0.6, 0.7], 3, low=[0.4, 0.5, 0.6], high=[0.6, 0.7, 0.8])
    page, chart = drawn([series, band], Axes("x", marks=[(1, "best & first")]))
    assert [len(one["points"]) for one in chart["series"]] == [2, 3]
    assert page.counts["polygon"] == 1
    assert "s<1>" in page.text
    assert "best & first" in page.text


@pytest.mark.parametrize("series", [[], [Series("none", [], [], 1)], [Series("gaps", [1, 2], [None, None], 1)]])
def test_nothing_to_draw_says_so(series: list[Series]) -> None:
    assert "Nothing was recorded" in Page(line_chart(series, Axes("x"), "t")).text


@pytest.mark.parametrize(("x", "y"), [([3], [0.2]), ([3, 3], [0.2, 0.2]), ([0, 1], [0.0, 0.0]), ([1, 2], [-1.0, -3.0])])
def test_a_single_or_flat_line_stays_on_the_canvas(x: list[float], y: list[float]) -> None:
    _, chart = drawn([Series("s", x, y, 1)], Axes("x"))
    for place_x, place_y, _, _ in chart["series"][0]["points"]:
        assert LEFT <= place_x <= WIDTH - RIGHT
        assert TOP <= place_y <= HEIGHT - BOTTOM


def test_a_histogram_is_scaled_to_its_own_total() -> None:
    series = histogram_series([0.0, 0.5, 1.0], [1, 3], "h", 1)
    assert series.x == [0.0, 0.0, 0.5, 0.5, 1.0, 1.0]
    assert series.y == [0.0, 0.25, 0.25, 0.75, 0.75, 0.0]
    assert sum(histogram_series([0.0, 1.0], [0], "h", 1).y) == 0


@given(st.floats(-1e6, 1e6), st.floats(1e-3, 1e6))
def test_ticks_are_round_few_and_within(low: float, span: float) -> None:
    ticks = nice_ticks(low, low + span)
    assert 1 <= len(ticks) <= 11
    assert all(low - span * 1e-6 <= tick <= low + span * 1.000001 for tick in ticks)


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0, "0"), (1200, "1,200"), (10_000, "10k"), (1_000_000, "1M"), (0.25, "0.25"), (0.0003, "3e-4"), (-2.5, "-2.5")],
)
def test_numbers_are_short(value: float, expected: str) -> None:
    assert number(value) == expected
