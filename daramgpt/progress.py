"""What a person sees while something runs: a live line in a terminal, rare plain lines elsewhere, all of it in a log.

`console` prints for people and appends to the run's ``log.txt``; what libraries log goes to that file alone.
`TrainingDisplay` shows the training and writes ``metrics.jsonl``, one object a logged step.
"""

from __future__ import annotations

import json
import logging
import sys
import time
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.live import Live
from rich.text import Text

from daramgpt.ledger import entries
from daramgpt.run_directory import write_atomically
from daramgpt.text_table import duration

# Without a terminal a line every so often is enough: a notebook keeps them all.
PLAIN_SECONDS = 20.0


class Console:
    """Lines for the user, kept in a log file too.

    Args:
        log: the run's ``log.txt``; None prints only.
        silent: neither print nor keep lines (ranks other than the first).
    """

    def __init__(self, log: Path | None = None, silent: bool = False) -> None:
        self.log, self.silent = log, silent
        self.rich = RichConsole(highlight=False, markup=False, emoji=False, soft_wrap=True)
        if log is not None:
            _route_libraries(log)

    def __call__(self, text: str = "") -> None:
        """Print a line (or several), and keep it."""
        if self.silent:
            return
        self.rich.print(text)
        self.keep(text)

    def keep(self, text: str) -> None:
        """Write to the log only."""
        if self.log is None:
            return
        stamp = datetime.now().strftime("%Y-%m-%d %H:%M:%S")
        with self.log.open("a", encoding="utf-8") as file:
            file.writelines(f"{stamp} {line}\n" for line in text.splitlines() or [""])


def _route_libraries(log: Path) -> None:
    """Send what libraries log or warn to the log file; the console is for what concerns the user."""
    log.parent.mkdir(parents=True, exist_ok=True)
    handler = logging.FileHandler(log, encoding="utf-8", delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    warnings.simplefilter("default")


class TrainingDisplay:
    """Live line and metrics of one training.

    Args:
        console: where lines go.
        metrics: ``metrics.jsonl``; lines from the resumed step on are dropped, as those steps are trained again.
        label: what is trained, for the line.
        num_steps: of the whole run.
        first_step: that this session begins with.
        shown: False on ranks other than the first, which show and write nothing.
    """

    def __init__(
        self, console: Console, metrics: Path, label: str, num_steps: int, first_step: int, shown: bool = True
    ) -> None:
        self.console, self.label, self.num_steps, self.shown = console, label, num_steps, shown
        self._live: Live | None = None
        self._last_line = time.monotonic()
        if not shown:
            return
        kept = [line for line in entries(metrics) if isinstance(line.get("step"), int) and line["step"] <= first_step]
        write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        if sys.stdout.isatty():
            self._live = Live(console=console.rich, refresh_per_second=4, transient=True)

    def __enter__(self) -> TrainingDisplay:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()
        if self.shown:
            self._metrics.close()

    def step(self, entry: dict[str, Any]) -> None:
        """Show and write one step; `entry` is a line of ``metrics.jsonl``."""
        if not self.shown:
            return
        self._metrics.write(json.dumps(entry) + "\n")
        self._metrics.flush()
        line = self._line(entry)
        now = time.monotonic()
        if self._live:
            self._live.update(Text(line, no_wrap=True, overflow="ellipsis"))
        if now - self._last_line >= PLAIN_SECONDS or entry["step"] == self.num_steps:
            self._last_line = now
            if self._live:
                self.console.keep(line)
            else:
                self.console(line)

    def _line(self, entry: dict[str, Any]) -> str:
        parts = [f"{self.label}: step {entry['step']}/{self.num_steps}", entry["stage"], f"loss {entry['loss']:.3f}"]
        if entry["kd"]:
            parts.append(f"kd {entry['kd']:.3f}")
        parts.append(f"ce {entry['ce']:.3f}")
        if entry.get("hidden"):
            parts.append(f"hidden {entry['hidden']:.3f}")
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{duration(3600 * entry['hours_left'])} left")
        return "  ".join(parts)
