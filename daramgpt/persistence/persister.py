"""Copies each checkpoint to all places, in a thread of its own, so that training does not wait for a network."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from daramgpt.persistence.contents import gather
from daramgpt.persistence.place import Place, Target
from daramgpt.run_directory import RunDirectory

# What is to be copied where: the target, and the training by the directory of its checkpoints; None = the small files.
Errand = tuple[Target, Path | None]


class Persister:
    """One worker thread that copies; a fault is a line, never an end of the training, and is tried again.

    Args:
        places: what gets the copies.
        run: the whole run.
        keep: newest checkpoints of each training that stay in a place.
        say: takes lines, from the worker thread too.
    """

    def __init__(self, places: Sequence[Target], run: RunDirectory, keep: int, say: Callable[[str], None]) -> None:
        self._places, self._run, self._keep, self._say = places, run, keep, say
        self._changed = threading.Condition()
        self._waiting: dict[Errand, Path | None] = {}
        self._failed: dict[Errand, Path | None] = {}
        self._current: tuple[Errand, Path | None] | None = None
        self._seconds: dict[Target, float] = {}
        self._worker: threading.Thread | None = None
        self._is_over = False

    @property
    def longest_seconds(self) -> float:
        """Seconds that copying one checkpoint to all places has taken at most; 0 before the first."""
        with self._changed:
            return sum(self._seconds.values())

    def submit(self, checkpoint: Path) -> None:
        """Have a checkpoint copied; one of the same training that still waits is left out. Returns at once."""
        with self._changed:
            for place in self._places:
                self._waiting.pop((place, checkpoint.parent), None)
                self._waiting[place, checkpoint.parent] = checkpoint
            self._try_again()
            if self._worker is None and self._places:
                # A daemon: a copy that hangs must not keep the process from ending.
                self._worker = threading.Thread(target=self._work, name="copies", daemon=True)
                self._worker.start()
            self._changed.notify_all()

    def busy_with(self) -> Path | None:
        """The checkpoint that is being copied and must not be removed now."""
        with self._changed:
            return self._current[1] if self._current else None

    def finish(self, timeout_seconds: float) -> bool:
        """Wait for the last copies, and say what was not copied; call it after the ledger's last line, which goes too.

        What failed is tried once more. Nothing can be submitted after it.

        Args:
            timeout_seconds: after which the session has to end all the same.

        Returns:
            Whether every place has the newest checkpoint of each training, and every hook was run to its end.
        """
        deadline = time.monotonic() + timeout_seconds
        with self._changed:
            if self._worker is not None:
                self._try_again()
                behind = {path for _, path in [*self._waiting.items(), *([self._current] if self._current else [])]}
                if titles := sorted(self._title(path) for path in behind if path is not None):
                    self._say(f"waiting for the copies of {', '.join(titles)}, {timeout_seconds:,.0f} s at most")
                for place in self._places:
                    if isinstance(place, Place):
                        # Last, so that it has all that was written while the checkpoints were copied.
                        self._waiting[place, None] = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._is_idle, max(0.0, deadline - time.monotonic()))
            self._is_over, self._worker = True, None
            lost = dict(self._failed)
            late = {**({self._current[0]: self._current[1]} if self._current else {}), **self._waiting}
            self._waiting.clear()
            self._changed.notify_all()
        if late:
            for place in self._places:
                place.stop()
        for (place, _), path in late.items():
            self._say(f"not copied to {place.name} within {timeout_seconds:,.0f} s: {self._title(path)}")
        for (place, _), path in lost.items():
            self._say(f"not copied to {place.name}: {self._title(path)}")
        return not late and not lost

    @property
    def _is_idle(self) -> bool:
        return not self._waiting and self._current is None

    def _try_again(self) -> None:
        for errand, path in self._failed.items():
            self._waiting.setdefault(errand, path)
        self._failed.clear()

    def _title(self, path: Path | None) -> str:
        if path is None:
            return "ledger and metrics"
        return str(path.relative_to(self._run.path)) if path.is_relative_to(self._run.path) else str(path)

    def _work(self) -> None:
        while True:
            with self._changed:
                self._current = None
                self._changed.notify_all()
                self._changed.wait_for(lambda: bool(self._waiting) or self._is_over)
                if self._is_over:
                    return
                errand = next(iter(self._waiting))
                path = self._waiting.pop(errand)
                self._current = errand, path
            self._copy(errand, path)

    def _copy(self, errand: Errand, path: Path | None) -> None:
        place, started = errand[0], time.monotonic()
        try:
            place.copy(gather(self._run, path), self._keep)
        except Exception as error:  # A thread that ended would leave all that follows uncopied, without a word.
            with self._changed:
                is_over = self._is_over
                # A newer one that waits will do; and a hook is run once with a checkpoint.
                if errand not in self._waiting and isinstance(place, Place):
                    self._failed[errand] = path
            if not is_over:
                self._say(f"{place.name}: {self._title(path)} could not be copied: {_line(error)}")
            return
        seconds = time.monotonic() - started
        if path is not None:
            with self._changed:
                is_first = place not in self._seconds
                self._seconds[place] = max(self._seconds.get(place, 0.0), seconds)
            if is_first:
                self._say(
                    f"{place.name}: {self._title(path)} copied in {seconds:,.1f} s, and so will be each that follows"
                )


def _line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return text if isinstance(error, OSError | ValueError) and text else f"{type(error).__name__}: {text}"
