"""Line charts by matplotlib: inline SVG that follows the page's light and dark colours, and PNG files.

Many points are thinned to means of neighbours: a curve of thousands of steps is noise at 500 pixels.
"""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from daramgpt.run_directory import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INCHES = (5.6, 3.2)
MOST_POINTS = 160
# Of the tokens at the start, whose values may lie above the picture: they would flatten all the rest.
START_SHARE = 0.03
LETTER_INCHES = 0.075
PNG_DOTS_PER_INCH = 150
# In a picture of its own; on the page the same numbers are those of its variables --c1 to --c6.
COLOURS = ("#1f6feb", "#d1660a", "#7a4fc4", "#12805c", "#c2255c", "#8a6d00")
# A browser has the letters of every script; a PNG needs a font that has Hangul.
KOREAN_FONTS = ("Noto Sans CJK KR", "Noto Sans KR", "NanumGothic", "Malgun Gothic", "Apple SD Gothic Neo")

Point = tuple[float, float]
# Colours that no theme has, in the place of the page's variables.
_INK, _RULE = "#010002", "#010003"
_MARKS = [f"#0100{16 + number:02x}" for number in range(len(COLOURS))]


@dataclass(frozen=True, slots=True)
class Series:
    """One line.

    Attributes:
        name: in the legend.
        points: in order of x.
        colour: its number, from 1.
        style: ``dashed`` for what was planned or allowed, ``marked`` with a mark a point for what is measured rarely.
    """

    name: str
    points: Sequence[Point]
    colour: int
    style: Literal["line", "dashed", "marked"] = "line"


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of the x axis with a name."""

    name: str
    first: float
    last: float


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture with lines.

    Attributes:
        title: for the caption, the file's name, and for those who cannot see the picture.
        series: at least one with a point; those without are left out.
        x_label, y_label: what the axes count, with the unit.
        spans: named above the plot, by number where the names are too wide.
        from_zero: the y axis begins there.
    """

    title: str
    series: Sequence[Series]
    x_label: str
    y_label: str
    spans: Sequence[Span] = ()
    from_zero: bool = False

    @property
    def name(self) -> str:
        """The title as a file or an element is called."""
        return "-".join(re.findall(r"\w+", self.title.lower()))


def as_html(chart: Chart) -> str:
    """A ``<figure>`` whose colours are the page's, its legend in the caption.

    Raises:
        ImportError: matplotlib is not installed.
    """
    lines = [one for one in chart.series if one.points]
    svg = _svg(_figure(chart, _INK, _RULE, _MARKS), chart.name)
    for colour, variable in [(_INK, "soft"), (_RULE, "rule"), *((mark, f"c{n}") for n, mark in enumerate(_MARKS, 1))]:
        svg = svg.replace(colour, f"var(--{variable})")
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(chart.title)}"', 1)
    legend = "".join(
        f'<span class="key"><i class="{one.style} c{one.colour}"></i>{escape(one.name)}</span>' for one in lines
    )
    return f"<figure>{svg}<figcaption><b>{escape(chart.title)}</b>{legend}</figcaption></figure>"


def save_png(chart: Chart, path: Path) -> None:
    """The same as a picture of its own, with title and legend in it.

    Raises:
        ImportError: matplotlib is not installed.
    """
    figure = _figure(chart, "#3b4453", "#dde2ea", COLOURS)
    [axes] = figure.axes
    axes.set_title(chart.title, loc="left", fontsize=11, pad=20 if chart.spans else 8)
    if sum(bool(one.points) for one in chart.series) > 1:
        axes.legend(fontsize=9, frameon=False)
    write_atomically(path, _saved(figure, format="png", dpi=PNG_DOTS_PER_INCH, facecolor="white"))


def _saved(figure: Figure, **options: Any) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        # Of letters that the browser has, or this machine lacks, and matplotlib's own font does not have.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(buffer, **options)
    return buffer.getvalue()


