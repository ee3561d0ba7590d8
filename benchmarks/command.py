"""How the command of a measurement begins and ends: its parser, its progress, its result, its exit code."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import machine
from daramgpt import hardware
from daramgpt.errors import UserError


def parser(name: str, documentation: str | None) -> argparse.ArgumentParser:
    """Of ``python -m benchmarks.NAME``, described by the first line of the module's documentation."""
    assert documentation
    return argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=documentation.splitlines()[0])


def progress(line: str) -> None:
    """A line on standard error: standard output is the result's."""
    print(line, file=sys.stderr, flush=True)


def run(
    measure: Callable[[], dict[str, Any]],
    format_result: Callable[[dict[str, Any]], str],
    path: Path | None,
    what: str | None = None,
) -> int:
    """Measure, write the result, and print it below the machine and the seconds that it took.

    Args:
        measure: gives the result without hardware and versions.
        format_result: gives its table.
        path: file for the result; None = none.
        what: was measured, for the line above the table.

    Returns:
        the exit code: 0, or 2 where the user can mend what `measure` raised; a line says how.
    """
    start = time.monotonic()
    try:
        result = measure()
    except UserError as error:
        print(error, file=sys.stderr)
        return 2
    machine.write_result(result, path)
    print(", ".join(filter(None, (what, hardware.detect().describe(), f"{time.monotonic() - start:.0f} s"))))
    print(format_result(result))
    return 0
