"""Tables and durations as plain text.

Korean letters are two columns wide in a terminal, so padding counts columns and not characters.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence


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
