"""One command of daramgpt in this process, and where its seconds went, each counted once.

As a program: ``python -m benchmarks.startup_trace FILE COMMAND...`` runs the command as ``python -m daramgpt`` does and
writes its seconds by name as JSON. Time belongs to the innermost of what is watched: an import (by its library) or one
of `WATCHED`; what is left is the command's own.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

# By module: what is timed there, and under which name.
WATCHED: dict[str, dict[str, str]] = {
    "daramgpt.checkpoint": {"save": "checkpoint saved"},
    "daramgpt.doctor": {"check": "checks"},
    "daramgpt.engine": {"Distiller.__init__": "DeepSpeed engine, optimizer", "Distiller.step": "first step"},
    "daramgpt.planner": {"gemm_rate": "GEMM rate measured", "choose_teacher_precision": "teacher precision measured"},
    "daramgpt.shards": {"prepare": "shards checked"},
    "daramgpt.student": {"build": "student built"},
    "daramgpt.teacher": {"load": "teacher read, quantised, tried"},
}
FIRST_STEP = "first step"
OWN = "own code"
INTERPRETER = "interpreter"
# Set by the parent: Unix time at which it started this process.
STARTED = "DARAMGPT_STARTUP_BENCHMARK_STARTED"
COMPILER_MODULES = ("torch._dynamo", "torch._inductor")


class Trace:
    """Seconds by name; the innermost name takes them.

    Attributes:
        seconds: so far.
        first_step: Unix time at which the first step began; None before.
    """

    def __init__(self, started: float) -> None:
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.first_step: float | None = None
        self._names = [INTERPRETER]
        self._since = started

    def _charge(self) -> None:
        now = time.time()
        self.seconds[self._names[-1]] += now - self._since
        self._since = now

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Charge what happens inside to `name`."""
        self._charge()
        if name == FIRST_STEP and self.first_step is None:
            self.first_step = self._since
        self._names.append(name)
        try:
            yield
        finally:
            self._charge()
            self._names.pop()

    def watch_imports(self) -> None:
        """Time every import from now on, and what is `WATCHED` of each module once it is there."""
        # What an import statement ends up in when the module is not there yet.
        bootstrap: Any = importlib.import_module("importlib._bootstrap")
        find_and_load = bootstrap._find_and_load

        def timed(name: str, import_: Any) -> Any:
            with self(f"import {library(name)}"):
                module = find_and_load(name, import_)
            self._watch(name)
            return module

        bootstrap._find_and_load = timed

    def _watch(self, module_name: str) -> None:
        for path, name in WATCHED.get(module_name, {}).items():
            *holders, attribute = path.split(".")
            holder = functools.reduce(getattr, holders, sys.modules[module_name])
            function = getattr(holder, attribute)
            if not hasattr(function, "__wrapped__"):
                setattr(holder, attribute, self._timed(function, name))

    def _timed(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        @functools.wraps(function)
        def timed(*arguments: Any, **options: Any) -> Any:
            with self(name):
                return function(*arguments, **options)

        return timed

    def write(self, path: Path) -> None:
        """What there is by now, and when that is."""
        self._charge()
        result = {"seconds": self.seconds, "first_step": self.first_step, "written": self._since}
        path.write_text(json.dumps(result), encoding="utf-8")


def library(module: str) -> str:
    """Whose import a module's is: its own time goes to it, not that of what it imports."""
    if module.startswith(COMPILER_MODULES):
        return "torch's compiler"
    first = module.partition(".")[0]
    return first if first in ("torch", "transformers", "deepspeed", "bitsandbytes", "daramgpt") else "other libraries"


def main() -> int:
    file, *command = sys.argv[1:]
    trace = Trace(float(os.environ[STARTED]))
    with trace(OWN):
        trace.watch_imports()
        cli = importlib.import_module("daramgpt.cli")
        sys.argv = ["daramgpt", *command]
        try:
            cli.main()
            code: Any = 0
        except SystemExit as end:
            code = end.code
    trace.write(Path(file))
    return code if isinstance(code, int) else int(code is not None)


if __name__ == "__main__":
    sys.exit(main())
