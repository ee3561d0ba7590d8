"""From `launch.sh` to the first training step: every second between them, by command and by what it was spent on.

The commands run as `launch.sh` runs them once it is installed and the shards are ready, each a process of its own:
status, doctor, prepare (which finds all done), plan, train. The teacher lies on the disk in fp32: the system is made to
forget its pages before each command. A step is one micro-batch here, and the session ends after it.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import transformers

from benchmarks import command, machine
from benchmarks.inputs import SHAPES, Inputs, Measured, make
from benchmarks.startup_trace import STARTED
from daramgpt import hardware
from daramgpt import recipe as recipes
from daramgpt.recipe import Student, Teacher

ROOT = Path(__file__).parents[1]
COMMANDS = ("status", "doctor", "prepare", "plan", "train")
OPTIONS = {"status": ["--quiet"], "train": ["--hours", "0.000001"]}
# What status answers where there is work left.
WORK_LEFT = 3
# Less is no row of the table.
SHOWN_SECONDS = 0.1


@dataclass(frozen=True)
class Command:
    """A command that has run.

    Attributes:
        name: of the command.
        seconds: wall clock of the process; of `train` to the beginning of its first step.
        cpu_seconds: of the process and its children, to its end.
        parts: seconds by what they were spent on, which sum up to those of the whole process.
        first_step_seconds: None where there was no step.
    """

    name: str
    seconds: float
    cpu_seconds: float
    parts: dict[str, float]
    first_step_seconds: float | None


def write_recipe(measured: Measured, inputs: Inputs, path: Path) -> None:
    """A recipe that distils the teacher of `inputs` on their corpus, one micro-batch a step."""
    quickstart = recipes.load("quickstart")
    recipe = quickstart.model_copy(
        update={
            "name": path.stem,
            "corpus": quickstart.corpus.model_copy(
                update={"dir": str(inputs.path / "run" / "corpora"), "made_megabytes": None}
            ),
            "curriculum": quickstart.curriculum.model_copy(
                update={"context_tokens": measured.context_tokens, "scale": measured.text_megabytes / 6.5}
            ),
            "teacher": Teacher(model=str(inputs.teacher_dir)),
            "student": Student(**measured.student.model_dump()),
            "optimizer": quickstart.optimizer.model_copy(
                update={"batch_tokens": measured.micro_batch_rows * measured.context_tokens}
            ),
            "engine": quickstart.engine.model_copy(
                update={"ds_config": "auto", "micro_batch_rows": measured.micro_batch_rows}
            ),
            "evaluation": quickstart.evaluation.model_copy(update={"baseline": False}),
        }
    )
    path.write_text(recipes.dump(recipe), encoding="utf-8")


def run(name: str, recipe: Path, folder: Path) -> Command:
    """Run a command to its end.

    Raises:
        RuntimeError: it failed.
    """
    trace = folder / f"trace-{name}.json"
    line = [sys.executable, "-P", "-m", "benchmarks.startup_trace", str(trace), name, str(recipe)]
    line += ["--run", str(folder / "run-directory"), *OPTIONS.get(name, [])]
    environment = {**os.environ, **machine.SIDE_ENVIRONMENT, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "true"}
    if not hardware.detect().gpus:
        environment["DS_ACCELERATOR"] = "cpu"
    before, start = _children_cpu_seconds(), time.time()
    done = subprocess.run(line, env={**environment, STARTED: repr(start)}, capture_output=True, text=True)
    end = time.time()
    if done.returncode not in (0, WORK_LEFT if name == "status" else 0):
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")
    found = json.loads(trace.read_text(encoding="utf-8"))
    parts = {**found["seconds"], "interpreter": found["seconds"]["interpreter"] + end - found["written"]}
    seconds, first_step = end - start, None
    if name == "train":
        assert found["first_step"] is not None, f"train did no step:\n{done.stdout[-2000:]}"
        seconds, first_step = found["first_step"] - start, parts["first step"]
    return Command(name, seconds, _children_cpu_seconds() - before, parts, first_step)


def measure(shape: str, folder: Path) -> dict[str, Any]:
    """The result: seconds to the first step, and the rows of the commands."""
    measured = SHAPES[shape]
    transformers.logging.disable_progress_bar()
    inputs = make(measured, folder)
    for file in inputs.shards().tokenizer_dir.iterdir():
        (inputs.teacher_dir / file.name).write_bytes(file.read_bytes())
    recipe = folder / "startup.toml"
    write_recipe(measured, inputs, recipe)
    run("prepare", recipe, folder)
    ran = [_environment_check()]
    for name in COMMANDS:
        _forget_pages(inputs)
        ran.append(run(name, recipe, folder))
    return {
        "shape": shape,
        "seconds_to_first_step": sum(one.seconds for one in ran),
        "first_step_seconds": ran[-1].first_step_seconds,
        "first_step_tokens": measured.micro_batch_rows * measured.context_tokens,
        "teacher_file_bytes": sum(path.stat().st_size for path in inputs.teacher_dir.glob("*.safetensors")),
        "rows": [
            {
                "name": one.name,
                "seconds": one.seconds,
                "cpu_seconds": one.cpu_seconds,
                "parts": dict(sorted(one.parts.items(), key=lambda part: -part[1])),
            }
            for one in ran
        ],
    }


def _forget_pages(inputs: Inputs) -> None:
    """Have the teacher read from the disk, not from the system's memory."""
    for path in inputs.teacher_dir.glob("*.safetensors"):
        with path.open("rb") as file:
            # Pages that are not on the disk yet cannot be forgotten.
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _environment_check() -> Command:
    """What launch.sh asks before it runs anything: whether its environment is still complete."""
    before, start = _children_cpu_seconds(), time.time()
    line = [sys.executable, "-P", "-B", "-m", "daramgpt.bootstrap", "key"]
    subprocess.run(line, env={**os.environ, "PYTHONPATH": str(ROOT)}, check=True, capture_output=True)
    seconds = time.time() - start
    return Command("launch.sh", seconds, _children_cpu_seconds() - before, {"environment checked": seconds}, None)


def _children_cpu_seconds() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def format_result(result: dict[str, Any]) -> str:
    """The table and what stands below it."""
    lines = []
    for row in result["rows"]:
        lines.append((row["name"], f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"))
        lines += [
            (f"  {name}", f"{seconds:.1f}", "") for name, seconds in row["parts"].items() if seconds >= SHOWN_SECONDS
        ]
    return "\n".join(
        [
            machine.format_table(("command", "seconds", "CPU seconds"), lines),
            f"{result['seconds_to_first_step']:.1f} s to the first training step, whose first "
            f"{result['first_step_tokens']:,} tokens took {result['first_step_seconds']:.1f} s more "
            f"(parts of train are those of the whole process); teacher {result['teacher_file_bytes'] / 1e9:.2f} GB",
        ]
    )


def main() -> int:
    parser = command.parser("startup", __doc__)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="small", help="size of the models")
    parser.add_argument("--json", type=Path, help="file for the result")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="daramgpt-startup-") as folder:
        return command.run(
            lambda: measure(arguments.shape, Path(folder)), format_result, arguments.json, f"{arguments.shape} models"
        )


if __name__ == "__main__":
    sys.exit(main())
