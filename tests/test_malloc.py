"""Memory that goes back to the system where it is told to, under the settings that launch.sh exports."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import contextlib, sys
from pathlib import Path
import numpy as np
from daramgpt import malloc

def anonymous_megabytes():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) // 1000

before = anonymous_megabytes()
with malloc.large_blocks_returned() if sys.argv[1] == "returned" else contextlib.nullcontext():
    kept = []
    for number in range(40):
        # A small block stays above each large one, and each large one is larger than those before.
        block = np.ones((number + 10) * 1_000_000, dtype=np.uint8)
        kept.append(np.ones(500_000, dtype=np.uint8))
        del block
print(anonymous_megabytes() - before - 20)
again = np.ones(50_000_000, dtype=np.uint8)
del again
print(anonymous_megabytes() - before - 20)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks /proc for its memory")
def test_large_blocks_are_kept_but_where_they_are_to_be_returned() -> None:
    megabytes = {}
    for how in ("kept", "returned"):
        output = subprocess.run(
            [sys.executable, "-c", PROGRAM, how],
            env={
                **os.environ,
                "PYTHONPATH": str(Path(__file__).parents[1]),
                "MALLOC_MMAP_THRESHOLD_": "34359738368",
                "MALLOC_TRIM_THRESHOLD_": "34359738368",
                "MALLOC_MMAP_MAX_": "0",
            },
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        megabytes[how] = [int(line) for line in output.split()]
    assert megabytes["kept"][0] > 40
    assert megabytes["returned"][0] < 10
    # Outside, everything is kept again.
    assert megabytes["returned"][1] > 40
