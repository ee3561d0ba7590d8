"""Commands in forks of one process that has imported the program, of which a fresh process takes seconds to import more
than it takes to run. What is to be killed, to get a signal or to run beside another is a process of its own instead.
"""

from __future__ import annotations

import atexit
from functools import cache
from pathlib import Path

from benchmarks.faults_run import Program


@cache
def _program() -> Program:
    program = Program()
    atexit.register(program.__exit__, None, None, None)
    return program.__enter__()


def run_forked(arguments: list[str], output: Path) -> int:
    """The exit code of ``python -m daramgpt`` with `arguments`; `output` takes what it prints."""
    return _program()(arguments, output)
