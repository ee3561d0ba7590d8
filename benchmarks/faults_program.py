"""The program imported once; each command is a fork of it. One JSON object a line in, one exit code a line out.

A command may be given a disk that becomes full just before a certain write of its first save.
"""

from __future__ import annotations

import importlib
import json
import os
import resource
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import torch

# What the commands import by the way.
IMPORTED = (
    "transformers",
    "safetensors.torch",
    "daramgpt.cli",
    "daramgpt.commands.training",
    "daramgpt.planning",
    "daramgpt.shards.preparation",
    "daramgpt.train",
    "daramgpt.export",
)
TENSORS = ("weights", "exp_avg", "exp_avg_sq", "rng")
# The writes of a save, in their order.
WRITES = (*TENSORS, "state.json", "manifest.json", "latest")


def fill(folder: Path | None) -> None:
    """Take what room the file system of `folder` has; None = let no file of this process grow any more."""
    if folder is None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))
        return
    room = os.statvfs(folder)
    with (folder / "ballast").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, room.f_bavail * room.f_frsize)


def fill_before(write: str, folder: Path | None) -> None:
    """Fill the disk just before the first time that `write`, one of `WRITES`, is done in this process.

    What asks for room before it begins to write has found it by then, as where another program takes it meanwhile.
    """
    import safetensors.torch

    waiting = True

    def reached() -> None:
        nonlocal waiting
        if waiting:
            waiting = False
            fill(folder)

    if write in TENSORS:
        whole = safetensors.torch.save_file

        def save_file(
            tensors: dict[str, torch.Tensor], filename: str | os.PathLike[Any], metadata: dict[str, str] | None = None
        ) -> None:
            if Path(filename).stem == write:
                reached()
            whole(tensors, filename, metadata)

        safetensors.torch.save_file = save_file
        return

    def on_event(event: str, arguments: tuple[Any, ...]) -> None:
        if waiting and event == "open" and isinstance(arguments[0], (str, os.PathLike)) and arguments[1] == "w":
            path = Path(arguments[0])
            # `latest` is replaced by a file beside it.
            if (".writing-" in path.parent.name and path.name == write) or path.name.startswith(f".{write}."):
                reached()

    sys.addaudithook(on_event)


def run(job: dict[str, Any], output: int) -> NoReturn:
    """Be the command, print to a descriptor, and end with its exit code."""
    code = 1
    try:
        os.setsid()
        for descriptor, target in ((os.open(os.devnull, os.O_RDONLY), 0), (output, 1), (output, 2)):
            os.dup2(descriptor, target)
        if job["full"] is not None:
            fill_before(job["full"]["write"], Path(job["full"]["folder"]) if job["full"].get("folder") else None)
        sys.argv = ["daramgpt", *job["arguments"]]
        importlib.import_module("daramgpt.cli").main()
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)


def main() -> None:
    for name in IMPORTED:
        importlib.import_module(name)
    for line in sys.stdin:
        job = json.loads(line)
        # Not a file: what a full disk makes the command say is to be read too.
        said, output = os.pipe()
        child = os.fork()
        if not child:
            run(job, output)
        os.close(output)
        with os.fdopen(said, "rb") as pipe:
            Path(job["output"]).write_bytes(pipe.read())
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


if __name__ == "__main__":
    main()
