"""Lines reach the console and the log as they are, and metrics go on where the run does."""

from __future__ import annotations

import json
import logging
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from daramgpt.progress import Console, TrainingDisplay


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
    } | changes


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
