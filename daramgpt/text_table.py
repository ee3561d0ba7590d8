"""Tables, lines and durations as plain text, no wider than the terminal that they are printed on.

Korean letters are two columns wide in a terminal, so padding counts columns and not characters.
"""

from __future__ import annotations

import re
import shutil
import textwrap
import unicodedata
from collections.abc import Sequence

Cells = Sequence[Sequence[str]]
# Where there is no terminal: in a log, or below a cell of a notebook.
PLAIN_COLUMNS = 100
# A name in a table is not cut to less, a line not broken to less.
LEAST_NAME, LEAST_COLUMNS = 24, 40
# What a line begins with that stands in columns, and what is continued below it.
_COLUMNS = re.compile(r"(?:\S+ {2,}){1,2}(?=\S)")
MOST_INDENT = 24


def terminal_columns() -> int:
    """Columns of the terminal; `PLAIN_COLUMNS` where there is none."""
    return max(LEAST_COLUMNS, shutil.get_terminal_size((PLAIN_COLUMNS, 24)).columns)


def width_of(text: str) -> int:
    """Columns that a terminal gives to a text."""
    return sum(2 if unicodedata.east_asian_width(character) in "WF" else 1 for character in text)


def pad(text: str, width: int, right: bool = False) -> str:
    """The text in so many columns, to the left or to the right of them."""
    space = " " * (width - width_of(text))
    return space + text if right else text + space


def aligned(rows: Sequence[Sequence[str]], num_left: int = 1) -> list[str]:
    """Rows of cells as lines of aligned columns.

    Args:
        num_left: so many columns are names, set to the left; the others are figures, set to the right.
    """
    widths = [max(map(width_of, cells)) for cells in zip(*rows, strict=True)]
    return [
        "  ".join(
            pad(cell, width, right=place >= num_left)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def ruled(rows: Cells, num_left: int = 1) -> list[str]:
    """As `aligned`, with a rule below the first line."""
    head, *lines = aligned(rows, num_left)
    return [head, "─" * max(map(width_of, (head, *lines))), *lines]


def fitted(cells: Cells, width: int) -> list[Cells]:
    """The table, turned where it would be too wide, or where that is too wide as well a few columns at a time.

    Args:
        cells: header first; the first column has the names of the lines.
        width: columns that a line may take.

    Returns:
        tables one below the other; names are cut where nothing else helps.
    """
    if _width(cells) <= width:
        return [cells]
    turned = _turned(cells)
    if _width(turned) <= width:
        return [turned]
    pieces: list[list[Sequence[str]]] = [[]]
    for column in turned[1:]:
        wider = [turned[0], *pieces[-1], column]
        if pieces[-1] and _width(narrowed(_turned(wider), width)) > width:
            pieces.append([column])
        else:
            pieces[-1].append(column)
    return [narrowed(_turned([turned[0], *piece]), width) for piece in pieces]


def narrowed(cells: Cells, width: int) -> Cells:
    """The same with names cut, to no less than `LEAST_NAME` columns, where the lines would be longer than `width`."""
    name_columns = max(width_of(line[0]) for line in cells)
    left = max(LEAST_NAME, name_columns - max(0, _width(cells) - width))
    return [[cut(line[0], left), *line[1:]] for line in cells]


def cut(text: str, columns: int) -> str:
    """The text, or its beginning and an ellipsis, in at most so many columns."""
    if width_of(text) <= columns:
        return text
    while width_of(text) >= columns:
        text = text[:-1]
    return f"{text}…"


def wrapped(text: str, width: int, breaks_words: bool = True) -> list[str]:
    """Lines of at most `width` columns, broken between words, or within one that is longer.

    Args:
        breaks_words: False leaves a longer word whole: a path that is broken cannot be copied.
    """
    lines = [""]
    for word in text.split():
        is_whole = not breaks_words or width_of(word) <= width
        # In a line of wide letters alone a column count of width is width // 2 characters.
        for piece in [word] if is_whole else textwrap.wrap(word, max(1, width // 2)):
            joined = f"{lines[-1]} {piece}" if lines[-1] else piece
            if width_of(joined) <= width or not lines[-1]:
                lines[-1] = joined
            else:
                lines.append(piece)
    return lines


def hung(line: str, width: int) -> list[str]:
    """A line of prose, what is too long of it below it, as far in as its text begins behind words set in columns.

    A word that is longer than a line stays whole, and is left to the terminal.
    """
    if width_of(line) <= width:
        return [line]
    before = re.match(r" *", line)
    columns = _COLUMNS.match(line)
    start = columns[0] if columns and width_of(columns[0]) <= MOST_INDENT else before[0] if before else ""
    indent = " " * (width_of(start) if columns else len(start) + 2)
    first, *others = wrapped(line[len(start) :], width - len(indent), breaks_words=False)
    return [start + first, *(indent + other for other in others)]


def _turned(cells: Cells) -> list[list[str]]:
    return [list(line) for line in zip(*cells, strict=True)]


def _width(cells: Cells) -> int:
    return max(map(width_of, aligned(cells)))


def counted(number: int, things: str) -> str:
    """``(1, "rows")`` → ``"1 row"``."""
    return f"{number:,} {things.removesuffix('s') if number == 1 else things}"


def duration(seconds: float) -> str:
    """``75`` → ``"1 min 15 s"``."""
    seconds = round(seconds)
    if seconds < 60:
        return f"{seconds} s"
    minutes, seconds = divmod(seconds, 60)
    if minutes < 60:
        return f"{minutes} min {seconds} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min"
