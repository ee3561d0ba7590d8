"""A program run as several ranks on this machine, connected as DeepSpeed's launcher would have them."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path

MOST_SECONDS = 600


def run_on_ranks(program: str, num_ranks: int, folder: Path, *arguments: str | Path) -> list[str]:
    """What each rank printed.

    Args:
        program: file of a Python program.
        num_ranks: processes, of a thread each.
        folder: takes what they print.
        arguments: of each.

    Raises:
        AssertionError: a rank failed, or they did not end in ten minutes.
    """
    for _ in range(3):
        codes, said = _run_once(program, num_ranks, folder, *arguments)
        if not any("EADDRINUSE" in text for text in said):
            break
    assert not any(codes), "\n".join(text[-3000:] for text in said)
    return said


def _run_once(program: str, num_ranks: int, folder: Path, *arguments: str | Path) -> tuple[list[int], list[str]]:
    """Codes and output; where another program took the port in the meantime, they say so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    outputs = [folder / f"rank-{rank}.txt" for rank in range(num_ranks)]
    ranks = []
    for rank, path in enumerate(outputs):
        variables = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": num_ranks, "OMP_NUM_THREADS": 1}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "DS_ACCELERATOR": "cpu"}
        variables["PYTHONPATH"] = str(Path(__file__).parents[1])
        with path.open("w") as output:
            ranks.append(
                subprocess.Popen(
                    [sys.executable, "-W", "ignore", program, *map(str, arguments)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={**os.environ, **{name: str(value) for name, value in variables.items()}},
                )
            )
    try:
        codes = [process.wait(timeout=MOST_SECONDS) for process in ranks]
    except subprocess.TimeoutExpired:
        codes = [1]
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    return codes, [path.read_text() for path in outputs]
