"""A shell command that is run with each checkpoint."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading

from daramgpt.persistence.contents import Contents
from daramgpt.persistence.place import PlaceError, Target


class Hook(Target):
    """A command for ``sh``; the checkpoint's path is its last argument, and stands in ``DARAMGPT_CHECKPOINT``.

    What it prints goes to the run's log. A save that is overtaken by the next one before its turn is left out.

    Args:
        command: as one would type it.
    """

    def __init__(self, command: str) -> None:
        self.command, self.name = command, f"hook {command}"
        self._process: subprocess.Popen[bytes] | None = None
        self._lock = threading.Lock()
        self._is_stopped = False

    def copy(self, contents: Contents, keep: int) -> None:
        if contents.path is None:
            return
        path = str(contents.path.resolve())
        with contents.log.open("ab") as log:
            with self._lock:
                if self._is_stopped:
                    raise PlaceError("the session is over")
                # A group of its own, so that all it started can be ended; Ctrl-C is for the training.
                self._process = subprocess.Popen(
                    ["/bin/sh", "-c", f'{self.command} "$@"', "sh", path],
                    env={**os.environ, "DARAMGPT_CHECKPOINT": path},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                )
            code = self._process.wait()
        if code:
            raise PlaceError(f"exit code {code}; what it said is in {contents.log}")

    def stop(self) -> None:
        """End the command and what it started."""
        with self._lock:
            self._is_stopped = True
            if self._process is not None and self._process.poll() is None:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(self._process.pid, signal.SIGKILL)
