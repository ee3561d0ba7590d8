"""A command as a terminal of a given width shows it: a recording to play again, and the lines that were too wide.

    python -m benchmarks.recording [--columns N] [--out FILE] [--json FILE] -- COMMAND ...

With ``--columns 0`` the command writes to a file instead of a terminal, as in a log or a pipe. The recording is an
asciicast of version 2, one line of JSON a piece of output, for ``asciinema play``. Needs ``pip install pyte``.
"""

from __future__ import annotations

import codecs
import contextlib
import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

from benchmarks import command
from daramgpt.errors import UserError
from daramgpt.text_table import width_of

LINES = 40
WIDE = 400
Piece = tuple[float, str]


def record(line: list[str], columns: int) -> tuple[list[Piece], int]:
    """Run a command on a terminal of its own, or with its output piped where `columns` is 0.

    Returns:
        what it wrote, each piece with the seconds since the start; and its exit code.

    Raises:
        UserError: there is no such command.
    """
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    if columns:
        ours, its = pty.openpty()
        fcntl.ioctl(its, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, columns, 0, 0))
        environment["TERM"] = "xterm-256color"
    else:
        ours, its = os.pipe()
    began, pieces = time.monotonic(), []
    try:
        process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment)
    except OSError as error:
        raise UserError(f"{line[0]}: {error.strerror}", "give a command after --") from None
    finally:
        os.close(its)
    # A piece may end within a letter.
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    # A terminal whose last writer is gone gives an error in place of an end.
    with contextlib.suppress(OSError):
        while data := os.read(ours, 65536):
            pieces.append((time.monotonic() - began, decoder.decode(data)))
    os.close(ours)
    return pieces, process.wait()


def kept_lines(pieces: list[Piece], columns: int) -> list[str]:
    """The lines that are left at the end; of a terminal, by an emulated one so wide that no line is broken on it.

    What was drawn anew over the picture before it is there once.
    """
    if not columns:
        return "".join(text for _, text in pieces).splitlines()
    import pyte

    screen = pyte.HistoryScreen(WIDE, LINES, history=100_000, ratio=0.001)
    stream = pyte.Stream(screen)
    for _, text in pieces:
        stream.feed(text)
    above = ["".join(line[column].data for column in range(WIDE)) for line in screen.history.top]
    return "\n".join(line.rstrip() for line in (*above, *screen.display)).rstrip("\n").split("\n")


def measure(line: list[str], columns: int, out: Path | None) -> dict[str, Any]:
    """The result without hardware and versions."""
    pieces, code = record(line, columns)
    if out is not None:
        head = {"version": 2, "width": columns or 80, "height": LINES, "command": " ".join(line)}
        rows = [json.dumps(head), *(json.dumps([round(at, 3), "o", text]) for at, text in pieces)]
        out.write_text("\n".join(rows) + "\n", encoding="utf-8")
    lines = kept_lines(pieces, columns)
    gaps = [later - earlier for (earlier, _), (later, _) in zip([(0.0, ""), *pieces], pieces, strict=False)]
    return {
        "command": line,
        "columns": columns,
        "exit_code": code,
        "seconds": pieces[-1][0] if pieces else 0.0,
        "lines": len(lines),
        "widest": max(map(width_of, lines), default=0),
        "too_wide": [one for one in lines if columns and width_of(one) > columns],
        "longest_silence_seconds": max(gaps, default=0.0),
    }


def format_result(result: dict[str, Any]) -> str:
    """The figures, and the lines that were too wide."""
    return "\n".join(
        (
            f"exit code {result['exit_code']} after {result['seconds']:,.1f} s; {result['lines']:,} lines, the widest "
            f"of {result['widest']:,} columns; silent for {result['longest_silence_seconds']:,.1f} s at most",
            f"wider than the terminal's {result['columns']}: {len(result['too_wide'])}" if result["columns"] else "",
            *(f"  {line}" for line in result["too_wide"]),
        )
    ).rstrip("\n")


def main() -> int:
    """Record, print, write."""
    parser = command.parser("recording", __doc__)
    parser.add_argument("--columns", type=int, default=80, help="of the terminal; 0 = none, a pipe")
    parser.add_argument("--out", type=Path, help="file for the recording")
    parser.add_argument("--json", type=Path, help="file for the result")
    parser.add_argument("line", nargs="+", metavar="COMMAND")
    arguments = parser.parse_args()
    return command.run(
        lambda: measure(arguments.line, arguments.columns, arguments.out), format_result, arguments.json, "recording"
    )


if __name__ == "__main__":
    sys.exit(main())
