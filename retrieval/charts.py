"""Charts as inline SVG, coloured by the page's CSS variables (--c1 to --c6), so that one chart fits light and dark.

A chart also carries its numbers in a `data-chart` attribute, out of which the page's script shows the values under the
pointer. Everything that is not a number goes through `html.escape`.
"""

import html
import itertools
import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

WIDTH, HEIGHT = 480, 264
LEFT, RIGHT, TOP, BOTTOM = 40, 12, 10, 34
NUM_TICKS = 5
MAX_DOTS = 20  # points of a line that still get a dot each


@dataclass(frozen=True)
class Series:
    """A named line. `low` and `high`, where given, are a band around it. A y of None is a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    colour: int
    low: Sequence[float] = ()
    high: Sequence[float] = ()
    is_main: bool = True
    is_area: bool = False


@dataclass(frozen=True)
class Axes:
    """Labels and ranges; a range of None follows the data."""

    x_label: str
    x_range: tuple[float, float] | None = None
    y_range: tuple[float, float] | None = None
    is_log_x: bool = False
    is_share: bool = False
    """y is a share: ticks in per cent."""
    marks: Sequence[tuple[float, str]] = field(default_factory=tuple)
    """Vertical lines with a label."""


def line_chart(series: Sequence[Series], axes: Axes, title: str) -> str:
    """The legend as HTML and the chart as SVG. Without a point: a line of text that says so."""
    series = [s for s in series if any(y is not None for y in s.y)]
    if not series:
        return '<p class="empty">Nothing was recorded for this chart.</p>'
    plot = _Plot(series, axes)
    parts = [*plot.grid(), *plot.ticks()]
    for s in series:
        parts += plot.draw(s)
    parts += plot.marks()
    numbers = {
        "left": LEFT,
        "right": WIDTH - RIGHT,
        "share": axes.is_share,
        "xLabel": axes.x_label,
        "series": [{"name": s.name, "colour": s.colour, "points": plot.points(s)} for s in series],
    }
    return (
        f'{_legend(series)}<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'aria-label="{html.escape(title)}" data-chart="{html.escape(json.dumps(numbers, allow_nan=False))}">'
        f'{"".join(parts)}<line class="cursor" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/></svg>'
    )


def histogram_series(edges: Sequence[float], counts: Sequence[int], name: str, colour: int) -> Series:
    """A histogram as a stepped area; each kind is scaled to its own total, so that kinds of any size compare."""
    total = max(1, sum(counts))
    x = [edge for low, high in itertools.pairwise(edges) for edge in (low, high)]
    y = [count / total for count in counts for _ in range(2)]
    return Series(name, [edges[0], *x, edges[-1]], [0.0, *y, 0.0], colour, is_area=True)


def nice_ticks(low: float, high: float, count: int = NUM_TICKS) -> list[float]:
    """About `count` round values from `low` to `high`."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(n * step, 12) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def number(value: float) -> str:
    """Short and plain: 1,200 or 12k, 0.25, 3e-4."""
    size = abs(value)
    if size >= 1e6:
        return f"{value / 1e6:g}M"
    if size >= 1e4:
        return f"{value / 1e3:g}k"
    if size >= 1000:
        return f"{value:,.0f}"
    if size and size < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:.4g}"


def _legend(series: Iterable[Series]) -> str:
    items = []
    for s in series:
        kind = "area" if s.is_area else "line"
        items.append(f'<li><span class="key {kind}" style="--c:var(--c{s.colour})"></span>{html.escape(s.name)}</li>')
    return f'<ul class="legend">{"".join(items)}</ul>'


