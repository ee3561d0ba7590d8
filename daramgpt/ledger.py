"""Append-only record of the sessions of a run: what each began with, reached, took, and why it ended.

One JSON object a line. A session writes ``start``, a ``beat`` at each save, and ``end``. A session that was killed
leaves no ``end``; what it trained after its last beat is not in any checkpoint either, so the beat is its account.
A last line that was cut short is passed over.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Session:
    """One session, as the ledger has it.

    Attributes:
        training: what was trained: the student, or a part of the run.
        started: Unix time.
        first_step, step: optimizer steps at its start and at its last line.
        tokens: of the run at its last line.
        seconds: of training.
        reason: why it ended: ``done``, ``deadline``, ``interrupted``, ``out of memory``, ``failed``; ``died`` where no
            end was written.
    """

    number: int
    training: str
    started: float
    machine: str
    first_step: int
    step: int
    tokens: int
    seconds: float
    reason: str


class Ledger:
    """The ledger of one run and its parts; `start` begins a session and the other calls belong to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._number = 0

    def start(self, training: str, machine: str, step: int, tokens: int) -> None:
        # Not their number: one whose start was damaged is not among them.
        self._number = max((session.number for session in sessions(self.path)), default=0) + 1
        self._append("start", training=training, machine=machine, step=step, tokens=tokens, seconds=0.0)

    def beat(self, step: int, tokens: int, seconds: float) -> None:
        self._append("beat", step=step, tokens=tokens, seconds=round(seconds, 3))

    def end(self, step: int, tokens: int, seconds: float, reason: str) -> None:
        self._append("end", step=step, tokens=tokens, seconds=round(seconds, 3), reason=reason)

    def _append(self, event: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "session": self._number, "time": round(time.time(), 3), **fields})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a+b") as file:
            # A line cut short by a kill must not swallow this one.
            if file.tell() and not _ends_with_newline(file):
                file.write(b"\n")
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())


def _ends_with_newline(file: Any) -> bool:
    file.seek(-1, os.SEEK_END)
    return bool(file.read(1) == b"\n")


def entries(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects, in order; broken ones are passed over."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return
    for line in text.splitlines():
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict):
            yield entry


def sessions(path: Path) -> list[Session]:
    """All sessions of a ledger; none where there is no ledger."""
    found: dict[int, Session] = {}
    for entry in entries(path):
        try:
            number, step, tokens = int(entry["session"]), int(entry["step"]), int(entry["tokens"])
            if entry["event"] == "start":
                training, machine, started = str(entry["training"]), str(entry["machine"]), float(entry["time"])
                # Refuses a time that no calendar has.
                datetime.fromtimestamp(started)
                found[number] = Session(number, training, started, machine, step, step, tokens, 0.0, "died")
            elif number in found:
                session = found[number]
                session.step, session.tokens, session.seconds = step, tokens, float(entry["seconds"])
                if entry["event"] == "end":
                    session.reason = str(entry["reason"])
        except (KeyError, TypeError, ValueError, OverflowError, OSError):
            continue
    return list(found.values())


def seconds_used(path: Path) -> float:
    """Seconds of training over all sessions."""
    return sum(session.seconds for session in sessions(path))
