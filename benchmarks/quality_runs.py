"""What comparisons of students share: the recipe of their runs, commands that prepare them, the gap to a teacher."""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import machine
from daramgpt import recipe as recipes
from daramgpt.errors import UserError

Row = dict[str, Any]
# Times that a student is measured on its way.
POINTS = 12
# Megabytes and units of the recipe's stages, in their order; `--scale` 1 is all that a sample of 60 MB gives.
STAGES = (
    ("web-1", "web", 2, "sentence"),
    ("unpublished", "unpublished", 1, "sentence"),
    ("web-2", "web", 10, "sentence"),
    ("wiki", "wiki", 5, "sentence"),
    ("written", "written", 10, "paragraph"),
)


def make_recipe(teacher: Path, corpus: Path, shape: tuple[int, int, int]) -> str:
    """The recipe `daramgpt` in what a sample of the corpora has of its five stages, begun with random weights."""
    loss = recipes.load("daramgpt").loss
    stages = "\n".join(
        f'[[curriculum.stages]]\nname = "{name}"\ncorpus = "{corpus_name}"\ntake = "{megabytes}MB"\nunit = "{unit}"\n'
        for name, corpus_name, megabytes, unit in STAGES
    )
    width, heads, blocks = shape
    return f"""[corpus]
dir = {json.dumps(str(corpus.resolve()))}
[curriculum]
context_tokens = 1024
{stages}
[teacher]
model = {json.dumps(str(teacher.resolve()))}
[student]
n_embd = {width}
n_head = {heads}
n_layer = {blocks}
[loss]
temperature = {loss.temperature}
[evaluation]
points = {POINTS}
point_tokens = {2**40}
"""


def parse_shape(text: str) -> tuple[int, int, int]:
    """Of ``"n_embd/n_head/n_layer"``.

    Raises:
        UserError: it is none.
    """
    try:
        width, heads, blocks = (int(number) for number in text.split("/"))
    except ValueError:
        raise UserError(f"--student {text} is no shape", "write it as n_embd/n_head/n_layer, such as 128/4/2") from None
    return width, heads, blocks


def prepared(recipe: Path, run: Path, settings: list[str], steps: Sequence[str]) -> Path:
    """A run directory, after those of the commands `prepare` and `plan` that it has not seen yet.

    Args:
        recipe: file.
        run: the directory.
        settings: of the recipe, ``key=value``.
        steps: names of the commands.
    """
    options = [option for setting in settings for option in ("--set", setting)]
    for step in steps:
        if not (run / ("plan.json" if step == "plan" else "shards/index.json")).is_file():
            checked([sys.executable, "-m", "daramgpt", step, str(recipe), "--run", str(run), *options])
    return run


def checked(line: list[str]) -> str:
    """What a command prints.

    Raises:
        UserError: it did not end well; its last line is told.
    """
    ended = subprocess.run(line, env={**os.environ, **machine.SIDE_ENVIRONMENT}, capture_output=True, text=True)
    if ended.returncode:
        last = (ended.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise UserError(f"{' '.join(line[1:5])}: {last}", "mend that and run the same command again")
    return ended.stdout


def gap_closed(rows: list[Row], teacher: float, baseline: str, names: Iterable[str]) -> dict[str, list[float]]:
    """By name, of each seed: the part of the way from the student that is named `baseline` to the teacher.

    Args:
        rows: of a result.
        teacher: its bits per byte.
        baseline: name of the student without a teacher.
        names: of the others.
    """
    start = {row["seed"]: row["bits_per_byte"] for row in rows if row["name"] == baseline}
    closed: dict[str, list[float]] = {name: [] for name in names}
    for row in rows:
        if row["name"] in closed and row["seed"] in start:
            begin = start[row["seed"]]
            closed[row["name"]].append((begin - row["bits_per_byte"]) / (begin - teacher))
    return closed


def format_gaps(closed: dict[str, list[float]]) -> list[str]:
    """A line a name that has any."""
    return [
        f"{name}: {statistics.fmean(shares):.1%} of the gap to the teacher closed "
        f"({min(shares):.1%} to {max(shares):.1%})"
        for name, shares in closed.items()
        if shares
    ]