def _figure(chart: Chart, ink: str, rule: str, colours: Sequence[str]) -> Figure:
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, StrMethodFormatter

    lines = [(one, thin(one.points)) for one in chart.series if one.points]
    x_last = max(point[0] for _, points in lines for point in points)
    low, high = _bounds([points for _, points in lines], x_last)
    with rc_context({"font.size": 10, "text.color": ink, "axes.labelcolor": ink, "font.family": _fonts()}):
        figure = Figure(figsize=INCHES, layout="constrained")
        axes = figure.subplots()
        for one, points in lines:
            look: dict[str, Any] = (
                {"linestyle": "--", "linewidth": 1.2} if one.style == "dashed" else {"linewidth": 1.6}
            )
            if one.style == "marked" or len(points) == 1:
                look |= {"marker": "o", "markersize": 3.5}
            [line] = axes.plot(*zip(*points, strict=True), color=colours[one.colour - 1], label=one.name, **look)
            line.set_gid(f"{chart.name}-{one.colour}")
        # A little more than all, for the mark of the last point.
        axes.set_xlim(0.0, 1.01 * x_last)
        axes.set_ylim(0.0 if chart.from_zero else low, high)
        axes.set(xlabel=chart.x_label, ylabel=chart.y_label)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
        axes.yaxis.set_major_locator(MaxNLocator(5))
        if high >= 1e3:
            axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        axes.tick_params(length=0, colors=ink)
        axes.grid(axis="y", color=rule, linewidth=0.8)
        axes.set_axisbelow(True)
        for side, spine in axes.spines.items():
            spine.set_visible(side == "bottom")
            spine.set_color(ink)
        _mark_spans(axes, chart.spans, x_last, ink)
    return figure


def _fonts() -> list[str]:
    from matplotlib.font_manager import fontManager

    found = {font.name for font in fontManager.ttflist}
    return ["DejaVu Sans", *(name for name in KOREAN_FONTS if name in found)]


def _mark_spans(axes: Any, spans: Sequence[Span], x_last: float, ink: str) -> None:
    room = (INCHES[0] - 0.8) / x_last
    fits = all((span.last - span.first) * room > LETTER_INCHES * len(span.name) + 0.05 for span in spans)
    for number, span in enumerate(spans, 1):
        if number > 1:
            axes.axvline(span.first, color=ink, linewidth=0.8, linestyle=(0, (3, 4)))
        axes.text(
            (span.first + span.last) / 2,
            1.03,
            span.name if fits else str(number),
            transform=axes.get_xaxis_transform(),
            horizontalalignment="center",
            fontsize=9,
        )


def _svg(figure: Figure, salt: str) -> str:
    """The element alone, without what a page has already, sized by it, text as text in its font."""
    from matplotlib import rc_context

    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    # Ids are made from the salt, so that those of two pictures differ and a picture's are the same every time.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": salt}):
        text = _saved(figure, format="svg", metadata=nothing, transparent=True).decode()
    text = text[text.index("<svg") :].rstrip()
    text = re.sub(r"\s*<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r' (xmlns(:xlink)?|version)="[^"]*"', "", text).replace("xlink:href", "href")
    text = re.sub(r' (width|height)="[\d.]+pt"', "", text, count=2)
    text = re.sub(r"font-family: [^;\"]*;? ?", "", text)
    used = set(re.findall(r"#([\w.-]+)", text))
    return re.sub(
        r' id="([^"]*)"', lambda found: found[0] if found[1] in used or found[1].startswith(salt) else "", text
    )


def thin(points: Sequence[Point]) -> list[Point]:
    """At most `MOST_POINTS` points, each the mean of its neighbours; the first and the last are kept as they are."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size = math.ceil((len(points) - 2) / (MOST_POINTS - 2))
    inner = points[1:-1]
    means = []
    for start in range(0, len(inner), size):
        piece = inner[start : start + size]
        means.append((sum(x for x, _ in piece) / len(piece), sum(y for _, y in piece) / len(piece)))
    return [points[0], *means, points[-1]]


def _bounds(lines: Sequence[Sequence[Point]], x_last: float) -> Point:
    shown = [y for points in lines for x, y in points if x >= START_SHARE * x_last]
    low, high = min(shown), max(shown)
    room = 0.05 * (high - low) or 0.05 * abs(high) or 0.5
    return max(0.0, low - room) if low >= 0 else low - room, high + room
