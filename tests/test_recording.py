"""The recording of a command: what is left on the terminal, what was too wide for it, and the file to play again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from benchmarks import recording

PICTURE = """
import sys, time
print("한글 " * 9 if sys.stdout.isatty() else "no terminal")
for number in range(3):
    # As rich draws: the picture before is erased, line by line.
    print(("\\r\\x1b[1A\\x1b[2K" if number else "") + f"\\x1b[32mstep {number}\\x1b[0m", flush=True)
    time.sleep(0.3 if number == 1 else 0)
print("x" * 41)
sys.exit(3)
"""


def line(tmp_path: Path) -> list[str]:
    path = tmp_path / "picture.py"
    path.write_text(PICTURE, encoding="utf-8")
    return [sys.executable, str(path)]


def test_what_is_left_on_a_terminal(tmp_path: Path) -> None:
    out = tmp_path / "recording.cast"
    result = recording.measure(line(tmp_path), 40, out)
    assert result["exit_code"] == 3 and result["lines"] == 3 and result["widest"] == 44
    assert result["too_wide"] == [("한글 " * 9).strip(), "x" * 41]
    assert result["longest_silence_seconds"] >= 0.3
    head, *pieces = map(json.loads, out.read_text(encoding="utf-8").splitlines())
    assert head["version"] == 2 and head["width"] == 40
    text = "".join(piece for _, kind, piece in pieces if kind == "o")
    assert text.count("step ") == 3 and [at for at, *_ in pieces] == sorted(at for at, *_ in pieces)
    assert "wider than the terminal's 40: 2" in recording.format_result(result)


def test_without_a_terminal_every_line_counts(tmp_path: Path) -> None:
    result = recording.measure([sys.executable, "-c", "print('a'); print('b' * 500); print('c')"], 0, None)
    assert result["lines"] == 3 and result["too_wide"] == []
    assert recording.measure(line(tmp_path), 0, None)["exit_code"] == 3


def test_a_command_that_is_none_is_named() -> None:
    assert recording.command.run(lambda: recording.measure(["no-such-command"], 80, None), str, None) == 2
