"""Tables and durations as text."""

from __future__ import annotations

import pytest

from daramgpt.text_table import aligned, duration, width_of


def test_columns_align() -> None:
    assert aligned([("stage", "tokens"), ("web", "1,000"), ("written", "3")]) == [
        "stage    tokens",
        "web       1,000",
        "written       3",
    ]


def test_wide_letters_count_two_columns() -> None:
    assert width_of("가a") == 3
    assert aligned([("가나", "하", "1"), ("b", "c", "20")], num_left=2) == ["가나  하   1", "b     c   20"]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0, "0 s"),
        (59.4, "59 s"),
        (59.6, "1 min 0 s"),
        (75, "1 min 15 s"),
        (3599.7, "1 h 0 min"),
        (100_000, "27 h 46 min"),
    ],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
