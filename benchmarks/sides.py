"""The sides of the speed measurement, each in a process of its own so that peaks of memory do not mix.

A side is built and then runs a repetition, or a step of another size, whenever it is asked to: the caller asks the
sides in turn, so that whatever else the machine does falls on all of them alike. Teachers in fp32 are not copied into
memory but mapped from their file, so all sides that hold one share its pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks import ladder
from benchmarks.inputs import SHAPES, Inputs
from benchmarks.ladder import Work
from benchmarks.ladder_plan import Settings
from benchmarks.machine import PeakMemory
from benchmarks.side_process import SideProcess, set_up, synchronise


class LeftOutError(Exception):
    """A row that cannot be had here; the message says why."""


class OutOfMemoryError(Exception):
    """A side ran out of memory, and has ended."""


@dataclass(frozen=True)
class Repetition:
    """A repetition, the seconds it took, and the most memory that the side held meanwhile."""

    work: Work
    seconds: float
    peak_memory_bytes: int


@dataclass(frozen=True)
class Ready:
    """What a side says of its row once it is built; see `benchmarks.ladder.Row`."""

    micro_batch_tokens: int
    chunk_tokens: int
    unit_tokens: int


class Side:
    """A side in its own process.

    Args:
        name: of a row of the ladder or of a peer.
        shape: a key of `benchmarks.inputs.SHAPES`.
        inputs_dir: what `benchmarks.inputs.make` wrote.
        settings: of the plan.
        memory_cap_bytes: of a GPU, that torch may take.

    Raises:
        LeftOutError: its libraries are not there.
        OutOfMemoryError: its models do not fit.
    """

    def __init__(self, name: str, shape: str, inputs_dir: Path, settings: Settings, memory_cap_bytes: int) -> None:
        self.name = name
        self._process = SideProcess(name, _serve, name, shape, inputs_dir, settings, memory_cap_bytes)
        self.row: Ready = self._receive()

    def step(self, tokens: int | None = None) -> Repetition:
        """A repetition, or one step with a micro-batch of so many positions, in memory as little used as may be.

        Raises:
            OutOfMemoryError: the side has ended.
        """
        self._process.send(tokens)
        return self._receive()

    def finish(self) -> None:
        """End the process."""
        self._process.finish()

    def _receive(self) -> Any:
        received = self._process.receive()
        if isinstance(received, Exception):
            self.finish()
            raise received
        return received


def _serve(
    name: str, shape: str, inputs_dir: Path, settings: Settings, memory_cap_bytes: int, connection: Connection
) -> None:
    inputs = Inputs(inputs_dir)
    device = set_up(inputs.log)
    if device.type == "cuda":
        share = memory_cap_bytes / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    memory = PeakMemory(device)
    memory.start()
    try:
        row = ladder.build(name, SHAPES[shape], inputs, settings, device)
        connection.send(Ready(row.micro_batch_tokens, row.chunk_tokens, row.unit_tokens))
        while True:
            tokens = connection.recv()
            if tokens is not None:
                _return_freed_memory()
            memory.restart()
            synchronise(device)
            start = time.perf_counter()
            work = row.step(tokens)
            synchronise(device)
            connection.send(Repetition(work, time.perf_counter() - start, memory.read_bytes()))
    except EOFError:
        # The caller closes its end when it needs no more.
        return
    except ImportError as error:
        connection.send(LeftOutError(f"{type(error).__name__}: {str(error).splitlines()[0]}"))
    except torch.OutOfMemoryError:
        connection.send(OutOfMemoryError(name))


def _return_freed_memory() -> None:
    """Give back to the system what the process has freed, such as that of loading: later steps would hide in it."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)
