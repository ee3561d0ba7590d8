"""A session: why it should stop before the end, and what its steps and saves take."""

from __future__ import annotations

import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Steps over which the speed shown and used for the deadline is averaged.
SPEED_WINDOW_STEPS = 20


class StopRequest:
    """Why a session should stop soon, if it should: its deadline, a signal, or a file that another process writes.

    Args:
        deadline: Unix time by which the session is to be over, saving included; None = none.
        file: its existence asks to stop; None = none.
    """

    def __init__(self, deadline: float | None, file: Path | None = None) -> None:
        self.file = file
        # By a clock that nobody sets: the other one may be put right in the middle of a session.
        self._ends_at = None if deadline is None else time.monotonic() + deadline - time.time()
        self._signalled = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests; a second SIGINT exits at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    @property
    def seconds_left(self) -> float | None:
        """Until the deadline; None where there is none."""
        return None if self._ends_at is None else self._ends_at - time.monotonic()

    def reason(self, seconds_needed: float) -> str | None:
        """``"interrupted"``, ``"deadline"`` or None.

        Args:
            seconds_needed: for one more step and a save.
        """
        if self._signalled or (self.file is not None and self.file.exists()):
            return "interrupted"
        if self._ends_at is not None and time.monotonic() + seconds_needed > self._ends_at:
            return "deadline"
        return None


@dataclass(slots=True)
class Clock:
    """Seconds of this session, of its steps and of its saves."""

    started: float
    used_before: float
    save_seconds: float = 1.0
    token_seconds: float = 0.0
    most_tokens: int = 0
    step_started: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def step_starts(self) -> float:
        """Now, kept as the beginning of a step."""
        self.step_started = time.monotonic()
        return self.step_started

    def seconds_for_another_step(self, num_tokens: int) -> float:
        """Until a step of so many tokens, after the one that is being computed, would be over."""
        average, elapsed = self.token_seconds * num_tokens, time.monotonic() - self.step_started
        # On a GPU the step is queued long before it is over; the first one has no average to go by.
        return max(0.0, average - elapsed) + max(average, elapsed)

    def stepped(self, seconds: float, num_tokens: int) -> None:
        """Average the seconds a token of the steps, the newest ones weighing most.

        A step of few tokens, as the last one may be, takes long for each of them and says as little about the others.
        """
        self.most_tokens = max(self.most_tokens, num_tokens)
        weight = num_tokens / self.most_tokens / SPEED_WINDOW_STEPS if self.token_seconds else 1.0
        self.token_seconds += weight * (seconds / num_tokens - self.token_seconds)
