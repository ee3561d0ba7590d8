"""Lines reach the console and the log as they are, and metrics go on where the run does."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console as RichConsole

from daramgpt.progress import NOTEBOOKS, Console, Outlook, TrainingDisplay, picture
from daramgpt.text_table import width_of


@pytest.fixture(autouse=True)
def _logging_as_before() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    for handler in root.handlers[:]:
        if handler not in handlers:
            root.removeHandler(handler)
            handler.close()
    root.handlers[:] = handlers
    root.setLevel(level)


def entry(step: int, **changes: Any) -> dict[str, Any]:
    return {
        "step": step,
        "stage": "wiki",
        "loss": 5.25,
        "kd": 4.5,
        "ce": 7.5,
        "tokens_per_second": 1234.0,
        "hours_left": 1.5,
        "hours_used": 0.5,
        "tokens": 1000 * step,
        "peak_memory_bytes": 4_200_000_000,
    } | changes


OUTLOOK = Outlook(2, 5, 0.43, 1000.0, 16_000_000_000, 284.0, 75.0, 3600.0)


def drawn(columns: int, outlook: Outlook | None, held_out: str = "", **changes: Any) -> list[str]:
    """Lines of the picture in a terminal of so many columns."""
    rich = RichConsole(width=columns, file=StringIO(), force_terminal=True, color_system=None, soft_wrap=True)
    rich.print(picture("student", 2000, entry(500, **changes), outlook, held_out))
    text = rich.file.getvalue()
    assert isinstance(text, str)
    return text.splitlines()


def steps(path: Path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    "text", ["plain", "a :smile: b", "[bold]x[/bold] [/]", "C:\\path\\", "가나다 " * 60, "42 'a' /b"]
)
def test_a_line_is_printed_and_kept_as_it_is(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    console = Console(tmp_path / "run" / "log.txt")
    console(text)
    assert capsys.readouterr().out == text + "\n"
    assert (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").endswith(f" {text}\n")


def test_each_line_of_a_text_has_its_time_in_the_log(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    Console(log)("one\ntwo")
    Console(log)()
    lines = log.read_text().splitlines()
    assert len(lines) == 3
    assert all(line[4] == line[7] == "-" and line[13] == ":" for line in lines)


def test_a_silent_console_says_and_keeps_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Console(tmp_path / "log.txt", silent=True)("something")
    Console()("heard")
    assert capsys.readouterr().out == "heard\n"
    assert not (tmp_path / "log.txt").exists()


def test_what_libraries_say_goes_to_the_log_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Console(tmp_path / "log.txt")
    logging.getLogger("some_library").warning("something odd")
    warnings.warn("something old", UserWarning, stacklevel=1)
    text = (tmp_path / "log.txt").read_text()
    assert "something odd" in text and "something old" in text
    assert capsys.readouterr() == ("", "")


def test_metrics_from_the_resumed_step_on_are_dropped(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with TrainingDisplay(Console(), metrics, "student", 10, 0) as display:
        for step in range(1, 8):
            display.step(entry(step))
    # A kill cuts the last line short.
    metrics.write_text(metrics.read_text() + '{"step": 8, "lo')
    with TrainingDisplay(Console(), metrics, "student", 10, 5) as display:
        assert steps(metrics) == [1, 2, 3, 4, 5]
        for step in range(6, 11):
            display.step(entry(step))
    assert steps(metrics) == list(range(1, 11))


def test_every_line_is_on_disk_at_once(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    with TrainingDisplay(Console(), metrics, "student", 10, 0) as display:
        display.step(entry(1))
        assert steps(metrics) == [1]


def test_without_a_terminal_the_last_step_is_a_plain_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(Console(), tmp_path / "metrics.jsonl", "student", 2, 0) as display:
        display.step(entry(1))
        assert capsys.readouterr().out == ""
        display.step(entry(2))
    expected = "student: step 2/2  wiki  loss 5.250  kd 4.500  ce 7.500  1,234 tokens/s  1 h 30 min left\n"
    assert capsys.readouterr().out == expected


def test_without_a_teacher_no_kd_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(Console(), tmp_path / "metrics.jsonl", "teacher", 1, 0) as display:
        display.step(entry(1, kd=0.0))
    assert "kd" not in capsys.readouterr().out


def test_other_ranks_show_and_write_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with TrainingDisplay(Console(), tmp_path / "metrics.jsonl", "student", 1, 0, shown=False) as display:
        display.step(entry(1))
    assert capsys.readouterr().out == "" and list(tmp_path.iterdir()) == []


def test_the_picture_shows_what_is_trained_against_what_was_planned() -> None:
    text = "\n".join(drawn(100, OUTLOOK, "1.2345 bits per byte at step 400", hidden=0.25))
    for part in (
        "25.0%",
        "1 h 30 min left",
        "500 of 2,000, 500,000 tokens",
        "wiki, 2 of 5, 43% of it",
        "5.250  distillation 4.500  cross-entropy 7.500  hidden 0.250",
        "1.2345 bits per byte at step 400",
        "1,234 tokens/s (+23% to the plan's 1,000)",
        "4.2 GB of 16.0 GB",
        "0.50 used, 283.50 left of 284",
        "saved in 1 min 15 s, session ends in 1 h 0 min",
    ):
        assert part in text, part
    assert "fp16" not in text and "None" not in text
    assert "fp16" in "\n".join(drawn(100, OUTLOOK, skipped_steps=3, loss_scale=1024.0))


def test_what_is_not_known_or_bounded_is_left_out() -> None:
    text = "\n".join(drawn(80, Outlook(1, 1, 0.5, None, 16_000_000_000, 284.0, -3.0, None), kd=0.0))
    assert "plan" not in text and "1 of 1" not in text and "session" not in text and "distillation" not in text
    assert "saved in 0 s" in text and "held out" not in text
    assert "tokens/s" in "\n".join(drawn(80, None))


@pytest.mark.parametrize("columns", [40, 80, 140])
def test_no_line_of_the_picture_is_wider_than_the_terminal_or_wraps(columns: int) -> None:
    lines = drawn(columns, OUTLOOK, "1.2345 bits per byte at step 400", stage="가나다라마바사" * 6, hidden=0.5)
    assert len(lines) == 9
    assert all(width_of(line) <= columns for line in lines)


def test_a_terminal_shows_the_picture_and_the_log_keeps_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    for name in NOTEBOOKS:
        monkeypatch.delenv(name, raising=False)
    console = Console(tmp_path / "log.txt")
    console.rich = RichConsole(file=StringIO(), force_terminal=True, width=80, soft_wrap=True)
    asked: list[int] = []

    def outlook() -> Outlook:
        asked.append(1)
        return OUTLOOK

    with TrainingDisplay(console, tmp_path / "metrics.jsonl", "student", 2, 0, outlook) as display:
        for step in (1, 2):
            display.step(entry(step, bits_per_byte={"wiki": None, "all": 1.5}))
        console("a line in between")
    assert isinstance(console.rich.file, StringIO)
    text = console.rich.file.getvalue()
    assert "1.5000 bits per byte at step 2" in text and "a line in between" in text and len(asked) == 2
    assert "step 2/2" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("variable", [*NOTEBOOKS, "TERM"])
def test_the_terminal_of_a_notebook_gets_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], variable: str
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv(variable, "dumb")
    with TrainingDisplay(Console(), tmp_path / "metrics.jsonl", "student", 2, 0, lambda: OUTLOOK) as display:
        for step in (1, 2):
            display.step(entry(step))
    said = capsys.readouterr().out
    assert "student: step 2/2" in said and "step 1/2" not in said and "\x1b[1A" not in said and "ahead" not in said


def test_a_session_begins_with_the_held_out_figure_of_the_one_before(tmp_path: Path) -> None:
    metrics = tmp_path / "metrics.jsonl"
    for first_step, expected in ((0, ""), (1, "1.5000 bits per byte at step 1")):
        with TrainingDisplay(Console(), metrics, "student", 9, first_step) as display:
            assert display._held_out == expected
            display.step(entry(first_step + 1, **({} if first_step else {"bits_per_byte": {"all": 1.5}})))


def test_each_step_is_sent_to_whoever_else_wants_it(tmp_path: Path) -> None:
    sent: list[dict[str, Any]] = []
    with TrainingDisplay(Console(), tmp_path / "metrics.jsonl", "student", 9, 0, None, sent.append) as display:
        display.step(entry(1))
    assert sent == [entry(1)]
