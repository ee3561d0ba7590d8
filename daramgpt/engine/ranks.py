"""DeepSpeed imported, kept quiet and kept from compiling, and the ranks of a training connected."""

from __future__ import annotations

import contextlib
import io
import logging
import os
from collections.abc import Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from daramgpt.errors import UserError

# Within which all ranks have to begin, and to come to what each of them does in a step.
MEETING_TIME = timedelta(minutes=30)
# For what the first rank does alone. Should it fail, its connection breaks, which the others notice at once.
LONGEST_WORK = timedelta(days=7)
# By which a launcher tells a process that it is one of several.
RANK_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def without_rank(environment: Mapping[str, str]) -> dict[str, str]:
    """For a process that a rank, or one that was the only rank, starts to be a training of its own."""
    return {name: value for name, value in environment.items() if name not in RANK_VARIABLES}


def import_deepspeed(log: Path) -> Any:
    """deepspeed, what it logs sent to `log`, and kept from compiling anything."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    log.parent.mkdir(parents=True, exist_ok=True)
    stream = _LogStream(log)
    with contextlib.redirect_stdout(stream):
        import deepspeed
        from deepspeed.utils import logger
    # Where it was imported before, its logger still writes to the console, or to the log of another run.
    for handler in logger.handlers:
        if type(handler) is logging.StreamHandler:
            handler.setStream(stream)
    # DeepSpeed finds out what it could compile by running the compiler, and compiles its shared-memory communication
    # on a CPU (90 s). None of its extensions is used here, so none is offered.
    deepspeed.ops.__dict__["__compatible_ops__"] = {}
    return deepspeed


def join_ranks(log: Path) -> Any:
    """deepspeed as from `import_deepspeed`, with the ranks of this training connected; alone without a launcher.

    Raises:
        UserError: the other ranks were not reached in time.
    """
    deepspeed = import_deepspeed(log)
    if "RANK" not in os.environ:
        _be_the_only_rank()
    try:
        backend = None if torch.cuda.is_available() else "gloo"
        deepspeed.init_distributed(dist_backend=backend, timeout=MEETING_TIME, verbose=False)
    except torch.distributed.DistError as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"the ranks of all nodes did not meet at {address}: {str(error).strip().splitlines()[0]}",
            "start every node's command within half an hour, with a --master-addr and --master-port that all reach",
        ) from error
    return deepspeed


@contextlib.contextmanager
def waiting_for_all() -> Iterator[None]:
    """Leave the block when every rank has, though one of them be at work in it for hours."""
    group = torch.distributed.new_group(backend="gloo", timeout=LONGEST_WORK)
    yield
    torch.distributed.barrier(group)
    torch.distributed.destroy_process_group(group)


def leave_ranks() -> None:
    """Disconnect from the other ranks, when all of them have come so far.

    A rank that ends while others are still connected to it can make them abort as they end.
    """
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


class Hosts:
    """The processes of all ranks, which agree on something without their devices.

    A group of its own, on the CPU: what it says is known without waiting for a GPU, and does not go between the
    collectives of the training. Two processes on two cores take 0.2 ms.

    Args:
        world_size: ranks; every one makes it at the same time.
    """

    def __init__(self, world_size: int) -> None:
        self._group = torch.distributed.new_group(backend="gloo") if world_size > 1 else None

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank; every rank calls it."""
        if self._group is None:
            return flag
        return self._largest([int(flag)]) == [1]

    def largest(self, number: int) -> int:
        """Of the ranks' numbers; every rank calls it."""
        return number if self._group is None else self._largest([number])[0]

    def have_same(self, number: int) -> bool:
        """Whether all ranks give the same number; every rank calls it."""
        if self._group is None:
            return True
        most, least = self._largest([number, -number])
        return most == -least

    def _largest(self, numbers: list[int]) -> list[int]:
        """Of each number over the ranks."""
        values = torch.tensor(numbers)
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MAX, group=self._group)
        return [int(number) for number in values.tolist()]

    def close(self) -> None:
        """Leave the group."""
        if self._group is not None:
            torch.distributed.destroy_process_group(self._group)
            self._group = None


class _LogStream(io.TextIOBase):
    """A text stream that appends to a file by its path, so that it stays usable for as long as a logger keeps it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, text: str) -> int:
        with self.path.open("a", encoding="utf-8") as file:
            return file.write(text)


def _be_the_only_rank() -> None:
    """What a launcher would set; without it DeepSpeed asks for mpi4py."""
    # The system chooses the port as it is opened: one that was seen to be free may be another program's by then.
    store = torch.distributed.TCPStore("127.0.0.1", 0, 1, is_master=True)
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(store.port))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
