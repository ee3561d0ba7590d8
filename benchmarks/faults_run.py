"""The run that faults happen to: tiny but real, its commands, and whether it ends bit for bit as an undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from benchmarks import machine
from daramgpt import checkpoint
from daramgpt.engine import without_rank
from daramgpt.ledger import entries
from daramgpt.run_directory import RunDirectory

ROOT = Path(__file__).parents[1]
# Beginning of the name of the temporary folder that all of it lies in.
FOLDER = "daramgpt-faults-"
# Of the kept files, those that say where a training stands: weights and both moments.
COMPARED = ("weights", "exp_avg", "exp_avg_sq")
# Checkpoints of 80 MB, so that saving and removing last long enough to be hit, and steps of a fraction of a second.
_RECIPE = """
[corpus]
made_megabytes = 0.3
[curriculum]
context_tokens = 32
heldout_fraction = 0.05
[[curriculum.stages]]
name = "web"
corpus = "web"
take = "5KB"
unit = "sentence"
[[curriculum.stages]]
name = "written"
corpus = "written"
take = "4KB"
unit = "paragraph"
[teacher]
precision = "int8"
{teacher}
[student]
n_embd = {width}
n_head = 4
n_layer = 2
[optimizer]
batch_tokens = 256
[engine]
ds_config = "cpu"
micro_batch_rows = 4
[checkpoint]
every_minutes = 0.0001
keep = 2
[evaluation]
baseline = false
# On the way it is measured at the end of each stage: more would take longer than all else.
points = 1
point_tokens = 256
"""
_TRAINED_TEACHER = "[teacher.train]\nn_embd = 32\nn_head = 2\nn_layer = 1\nvocab_size = 600"
# Weights and moments by name -> sha256 of their file, by step.
States = dict[int, dict[str, str]]


def environment() -> dict[str, str]:
    """As launch.sh starts a training, on the CPU, which gives the same bits every time."""
    found = without_rank(os.environ)
    found |= {**machine.SIDE_ENVIRONMENT, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    return found | {"CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}


class Program:
    """Commands in forks of a process that has imported the program: a second each instead of many."""

    def __enter__(self) -> Program:
        line = [sys.executable, "-P", "-m", "benchmarks.faults_program"]
        self._process = subprocess.Popen(
            line, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment()
        )
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def __call__(self, arguments: list[str], output: Path, full: dict[str, str] | None = None) -> int:
        """The exit code of a command.

        Args:
            arguments: of ``python -m daramgpt``.
            output: file for what it prints.
            full: makes the disk full, as of `faults_program.fill_before`.
        """
        assert self._process.stdin is not None and self._process.stdout is not None
        job = {"arguments": arguments, "output": str(output), "full": full}
        self._process.stdin.write(json.dumps(job) + "\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@dataclass(frozen=True)
class Tiny:
    """A run directory and the recipe that it is of."""

    recipe: Path
    directory: RunDirectory

    def arguments(self, command: str, *options: str) -> list[str]:
        return [command, str(self.recipe), "--run", str(self.directory.path), *options]

    @property
    def output(self) -> Path:
        """What the last command printed."""
        return self.directory.path.with_suffix(".txt")

    def start(self, command: str, *options: str, marks: dict[str, str] | None = None) -> subprocess.Popen[bytes]:
        """A command as a process of its own, whose group it leads; `marks` go to its environment."""
        line = [sys.executable, "-P", "-m", "daramgpt", *self.arguments(command, *options)]
        with self.output.open("w") as output:
            return subprocess.Popen(
                line,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**environment(), **(marks or {})},
            )

    def said(self) -> str:
        return self.output.read_text(encoding="utf-8", errors="replace")

    def copy(self, path: Path) -> Tiny:
        """Of the run directory, in place of what lies at `path`."""
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.directory.path, path)
        return Tiny(self.recipe, RunDirectory(path))

    def state(self) -> tuple[int, dict[str, str]] | None:
        """Step and hashes of the checkpoint that the next session would take; None where it would begin anew.

        Raises:
            UserError: none verifies.
        """
        saved = checkpoint.newest(self.directory.checkpoints, lambda line: None)
        return None if saved is None else (int(saved.state["step"]), hashes(saved.path))

    def fault_at_the_end(self, expected: States) -> str | None:
        """In what the ended run differs from one that ended undisturbed; None where it does not."""
        end = max(expected)
        found = self.state()
        if found is None or found[0] != end:
            return f"the newest checkpoint is {found and found[0]}, not step {end}"
        if differing := [name for name in COMPARED if found[1][name] != expected[end][name]]:
            return f"{', '.join(differing)} differ"
        return None

    def metrics_steps(self) -> list[int]:
        return [entry["step"] for entry in entries(self.directory.metrics)]


def hashes(path: Path) -> dict[str, str]:
    """sha256 of weights and moments of a checkpoint that verifies, as its manifest has them."""
    manifest = json.loads((path / checkpoint.MANIFEST).read_text(encoding="utf-8"))
    return {name: manifest["files"][f"{name}.safetensors"]["sha256"] for name in COMPARED}


def prepared(folder: Path, program: Program) -> Tiny:
    """A run with shards, to whose student a teacher was trained before, and no plan yet.

    Raises:
        RuntimeError: a command failed.
    """
    first = Tiny(folder / "teacher.toml", RunDirectory(folder / "teacher"))
    first.recipe.write_text(_RECIPE.format(teacher=_TRAINED_TEACHER, width=16), encoding="utf-8")
    for command in ("prepare", "plan", "train"):
        must(first, program, command)
    run = Tiny(folder / "faults.toml", RunDirectory(folder / "prepared"))
    teacher = f"model = {json.dumps(str(first.directory.part('teacher').export))}"
    run.recipe.write_text(_RECIPE.format(teacher=teacher, width=512), encoding="utf-8")
    must(run, program, "prepare")
    return run


def must(run: Tiny, program: Program, command: str, *options: str) -> None:
    """Run a command that is not to fail.

    Raises:
        RuntimeError: it did.
    """
    code = program(run.arguments(command, *options), run.output)
    if code:
        raise RuntimeError(f"{command} ended with {code}:\n{run.said()[-3000:]}")


def planned(run: Tiny, program: Program, num_ranks: int, path: Path) -> Tiny:
    """A copy of a prepared run with a plan for so many ranks."""
    copy = run.copy(path)
    must(copy, program, "plan", *(["--num-gpus", str(num_ranks)] if num_ranks > 1 else []))
    return copy


def undisturbed(run: Tiny, path: Path) -> States:
    """Weights and moments of every step of a planned run that nothing happens to.

    Raises:
        RuntimeError: it failed.
    """
    copy = run.copy(path)
    code = copy.start("train", "--set", "checkpoint.keep=1000").wait()
    if code:
        raise RuntimeError(f"an undisturbed training ended with {code}:\n{copy.said()[-3000:]}")
    states: States = {}
    for step in copy.directory.checkpoints.glob("step-*"):
        if damage := checkpoint.fault(step):
            raise RuntimeError(f"{step} of an undisturbed training: {damage}")
        states[int(step.name.removeprefix("step-"))] = hashes(step)
    shutil.rmtree(copy.directory.path)
    return states


def tail(run: Tiny) -> str:
    """The last line that a command printed, for a finding."""
    lines = run.said().strip().splitlines()
    return lines[-1] if lines else ""


def one_refusal(output: str) -> str | None:
    """The line by which a command refused to go on; None where there is none, or more, or a traceback."""
    lines = [line for line in output.splitlines() if line.startswith("error: ")]
    return lines[0] if len(lines) == 1 and "Traceback" not in output else None
