"""Damage to the files of a stopped run, and what training makes of it: detected, recovered or lost.

*Recovered*: training goes to its end, with the weights and moments of the undisturbed run, bit for bit. *Detected*: it
refuses in one line that names what is damaged, with exit code 2, and has changed nothing. Anything else is *lost*.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks.command import progress
from benchmarks.faults_program import TENSORS, WRITES
from benchmarks.faults_run import COMPARED, FOLDER, Program, States, Tiny, one_refusal, tail
from daramgpt.checkpoint import LATEST
from daramgpt.errors import UserError
from daramgpt.ledger import entries
from daramgpt.run_directory import RunDirectory, write_atomically

FILES = (*(f"{name}.safetensors" for name in TENSORS), "state.json", "manifest.json")
# The run that damage is done to is stopped so many steps before its end.
STEPS_LEFT = 2
# What the clock is set back by.
CLOCK_SECONDS = 10 * 24 * 3600
# Room beyond the copy on the small disk: a checkpoint more than it keeps, and what a save wants beside.
SMALL_DISK_BYTES = 256 * 2**20
MOST_SECONDS_TO_START = 120.0
SMALL_DISK = "daramgpt-small-disk-"
# A run directory of a case, wherever temporary files are.
_PLACE = re.compile(rf"/[^\s:]*(?:{FOLDER}|{SMALL_DISK})[^\s/:]*/(?:damaged|full)")


@dataclass(frozen=True)
class Case:
    """What is done to a run.

    Attributes:
        name: for the table.
        apply: does it.
        named: what a refusal has to name.
    """

    name: str
    apply: Callable[[RunDirectory], None]
    named: str


def truncate(path: Path) -> None:
    """To its first half."""
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def remove(path: Path) -> None:
    path.unlink()


def flip_bit(path: Path) -> None:
    """The lowest bit in the middle of the file."""
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


DAMAGES: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "emptied": empty,
    "removed": remove,
    "one bit flipped": flip_bit,
}
# `latest` as damage leaves it.
LATESTS = {"empty": "", "dangling": "step-99999999\n", "outside": "../../elsewhere/step-00000001\n"}


def newest(run: RunDirectory) -> Path:
    """The checkpoint of the most steps."""
    return max(run.checkpoints.glob("step-*"))


def set_clock_back(run: RunDirectory) -> None:
    """As seen by the next session: what the ledger has lies in the future."""
    moved = [{**entry, "time": entry["time"] + CLOCK_SECONDS} for entry in entries(run.ledger)]
    run.ledger.write_text("".join(json.dumps(entry) + "\n" for entry in moved), encoding="utf-8")


def damages() -> list[Case]:
    """All that is done to files of a stopped run."""

    def of_checkpoint(file: str, damage: Callable[[Path], None]) -> Callable[[RunDirectory], None]:
        return lambda run: damage(newest(run) / file)

    def of_latest(text: str) -> Callable[[RunDirectory], None]:
        return lambda run: write_atomically(run.checkpoints / LATEST, text)

    return [
        *(
            Case(f"{file} {how}", of_checkpoint(file, damage), file)
            for file in FILES
            for how, damage in DAMAGES.items()
        ),
        Case("latest missing", lambda run: remove(run.checkpoints / LATEST), LATEST),
        *(Case(f"latest {how}", of_latest(text), LATEST) for how, text in LATESTS.items()),
        Case("ledger.jsonl truncated", lambda run: truncate(run.ledger), "ledger.jsonl"),
        Case("metrics.jsonl truncated", lambda run: truncate(run.metrics), "metrics.jsonl"),
        Case("plan.json truncated", lambda run: truncate(run.plan), "plan.json"),
        Case("clock set back ten days", set_clock_back, "ledger.jsonl"),
    ]


def judged(code: int, output: str, named: str, has_changed: bool, fault: str | None) -> str:
    """The outcome of a case.

    Args:
        code: exit code of the training.
        output: what it printed.
        named: what a refusal has to name.
        has_changed: whether files other than logs and locks are others than before.
        fault: in what the run differs from the undisturbed one; None where it does not.
    """
    if code == 0 and fault is None:
        return "recovered"
    line = one_refusal(output)
    return "detected" if code == 2 and line is not None and named in line and not has_changed else "lost"


def kept(run: RunDirectory) -> dict[str, tuple[int, int, int]]:
    """What a refused training leaves alone: inode, size and time of the last change by file."""
    found = {}
    for path in (*run.checkpoints.rglob("*"), run.plan, run.metrics, run.ledger):
        if path.is_file():
            status = path.stat()
            found[str(path)] = (status.st_ino, status.st_size, status.st_mtime_ns)
    return found


def stopped(planned: Tiny, expected: States, path: Path) -> Tiny:
    """A copy of a planned run, trained until a few steps before its end.

    Raises:
        RuntimeError: it went on to its end, or failed.
    """
    run = planned.copy(path)
    process = run.start("train")
    while process.poll() is None and len(run.metrics_steps()) < max(expected) - STEPS_LEFT:
        time.sleep(0.01)
    process.terminate()
    code, state = process.wait(), run.state()
    if code or state is None or state[0] >= max(expected):
        raise RuntimeError(f"a training that was to stop ended with {code} at {state and state[0]}: {tail(run)}")
    return run


def measure(base: Tiny, expected: States, folder: Path, program: Program) -> tuple[list[dict[str, str]], str]:
    """Do all that there is to copies of a run that stopped on the way.

    Args:
        base: the run.
        expected: of the undisturbed one.
        folder: for the copies.
        program: runs the commands.

    Returns:
        rows of ``name``, ``outcome`` and ``said``, and how the disk was made full.
    """
    rows: list[dict[str, str]] = []

    def note(name: str, outcome: str, said: str) -> None:
        progress(f"{name}: {outcome}")
        # Where a run lay while it was damaged says nothing.
        rows.append({"name": name, "outcome": outcome, "said": _PLACE.sub("RUN", said)})

    for case in damages():
        run = base.copy(folder / "damaged")
        case.apply(run.directory)
        before = kept(run.directory)
        code = program(run.arguments("train"), run.output)
        has_changed = kept(run.directory) != before
        fault = _fault(run, expected) if code == 0 else None
        outcome = judged(code, run.said(), case.named, has_changed, fault)
        note(case.name, outcome, _said(run, case.named, fault if outcome == "lost" else None))
    note("two processes", *_two_processes(base.copy(folder / "damaged"), expected, program))
    with small_disk(base) as disk:
        for write in WRITES:
            run = base.copy((disk or folder) / "full")
            note(f"disk full before {write}", *_full_disk(run, write, disk, expected, program))
    return rows, "tmpfs" if disk else "RLIMIT_FSIZE"


def _fault(run: Tiny, expected: States) -> str | None:
    try:
        return run.fault_at_the_end(expected)
    except UserError as error:
        return str(error)


def _said(run: Tiny, named: str, fault: str | None) -> str:
    """What is wrong, else the line that names what was damaged, else the last one."""
    lines = (line for line in run.said().splitlines() if named in line)
    return fault or one_refusal(run.said()) or next(lines, tail(run))


def _two_processes(run: Tiny, expected: States, program: Program) -> tuple[str, str]:
    """The second is refused by the number of the first, which goes on to its end."""
    first = run.start("train")
    end, lock = time.monotonic() + MOST_SECONDS_TO_START, run.directory.path / ".lock"
    while first.poll() is None and lock.read_text() != str(first.pid) and time.monotonic() < end:
        time.sleep(0.01)
    second = Tiny(run.recipe, run.directory)
    output = run.output.with_name("second.txt")
    code = program(second.arguments("train"), output)
    was_alive = first.poll() is None
    first_code = first.wait()
    fault = f"the first ended with {first_code}: {tail(run)}" if first_code else _fault(run, expected)
    said = output.read_text(encoding="utf-8", errors="replace")
    if not was_alive:
        fault = "the first had ended before the second was refused"
    outcome = judged(code, said, str(first.pid), fault is not None, fault)
    # Two that both trained to the end are not recovered, whatever came out.
    return "detected" if outcome == "detected" else "lost", fault or one_refusal(said) or said[-200:]


def _full_disk(run: Tiny, write: str, disk: Path | None, expected: States, program: Program) -> tuple[str, str]:
    """Refused, with a checkpoint that verifies; with room again the same command ends as if nothing had happened."""
    before = run.state()
    full = {"write": write, **({"folder": str(disk)} if disk else {})}
    # What it prints goes elsewhere, as to a terminal.
    output = run.recipe.with_name("full-disk.txt")
    code = program(run.arguments("train"), output, full)
    said = output.read_text(encoding="utf-8", errors="replace")
    if disk:
        (disk / "ballast").unlink(missing_ok=True)
    fault = None
    try:
        after = run.state()
        if before is None or after is None or after[0] < before[0]:
            fault = f"the checkpoint of step {before and before[0]} is gone"
        elif any(after[1][name] != expected[after[0]][name] for name in COMPARED):
            fault = f"the checkpoint of step {after[0]} is another"
    except UserError as error:
        fault = str(error)
    outcome = judged(code, said, str(run.directory.path), fault is not None, fault or "refused")
    if outcome == "detected":
        again = program(run.arguments("train"), output)
        fault = f"with room again it ended with {again}" if again else _fault(run, expected)
    return "lost" if fault else outcome, fault or one_refusal(said) or said[-200:]


@contextlib.contextmanager
def small_disk(base: Tiny) -> Iterator[Path | None]:
    """A file system of its own in memory, with room for a copy; None where none may be mounted."""
    held = sum(path.stat().st_size for path in base.directory.path.rglob("*") if path.is_file())
    with tempfile.TemporaryDirectory(prefix=SMALL_DISK) as folder:
        size = f"size={held + SMALL_DISK_BYTES}"
        try:
            mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", size, "tmpfs", folder], capture_output=True)
        except OSError:
            mounted = None
        if mounted is None or mounted.returncode:
            yield None
            return
        try:
            yield Path(folder)
        finally:
            subprocess.run(["umount", folder], check=True)
