"""How far something is and how long it will take, in a line now and then."""

from __future__ import annotations

import time
from collections.abc import Callable

from daramgpt.text_table import duration

FIRST_SECONDS, LINE_SECONDS = 2.0, 20.0


class Pace:
    """Says how much is left of something that takes longer than two seconds.

    Args:
        say: takes a line.
        label: what is done.
        total: amount of it, in any unit.
    """

    def __init__(self, say: Callable[[str], None], label: str, total: float) -> None:
        self.say, self.label, self.total, self.done = say, label, total, 0.0
        self._began = time.monotonic()
        self._next = self._began + FIRST_SECONDS

    def advance(self, amount: float, detail: str = "") -> None:
        """Count an amount that was done; `detail` goes into the line, if there is one."""
        self.done += amount
        now = time.monotonic()
        if now < self._next or not 0 < self.done < self.total:
            return
        self._next = now + LINE_SECONDS
        left = (now - self._began) * (self.total - self.done) / self.done
        self.say(f"{self.label}: {detail}{', ' if detail else ''}{self.done / self.total:.0%}, {duration(left)} left")
