"""The sides of the speed measurement, each in a process of its own so that peaks of memory do not mix.

A side is built and then runs a repetition, or a step of another size, whenever it is asked to: the caller asks the
sides in turn, so that whatever else the machine does falls on all of them alike. Teachers in fp32 are not copied into
memory but mapped from their file, so all sides that hold one share its pages.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks import ladder
from benchmarks.inputs import SHAPES, Inputs
from benchmarks.ladder import Settings, Work
from benchmarks.machine import SIDE_ENVIRONMENT, PeakMemory
from daramgpt import hardware
from daramgpt.engine import import_deepspeed


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
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Allocator and OpenMP read their settings when the process starts.
        os.environ.update(SIDE_ENVIRONMENT)
        self._process = context.Process(
            target=_serve, args=(name, shape, inputs_dir, settings, memory_cap_bytes, theirs), daemon=True
        )
        self._process.start()
        theirs.close()
        self.row: Ready = self._receive()

    def step(self, tokens: int | None = None) -> Repetition:
        """A repetition, or one step with a micro-batch of so many positions, in memory as little used as may be.

        Raises:
            OutOfMemoryError: the side has ended.
        """
        self._connection.send(tokens)
        return self._receive()

    def finish(self) -> None:
        """End the process."""
        self._connection.close()
        self._process.join()

    def _receive(self) -> Any:
        try:
            received = self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the side {self.name} ended with exit code {self._process.exitcode}; its message stands above"
            ) from None
        if isinstance(received, Exception):
            self.finish()
            raise received
        return received


def _serve(
    name: str, shape: str, inputs_dir: Path, settings: Settings, memory_cap_bytes: int, connection: Connection
) -> None:
    torch.set_num_threads(hardware.detect().num_cores)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        share = memory_cap_bytes / torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    inputs, memory = Inputs(inputs_dir), PeakMemory(device)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    # For all sides: transformers imports it as well, while a model is loaded.
    import_deepspeed(inputs.log)
    memory.start()
    try:
        row = ladder.build(name, SHAPES[shape], inputs, settings, device)
        connection.send(Ready(row.micro_batch_tokens, row.chunk_tokens, row.unit_tokens))
        while True:
            tokens = connection.recv()
            if tokens is not None:
                _return_freed_memory()
            memory.restart()
            _synchronise(device)
            start = time.perf_counter()
            work = row.step(tokens)
            _synchronise(device)
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


def _synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
