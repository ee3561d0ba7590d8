"""Append-only record of the sessions of a run: what each began with, reached, took, and why it ended.

One JSON object a line. A session writes ``start``, a ``beat`` at each save and once a minute between them, and ``end``;
what else happened to the run stands between them as a ``note``. A session that was killed leaves no ``end``: the next
one writes it for it, with the hours up to its last beat. Sessions have names, not numbers, so that the ledgers of
two machines on which a run was continued can be put together. A line that was cut short is passed over.
"""

from __future__ import annotations

import json
import os
import secrets
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daramgpt.errors import UserError
from daramgpt.run_directory import open_regular, open_to_append, parse_json

DIED = "died"
# Beyond these, a number of a ledger is none: the year 5138, 300 years of training, a count that no machine gets to.
MOST_TIME, MOST_SECONDS, MOST_COUNT = 1e11, 1e10, 2**63


@dataclass(slots=True)
class Session:
    """One session, as the ledger has it.

    Attributes:
        number: in the order of their starts, from 1.
        training: what was trained: the student, or a part of the run.
        started, ended: Unix time of its first and its last line.
        first_step, step: optimizer steps at its start and at its last line; what was trained after its last save is in
            no checkpoint, and not in these.
        first_tokens, tokens: of the training at its start and at its last line.
        seconds: of training, saving included.
        save_seconds: longest save.
        reason: why it ended: ``done``, ``deadline``, ``interrupted``, ``out of memory``, ``failed``, ``re-placed`` (it
            went on with the end of the schedule elsewhere), ``went back`` (to the newest checkpoint, see the notes);
            ``died`` where it did not say.
        is_recorded: whether an end was written, by itself or by the session after it.
    """

    number: int
    training: str
    started: float
    ended: float
    machine: str
    first_step: int
    step: int
    first_tokens: int
    tokens: int
    seconds: float
    save_seconds: float
    reason: str
    is_recorded: bool


class Ledger:
    """The ledger of one run and its parts; `start` begins a session and the other calls belong to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._name = ""

    def start(self, training: str, machine: str, step: int, tokens: int) -> None:
        """Begin a session, after writing the end of those that died without one."""
        for name, session in _by_name(entries(self.path)).items():
            if not session.is_recorded:
                facts = {"step": session.step, "tokens": session.tokens, "seconds": session.seconds}
                # At the time of its last beat: it has not lasted until now.
                self._append("end", name, **facts, reason=DIED, time=session.ended)
        self._name = secrets.token_hex(4)
        self._append("start", self._name, training=training, machine=machine, step=step, tokens=tokens, seconds=0.0)

    def beat(self, step: int, tokens: int, seconds: float, save_seconds: float = 0.0) -> None:
        """Of the session so far, `step` and `tokens` of its last save; `save_seconds` of the one that was just made."""
        facts = {"save_seconds": round(save_seconds, 3)} if save_seconds else {}
        self._append("beat", self._name, step=step, tokens=tokens, seconds=round(seconds, 3), **facts)

    def end(self, step: int, tokens: int, seconds: float, reason: str) -> None:
        """End the session."""
        self._append("end", self._name, step=step, tokens=tokens, seconds=round(seconds, 3), reason=reason)

    def note(self, **facts: Any) -> None:
        """Record what is no session: a new plan, rows passed over."""
        self._append("note", self._name, **facts)

    def _append(self, event: str, session: str, **fields: Any) -> None:
        line = json.dumps({"event": event, "session": session, "time": round(time.time(), 3), **fields})
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(open_to_append(self.path), "a+b") as file:
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
    """The whole lines of a file of JSON objects, in order; broken ones are passed over.

    Raises:
        UserError: there is something else in its place.
    """
    try:
        with open(path, encoding="utf-8", errors="replace", opener=open_regular) as file:
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}", "bring back a copy, or remove it") from None
    for line in text.splitlines():
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict):
            yield entry


def sessions(path: Path) -> list[Session]:
    """All sessions of a ledger; none where there is no ledger."""
    return list(_by_name(entries(path)).values())


def identity(path: Path) -> str:
    """A name of the run that its ledger takes along to other machines: that of its first session; empty before one."""
    return next((str(entry["session"]) for entry in entries(path) if entry.get("event") == "start"), "")


def notes(path: Path) -> list[dict[str, Any]]:
    """All notes of a ledger, with their ``time``."""
    return [entry for entry in entries(path) if entry.get("event") == "note"]


def seconds_used(path: Path) -> float:
    """Seconds of training over all sessions."""
    return sum(session.seconds for session in sessions(path))


def merged(first: Path, second: Path) -> str:
    """The lines of two ledgers of one run, each once: those of the first, then what the second has beyond them."""
    lines = dict.fromkeys(json.dumps(entry) for path in (first, second) for entry in entries(path))
    return "".join(f"{line}\n" for line in lines)


def _by_name(lines: Iterable[dict[str, Any]]) -> dict[str, Session]:
    found: dict[str, Session] = {}
    for entry in lines:
        try:
            name, step, tokens = str(entry["session"]), int(entry["step"]), int(entry["tokens"])
            at, seconds = float(entry["time"]), float(entry["seconds"])
            save_seconds = float(entry.get("save_seconds", 0.0))
            if not (
                0 <= at < MOST_TIME
                and 0 <= seconds < MOST_SECONDS
                and 0 <= save_seconds < MOST_SECONDS
                and 0 <= step < MOST_COUNT
                and 0 <= tokens < MOST_COUNT
            ):
                continue
            if entry["event"] == "start":
                training, machine = str(entry["training"]), str(entry["machine"])
                found[name] = Session(
                    len(found) + 1, training, at, at, machine, step, step, tokens, tokens, 0.0, 0.0, DIED, False
                )
            elif name in found and entry["event"] in ("beat", "end"):
                session = found[name]
                session.ended, session.step, session.tokens, session.seconds = at, step, tokens, seconds
                session.save_seconds = max(session.save_seconds, save_seconds)
                if entry["event"] == "end" and (entry["reason"] != DIED or not session.is_recorded):
                    # Its own end counts, where another machine took it for dead.
                    session.reason, session.is_recorded = str(entry["reason"]), True
        except (KeyError, TypeError, ValueError, OverflowError, OSError):
            continue
    return found
