"""A side of a measurement in a process of its own: started as training is, asked and answering through a pipe."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from benchmarks.machine import SIDE_ENVIRONMENT
from daramgpt import hardware
from daramgpt.engine import import_deepspeed, without_rank
from daramgpt.errors import UserError


class SideProcess:
    """The process, started.

    Args:
        name: of the side.
        serve: what runs there, to be found by import; it ends when its pipe is closed.
        arguments: of `serve`, which gets its end of the pipe behind them.
    """

    def __init__(self, name: str, serve: Callable[..., None], *arguments: Any) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=serve, args=(*arguments, theirs), daemon=True)
        # The allocator reads its settings when the process starts. A rank that this process is may not be the side's.
        with _environment({**without_rank(os.environ), **SIDE_ENVIRONMENT}):
            self._process.start()
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the process."""
        assert self._process.pid is not None
        return self._process.pid

    def send(self, message: Any) -> None:
        """Ask it something."""
        self._connection.send(message)

    def has_answered(self, within_seconds: float) -> bool:
        """Wait so long at most for an answer."""
        return self._connection.poll(within_seconds)

    def receive(self) -> Any:
        """The next answer.

        Raises:
            RuntimeError: the process has ended instead.
        """
        try:
            return self._connection.recv()
        except EOFError:
            self._process.join()
            raise RuntimeError(
                f"the side {self.name} ended with exit code {self._process.exitcode}; its message stands above"
            ) from None

    def finish(self) -> None:
        """Close the pipe and wait until the process has ended of itself."""
        self._connection.close()
        self._process.join()

    def kill(self) -> None:
        """End the process, whatever it does."""
        self._connection.close()
        self._process.terminate()
        self._process.join()


def answer_of(work: Callable[..., Any], *arguments: Any) -> Any:
    """What `work` gives in a fresh process, started as training is; both are to be found by import.

    Raises:
        UserError: `work` has.
        RuntimeError: the process ended without an answer.
    """
    process = SideProcess(work.__name__, _answer, work, *arguments)
    answer, fault = process.receive()
    process.finish()
    if fault is not None:
        raise UserError(*fault)
    return answer


def _answer(work: Callable[..., Any], *arguments: Any) -> None:
    *given, connection = arguments
    torch.set_num_threads(hardware.detect().num_cores)
    try:
        connection.send((work(*given), None))
    except UserError as error:
        # An exception is pickled with the one argument that it prints.
        connection.send((None, (error.fault, error.mend)))


@contextmanager
def _environment(values: Mapping[str, str]) -> Iterator[None]:
    """Only these, in here."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(values)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def set_up(log: Path) -> torch.device:
    """In the process of a side: all cores, quiet libraries, and what transformers would import while a model is loaded.

    Args:
        log: takes what DeepSpeed prints as it is imported.

    Returns:
        the device of the side.
    """
    torch.set_num_threads(hardware.detect().num_cores)
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    import_deepspeed(log)
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronise(device: torch.device) -> None:
    """Wait for a GPU; a CPU is never ahead."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
