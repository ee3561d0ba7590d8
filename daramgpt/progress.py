"""What a person sees while something runs: a live picture in a terminal, rare plain lines elsewhere, and a log.

`console` prints for people and appends to the run's ``log.txt``; what libraries log goes to that file alone.
`TrainingDisplay` shows the training and writes ``metrics.jsonl``, one object a logged step.
"""

from __future__ import annotations

import json
import logging
import os
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console as RichConsole
from rich.console import Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table

from daramgpt.ledger import entries
from daramgpt.run_directory import write_atomically
from daramgpt.text_table import duration, hung

# Without a terminal a line every so often is enough: a notebook keeps them all.
PLAIN_SECONDS = 20.0
# A notebook gives its commands a terminal, and keeps every picture that is drawn on it below the one before.
NOTEBOOKS = ("JPY_PARENT_PID", "JPY_SESSION_NAME", "COLAB_RELEASE_TAG", "KAGGLE_KERNEL_RUN_TYPE")


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
        """Print a line (or several), in a terminal broken between words, and keep it as it is."""
        if self.silent:
            return
        shown = text
        if self.rich.is_terminal:
            shown = "\n".join(piece for line in text.split("\n") for piece in hung(line, self.rich.width))
        self.rich.print(shown)
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


def _can_redraw() -> bool:
    """Whether the standard output is a terminal on which a picture can take the place of another."""
    is_dumb = os.environ.get("TERM", "dumb") in ("dumb", "unknown")
    return sys.stdout.isatty() and not is_dumb and not any(name in os.environ for name in NOTEBOOKS)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a training is measured against, and what is ahead of it.

    Attributes:
        stage_number, num_stages: of the stage in training, from 1.
        stage_share: of it that is trained.
        planned_tokens_per_second: None where no speed was planned.
        memory_limit_bytes: of the device.
        budget_hours: of the run.
        seconds_to_save: until the next checkpoint is due.
        seconds_to_end: of the session; None where nothing bounds it.
    """

    stage_number: int
    num_stages: int
    stage_share: float
    planned_tokens_per_second: float | None
    memory_limit_bytes: int
    budget_hours: float
    seconds_to_save: float
    seconds_to_end: float | None


class TrainingDisplay:
    """Live picture and metrics of one training.

    Args:
        console: where lines go.
        metrics: ``metrics.jsonl``; lines from the resumed step on are dropped, as those steps are trained again.
        label: what is trained, for the lines.
        num_steps: of the whole run.
        first_step: that this session begins with.
        outlook: asked for whenever a terminal's picture is drawn anew.
        send: gets each line of metrics too.
        shown: False on ranks other than the first, which show and write nothing.
    """

    def __init__(
        self,
        console: Console,
        metrics: Path,
        label: str,
        num_steps: int,
        first_step: int,
        outlook: Callable[[], Outlook] | None = None,
        send: Callable[[dict[str, Any]], None] | None = None,
        shown: bool = True,
    ) -> None:
        self.console, self.label, self.num_steps, self.shown = console, label, num_steps, shown
        self._outlook, self._send = outlook, send
        self._live: Live | None = None
        self._last_line = time.monotonic()
        self._held_out = ""
        if not shown:
            return
        kept = [line for line in entries(metrics) if isinstance(line.get("step"), int) and line["step"] <= first_step]
        write_atomically(metrics, "".join(json.dumps(line) + "\n" for line in kept))
        self._metrics = metrics.open("a", encoding="utf-8")
        for line in kept:
            self._keep_held_out(line)
        if _can_redraw():
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
        if self._send is not None:
            self._send(entry)
        self._keep_held_out(entry)
        line = self._line(entry)
        now = time.monotonic()
        if self._live:
            outlook = self._outlook() if self._outlook is not None else None
            self._live.update(picture(self.label, self.num_steps, entry, outlook, self._held_out))
        if now - self._last_line >= PLAIN_SECONDS or entry["step"] == self.num_steps:
            self._last_line = now
            if self._live:
                self.console.keep(line)
            else:
                self.console(line)

    def _keep_held_out(self, entry: dict[str, Any]) -> None:
        figures = entry.get("bits_per_byte")
        value = figures.get("all") if isinstance(figures, dict) else None
        if isinstance(value, float):
            self._held_out = f"{value:.4f} bits per byte at step {entry['step']:,}"

    def _line(self, entry: dict[str, Any]) -> str:
        parts = [f"{self.label}: step {entry['step']}/{self.num_steps}", entry["stage"], *_losses(entry, ("kd", "ce"))]
        parts.append(f"{entry['tokens_per_second']:,.0f} tokens/s")
        parts.append(f"{duration(3600 * entry['hours_left'])} left")
        return "  ".join(parts)


def _losses(entry: dict[str, Any], names: tuple[str, str]) -> list[str]:
    """The loss and its parts, those that are not trained on left out."""
    parts = [("loss", entry["loss"]), (names[0], entry["kd"]), (names[1], entry["ce"]), ("hidden", entry.get("hidden"))]
    return [f"{name} {value:.3f}" for name, value in parts if value or name == names[1]]


def picture(
    label: str, num_steps: int, entry: dict[str, Any], outlook: Outlook | None, held_out: str
) -> RenderableType:
    """A training as a terminal shows it: a bar, and below it a line each of what a person looks for.

    Args:
        label: what is trained.
        num_steps: of the whole run.
        entry: the newest line of metrics.
        outlook: what it is measured against; None leaves that out.
        held_out: the last figure of held-out text, empty before there is one.
    """
    step = entry["step"]
    head = Table.grid(padding=(0, 1), expand=True)
    for ratio in (None, 1, None, None):
        head.add_column(ratio=ratio, no_wrap=True)
    left = f"{duration(3600 * entry['hours_left'])} left"
    head.add_row(label, ProgressBar(total=max(1, num_steps), completed=step), f"{step / max(1, num_steps):.1%}", left)
    rows = [("step", f"{step:,} of {num_steps:,}, {entry['tokens']:,} tokens"), ("stage", entry["stage"])]
    speed = f"{entry['tokens_per_second']:,.0f} tokens/s"
    memory = f"{entry['peak_memory_bytes'] / 1e9:.1f} GB"
    hours = f"{entry['hours_used']:.2f} used"
    ahead = ""
    if outlook is not None:
        part = f", {outlook.stage_number} of {outlook.num_stages}" if outlook.num_stages > 1 else ""
        rows[1] = ("stage", f"{entry['stage']}{part}, {outlook.stage_share:.0%} of it")
        if outlook.planned_tokens_per_second:
            change = entry["tokens_per_second"] / outlook.planned_tokens_per_second - 1
            speed += f" ({change:+.0%} to the plan's {outlook.planned_tokens_per_second:,.0f})"
        memory += f" of {outlook.memory_limit_bytes / 1e9:.1f} GB"
        hours += f", {max(0.0, outlook.budget_hours - entry['hours_used']):.2f} left of {outlook.budget_hours:g}"
        ahead = f"saved in {duration(max(0.0, outlook.seconds_to_save))}"
        if outlook.seconds_to_end is not None:
            ahead += f", session ends in {duration(max(0.0, outlook.seconds_to_end))}"
    rows += [("loss", "  ".join(_losses(entry, ("distillation", "cross-entropy"))).removeprefix("loss "))]
    rows += [("held out", held_out), ("speed", speed), ("memory", memory), ("hours", hours), ("ahead", ahead)]
    if entry.get("skipped_steps"):
        rows.append(("fp16", f"{entry['skipped_steps']:,} steps skipped, loss scale {entry['loss_scale']:g}"))
    body = Table.grid(padding=(0, 2))
    body.add_column(style="dim", no_wrap=True)
    body.add_column(no_wrap=True, overflow="ellipsis")
    for name, text in rows:
        if text:
            body.add_row(f"  {name}", text)
    return Group(head, body)
