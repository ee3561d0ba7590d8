"""Tables and durations as text."""

from __future__ import annotations

import pytest

from daramgpt.text_table import aligned, counted, duration, fitted, hung, ruled, terminal_columns, width_of, wrapped


def test_columns_align() -> None:
    assert aligned([("stage", "tokens"), ("web", "1,000"), ("written", "3")]) == [
        "stage    tokens",
        "web       1,000",
        "written       3",
    ]


def test_wide_letters_count_two_columns() -> None:
    assert width_of("가a") == 3
    assert aligned([("가나", "하", "1"), ("b", "c", "20")], num_left=2) == ["가나  하   1", "b     c   20"]


def test_a_table_that_is_too_wide_is_turned_or_parted_and_loses_nothing() -> None:
    cells = [["stage", *(f"figure {number}" for number in range(10))]]
    cells += [[name, *(f"{name[0]}{number:,}" for number in range(1000, 1010))] for name in ("web", "wiki", "written")]
    assert fitted(cells, 200) == [cells]
    [turned] = fitted(cells, 40)
    assert turned[0] == ["stage", "web", "wiki", "written"] and len(turned) == 11
    parts = fitted([line[:1] + line[1:] * 3 for line in [*cells, *cells[1:] * 4]], 60)
    assert len(parts) > 1 and all(width_of(line) <= 60 for part in parts for line in aligned(part))
    assert sum(len(part[0]) - 1 for part in parts) in (30, 15)
    assert ruled(cells)[1] == "─" * len(ruled(cells)[0])


@pytest.mark.parametrize("columns", [40, 80, 140])
@pytest.mark.parametrize(
    "line",
    [
        "ok       packages    " + ", ".join(f"library{number} 1.2.{number}" for number in range(12)),
        "written: fault: 말뭉치.zip!비출판물 말뭉치(버전 1.2)/WDRW1900000005.sjml: malformed XML, text recovered",
        "  memory 0.72 GB: libraries 560 MB, activations 52 MB, loss buffers 35 MB, heap 25 MB, optimizer 14 MB",
        "가나다라마바사" * 30,
        "short",
        "",
    ],
)
def test_a_line_hangs_and_keeps_its_words(line: str, columns: int) -> None:
    lines = hung(line, columns)
    assert all(width_of(one) <= columns or len(one.split()) == 1 for one in lines)
    assert "".join("".join(lines).split()) == "".join(line.split())
    if width_of(line) <= columns:
        assert lines == [line]
    elif line.startswith("ok"):
        # Below the text, not below the words set in columns before it.
        assert all(one.startswith(" " * 21) and one[21] != " " for one in lines[1:])


def test_words_stay_whole_where_a_line_can_hold_them() -> None:
    assert wrapped("a bb ccc 다람쥐 dddd", 6) == ["a bb", "ccc", "다람쥐", "dddd"]


def test_without_a_terminal_lines_have_a_hundred_columns(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    assert terminal_columns() == 100
    monkeypatch.setenv("COLUMNS", "80")
    assert terminal_columns() == 80
    monkeypatch.setenv("COLUMNS", "10")
    assert terminal_columns() == 40


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


@pytest.mark.parametrize(("number", "text"), [(0, "0 rows"), (1, "1 row"), (1200, "1,200 rows")])
def test_one_thing_is_no_plural(number: int, text: str) -> None:
    assert counted(number, "rows") == text
