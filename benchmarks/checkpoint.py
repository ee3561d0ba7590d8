"""Saving and loading a checkpoint: seconds, bytes and memory by phase, and what going on costs late in a run.

    python -m benchmarks.checkpoint [--shape small|full] [--repetitions N] [--json FILE]

The functions of training are timed where they stand: `checkpoint.save` on an engine that has done a step, and
`train.train` from its beginning to where its loop would take the first step. README.md defines every key.
"""

from __future__ import annotations

import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import transformers

from benchmarks import command, inputs, machine
from benchmarks.checkpoint_sides import ORDERS, Setup, Timed, bytes_of, load, resume, save
from benchmarks.side_process import answer_of
from daramgpt.errors import UserError

# Phases in which the bytes of the checkpoint pass through; the others compute.
MOVING = {"gather", "write", "hash", "sync", "verify", "prune", "read", "restore"}


def measure(shape: str, repetitions: int, folder: Path) -> dict[str, Any]:
    """The result without hardware and versions; the last checkpoints stay in ``folder/run/checkpoints``.

    Args:
        shape: a key of `inputs.SHAPES`.
        repetitions: of each save and load.
        folder: takes a run, which is made.

    Raises:
        UserError: no repetition.
    """
    if repetitions < 1:
        raise UserError(f"--repetitions {repetitions} is too few", "give 1 or more")
    transformers.logging.disable_progress_bar()
    measured = inputs.SHAPES[shape]
    # A text and a tokenizer as small as they come: nothing of a checkpoint depends on them but the length of a row.
    inputs.make(replace(inputs.SHAPES["small"], context_tokens=measured.context_tokens), folder)
    setup = Setup(measured, folder)
    command.progress("save")
    saved = answer_of(save, setup, repetitions)
    newest = max(setup.run.checkpoints.glob("step-*"))
    loads = []
    for number in range(repetitions):
        command.progress(f"load {number + 1} of {repetitions}")
        _forget_pages(newest)
        loads.append(answer_of(load, setup))
    command.progress("resume")
    size = bytes_of(newest)
    of_save, of_load = _middle(saved["saves"]), _middle(loads)
    resumed = answer_of(resume, setup)
    return {
        "shape": shape,
        "repetitions": repetitions,
        "save_seconds": of_save.seconds,
        "load_seconds": of_load.seconds,
        "checkpoint_bytes": size,
        "tensor_bytes": saved["tensor_bytes"],
        "save_peak_memory_bytes": saved["peak_bytes"],
        "rows": [*_rows("save", of_save, size), *_rows("load", of_load, size), *saved["others"]],
        "left_out": saved["left_out"],
        "resume": resumed,
        "resume_last_over_first": {order: _last_over_first(resumed, order) for order in ORDERS},
    }


def _middle(repetitions: list[Timed]) -> Timed:
    """The median one as a whole: medians of its phases might add up to more than that of the total."""
    return sorted(repetitions, key=lambda one: one.seconds)[(len(repetitions) - 1) // 2]


def _rows(name: str, timed: Timed, size: int) -> list[dict[str, Any]]:
    """The total, its phases, and what is left of it."""
    phases = {**timed.phases, "rest": timed.seconds - sum(timed.phases.values())}
    return [
        {"name": name, "seconds": timed.seconds, "bytes": size},
        *(
            {"name": f"{name}: {phase}", "seconds": seconds, "bytes": size if phase in MOVING else None}
            for phase, seconds in phases.items()
        ),
    ]


def _last_over_first(resumed: list[dict[str, Any]], order: str) -> float:
    first, *_, last = (one["seconds"] for one in resumed if one["order"] == order)
    return float(last / first)


def _forget_pages(folder: Path) -> None:
    """Have the next process read from the disk, not from the system's memory."""
    for path in folder.iterdir():
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    rows = []
    for row in result["rows"]:
        whole, _, phase = row["name"].partition(": ")
        size = None if row["bytes"] is None else row["bytes"] / 1e6
        rate = None if size is None else size / row["seconds"] if row["seconds"] else None
        cells = (row["seconds"], ".3f"), (size, ",.1f"), (rate, ",.0f")
        rows.append((f"  {phase}" if phase else whole, *(machine.format_cell(*cell) for cell in cells)))
    lines = [machine.format_table(("", "seconds", "MB", "MB/s"), rows)]
    lines += [f"{name} left out: {reason}" for name, reason in result["left_out"].items()]
    lines.append(
        f"while saving {result['save_peak_memory_bytes'] / 1e6:,.0f} MB above the engine's memory; "
        f"the tensors have {result['tensor_bytes'] / 1e6:,.0f} MB"
    )
    for order, ratio in result["resume_last_over_first"].items():
        steps = ", ".join(
            f"{one['seconds'] * 1e3:.2f} ms at step {one['step']:,}"
            for one in result["resume"]
            if one["order"] == order
        )
        lines.append(f"to the first batch, {order}: {steps}; last over first {ratio:.2f}")
    return "\n".join(lines)


def main() -> int:
    parser = command.parser("checkpoint", __doc__)
    parser.add_argument("--shape", choices=sorted(inputs.SHAPES), default="small", help="size of the student")
    parser.add_argument("--repetitions", type=int, default=3, help="of each save and load (default: 3)")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="daramgpt-checkpoint-") as folder:
        return command.run(
            lambda: measure(arguments.shape, arguments.repetitions, Path(folder)),
            format_result,
            arguments.json,
            f"{arguments.shape} student",
        )


if __name__ == "__main__":
    sys.exit(main())