class _Plot:
    """From values to places on the canvas."""

    def __init__(self, series: Sequence[Series], axes: Axes) -> None:
        self.axes = axes
        xs = [self._scale(x) for s in series for x in s.x] + [self._scale(x) for x, _ in axes.marks]
        ys = [y for s in series for y in (*s.y, *s.low, *s.high) if y is not None]
        self.x_low, self.x_high = [self._scale(x) for x in axes.x_range] if axes.x_range else (min(xs), max(xs))
        if self.x_high <= self.x_low:
            self.x_low, self.x_high = self.x_low - 0.5, self.x_high + 0.5
        low, high = axes.y_range or (min(0.0, *ys, 0.0), max(ys))
        self.y_low, self.y_high = low, high if high > low else low + 1.0
        if axes.y_range is None:
            self.y_high = low + (self.y_high - low) * 1.06

    def _scale(self, x: float) -> float:
        return math.log10(x) if self.axes.is_log_x else x

    def x(self, value: float) -> float:
        share = (self._scale(value) - self.x_low) / (self.x_high - self.x_low)
        return round(LEFT + share * (WIDTH - LEFT - RIGHT), 2)

    def y(self, value: float) -> float:
        share = (min(max(value, self.y_low), self.y_high) - self.y_low) / (self.y_high - self.y_low)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 2)

    def points(self, s: Series) -> list[list[float]]:
        """[place x, place y, x, y] of each point."""
        pairs = zip(s.x, s.y, strict=True)
        return [[self.x(x), self.y(y), round(x, 6), round(y, 6)] for x, y in pairs if y is not None]

    def grid(self) -> list[str]:
        lines = []
        for tick in nice_ticks(self.y_low, self.y_high):
            y = self.y(tick)
            text = f"{tick * 100:.3g}%" if self.axes.is_share else number(tick)
            lines.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y}" y2="{y}"/>')
            lines.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 3.5}" text-anchor="end">{text}</text>')
        return lines

    def ticks(self) -> list[str]:
        if self.axes.is_log_x:
            powers = range(math.ceil(self.x_low - 1e-9), math.floor(self.x_high + 1e-9) + 1)
            values = [10.0**n for n in powers] or [10.0**self.x_low]
        else:
            values = nice_ticks(self.x_low, self.x_high, 6)
        base = HEIGHT - BOTTOM
        labels = [
            f'<text class="tick" x="{self.x(v)}" y="{base + 14}" text-anchor="middle">{number(v)}</text>'
            for v in values
        ]
        middle = (LEFT + WIDTH - RIGHT) / 2
        axis = f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>'
        label = html.escape(self.axes.x_label)
        return [axis, *labels, f'<text class="label" x="{middle}" y="{HEIGHT - 4}" text-anchor="middle">{label}</text>']

    def draw(self, s: Series) -> list[str]:
        style = f'style="--c:var(--c{s.colour})"'
        parts = []
        if s.low and s.high:
            above = [f"{self.x(x)},{self.y(y)}" for x, y in zip(s.x, s.high, strict=True)]
            below = [f"{self.x(x)},{self.y(y)}" for x, y in zip(s.x, s.low, strict=True)]
            parts.append(f'<polygon class="band" {style} points="{" ".join([*above, *reversed(below)])}"/>')
        path = " ".join(f"{place_x},{place_y}" for place_x, place_y, _, _ in self.points(s))
        if s.is_area:
            return [f'<polygon class="area" {style} points="{path}"/>']
        parts.append(f'<polyline class="{"line" if s.is_main else "line thin"}" {style} points="{path}"/>')
        if len(s.x) <= MAX_DOTS and s.is_main:
            parts += [f'<circle {style} cx="{p[0]}" cy="{p[1]}" r="2.4"/>' for p in self.points(s)]
        return parts

    def marks(self) -> list[str]:
        parts = []
        for value, label in self.axes.marks:
            x = self.x(value)
            is_right = x > (LEFT + WIDTH) / 2
            anchor, shift = ("end", -5) if is_right else ("start", 5)
            parts.append(f'<line class="mark" x1="{x}" x2="{x}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
            parts.append(
                f'<text class="mark-label" x="{x + shift}" y="{TOP + 9}" text-anchor="{anchor}">'
                f"{html.escape(label)}</text>"
            )
        return parts
