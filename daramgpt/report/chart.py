"""A line chart as inline SVG: no library, no script, coloured by the page's variables so that it suits light and dark.

Many points are thinned to means of neighbours: a curve of thousands of steps is noise at 500 pixels.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 560, 320
LEFT, RIGHT, TOP, BOTTOM = 52, 14, 34, 44
MOST_POINTS = 160
# Of the tokens at the start, whose values may lie above the picture: they would flatten all the rest.
START_SHARE = 0.03
LETTER_WIDTH = 6.4

Point = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Series:
    """One line: its name in the legend, its points in order of x, and the number of its colour, 1 to 3."""

    name: str
    points: list[Point]
    colour: int


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the x axis with a name."""

    name: str
    first: float
    last: float


def line_chart(title: str, series: list[Series], spans: list[Span], x_label: str, y_label: str) -> str:
    """A ``<figure>`` with legend, axes, and the bounds of the spans as vertical lines.

    Args:
        title: for the caption and for those who cannot see the picture.
        series: at least one with a point.
        spans: named above the plot, by number where the names are too wide.
        x_label, y_label: what the axes count, with the unit.
    """
    lines = [Series(one.name, _thin(one.points), one.colour) for one in series if one.points]
    x_last = max(point[0] for one in lines for point in one.points)
    y_low, y_high = _bounds(lines, x_last)
    y_ticks = _ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])

    def x_of(value: float) -> float:
        return LEFT + value / x_last * (WIDTH - LEFT - RIGHT)

    def y_of(value: float) -> float:
        return TOP + (y_high - value) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    clip = f"clip-{'-'.join(title.lower().split())}"
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<clipPath id="{clip}"><rect x="{LEFT}" y="{TOP}" width="{WIDTH - LEFT - RIGHT}" '
        f'height="{HEIGHT - TOP - BOTTOM}"/></clipPath>',
    ]
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:g}</text>')
    for tick in _ticks(0, x_last, 5):
        if tick <= x_last:
            anchor = "end" if x_of(tick) > WIDTH - RIGHT - 16 else "middle"
            parts.append(
                f'<text x="{x_of(tick):.1f}" y="{HEIGHT - BOTTOM + 17}" text-anchor="{anchor}">{_short(tick)}</text>'
            )
    parts += _span_marks(spans, x_of)
    for one in lines:
        path = " ".join(f"{x_of(x):.1f},{y_of(y):.1f}" for x, y in one.points)
        parts.append(f'<polyline class="line c{one.colour}" clip-path="url(#{clip})" points="{path}"/>')
    middle = TOP + (HEIGHT - TOP - BOTTOM) / 2
    parts += [
        f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{HEIGHT - BOTTOM}" y2="{HEIGHT - BOTTOM}"/>',
        f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(x_label)}</text>',
        f'<text x="13" y="{middle}" text-anchor="middle" transform="rotate(-90 13 {middle})">{escape(y_label)}</text>',
        "</svg>",
    ]
    legend = "".join(f'<span class="key"><i class="c{one.colour}"></i>{escape(one.name)}</span>' for one in lines)
    return f"<figure>{''.join(parts)}<figcaption><b>{escape(title)}</b>{legend}</figcaption></figure>"


def _span_marks(spans: list[Span], x_of: Callable[[float], float]) -> list[str]:
    fits = all(x_of(span.last) - x_of(span.first) > LETTER_WIDTH * len(span.name) + 4 for span in spans)
    parts = []
    for number, span in enumerate(spans, 1):
        if number > 1:
            x = x_of(span.first)
            parts.append(f'<line class="bound" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{HEIGHT - BOTTOM}"/>')
        x = (x_of(span.first) + x_of(span.last)) / 2
        name = escape(span.name) if fits else str(number)
        parts.append(f'<text class="span" x="{x:.1f}" y="{TOP - 12}" text-anchor="middle">{name}</text>')
    return parts


def _thin(points: list[Point]) -> list[Point]:
    """At most `MOST_POINTS` points, each the mean of its neighbours; the first and the last are kept as they are."""
    if len(points) <= MOST_POINTS:
        return points
    size = math.ceil((len(points) - 2) / (MOST_POINTS - 2))
    inner = points[1:-1]
    means = []
    for start in range(0, len(inner), size):
        piece = inner[start : start + size]
        means.append((sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)))
    return [points[0], *means, points[-1]]


def _bounds(lines: list[Series], x_last: float) -> Point:
    shown = [y for one in lines for x, y in one.points if x >= START_SHARE * x_last]
    low, high = min(shown), max(shown)
    room = 0.04 * (high - low) or 0.5
    return max(0.0, low - room) if low >= 0 else low - room, high + room


def _ticks(low: float, high: float, about: int) -> list[float]:
    """Round numbers between two bounds."""
    step = 10 ** math.floor(math.log10((high - low) / about))
    step *= min((1, 2, 5, 10), key=lambda factor: abs((high - low) / (step * factor) - about))
    return [round(index * step, 12) for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _short(value: float) -> str:
    for unit, size in (("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g} {unit}"
    return f"{value:g}"
