"""glibc's malloc, told what a program knows of its own memory; where there is another C library, nothing happens.

By default large blocks are mapped one by one and given back to the system when they are freed, and their pages are
faulted in anew at the next use: on a CPU that costs training and tokenising more than the arithmetic. Kept memory in
turn grows where large blocks of many sizes come and go once, as they do while weights are quantised.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
from collections.abc import Iterator

# Parameters of mallopt(3), by the numbers in malloc.h.
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -3, -4, -8
_NO_LIMIT = 2**31 - 1
_LARGE_BYTES = 1 << 20
# Of mallopt's own.
_MOST_MAPPED_BLOCKS = 65536


def keep_freed_memory() -> None:
    """Give no freed memory back to the system: the same will be needed again."""
    _mallopt(_M_TRIM_THRESHOLD, _NO_LIMIT)
    _mallopt(_M_MMAP_MAX, 0)


def share_one_heap() -> None:
    """Let threads started from now on share a heap instead of having one each."""
    _mallopt(_M_ARENA_MAX, 1)


def return_freed_memory() -> None:
    """Give back to the system what is free now, whatever the environment says."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def large_blocks_returned() -> Iterator[None]:
    """Inside, blocks of a megabyte or more go back to the system when they are freed, whatever the environment says."""
    is_kept = os.environ.get("MALLOC_MMAP_MAX_") == "0"
    if is_kept:
        _mallopt(_M_MMAP_THRESHOLD, _LARGE_BYTES)
        _mallopt(_M_MMAP_MAX, _MOST_MAPPED_BLOCKS)
    try:
        yield
    finally:
        if is_kept:
            _mallopt(_M_MMAP_MAX, 0)


def _mallopt(parameter: int, value: int) -> None:
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(parameter, value)
