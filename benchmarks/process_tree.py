"""Peak memory of a process and all its descendants, pages that they share counted once.

A thread looks every `INTERVAL_SECONDS` and adds up the proportional set sizes (proc(5), ``smaps_rollup``): a page that
three processes map counts as a third in each, so the sum over a tree counts it once. Pages shared with strangers, such
as those of a library that another program has loaded too, count in part. What rises and falls between two looks is not
seen.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from pathlib import Path
from types import TracebackType

from daramgpt.errors import UserError

INTERVAL_SECONDS = 0.2
_PROC = Path("/proc")


class PeakOfTree:
    """Watches a process and its descendants while the context lasts.

    Args:
        pid: of the process at the top, a child of this one that has not been waited for.

    Raises:
        UserError: this system does not say how memory is shared.
    """

    def __init__(self, pid: int) -> None:
        require_smaps_rollup()
        self._pid = pid
        self._peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakOfTree:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._ended.set()
        self._thread.join()

    @property
    def peak_bytes(self) -> int:
        """The largest sum so far."""
        return self._peak_bytes

    def _watch(self) -> None:
        while True:
            self._peak_bytes = max(self._peak_bytes, tree_bytes(self._pid))
            if self._ended.wait(INTERVAL_SECONDS):
                return


def require_smaps_rollup() -> None:
    """Refuse a system without proportional set sizes.

    Raises:
        UserError: there is no ``/proc/self/smaps_rollup``.
    """
    try:
        (_PROC / "self" / "smaps_rollup").read_bytes()
    except OSError:
        raise UserError(
            "memory that processes share cannot be measured: there is no /proc/self/smaps_rollup",
            "measure on Linux 4.14 or later",
        ) from None


def tree_bytes(pid: int) -> int:
    """Proportional set sizes of a process and its descendants, added up now; those that vanish meanwhile count 0."""
    return sum(map(_proportional_bytes, _tree(pid)))


def _tree(pid: int) -> list[int]:
    """The process and its descendants."""
    # By parent, not by /proc/PID/task/TID/children: kernels may be built without those.
    children = defaultdict(list)
    for path in _PROC.iterdir():
        if path.name.isdecimal() and (parent := _parent(path)) is not None:
            children[parent].append(int(path.name))
    found = [pid]
    for process in found:
        found += children[process]
    return found


def _parent(process: Path) -> int | None:
    try:
        status = (process / "stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # The name before is in brackets and may hold spaces and brackets itself.
    return int(status.rpartition(")")[2].split()[1])


def _proportional_bytes(pid: int) -> int:
    try:
        lines = (_PROC / str(pid) / "smaps_rollup").read_text(encoding="ascii").splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:")), 0)
