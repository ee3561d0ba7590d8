"""Letting a run's student continue texts, those of an option or those that are typed, beside its teacher if wanted."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING

from daramgpt import recipe as recipes
from daramgpt.commands.parts import load_teacher
from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory

if TYPE_CHECKING:
    from daramgpt.generate import Sampling, Writer


def generate(run: RunDirectory, prompt: str | None, compares: bool, max_new_tokens: int, sampling: Sampling) -> None:
    """Print what the exported student, and beside it the teacher, goes on with, as it is drawn.

    Args:
        run: whose student.
        prompt: text to continue, where empty the start of a document; None = every line of the standard input.
        compares: let the teacher continue it too, in the precision that the plan gives it.
        max_new_tokens: at most, of each.
        sampling: how they are drawn; every further line has the next seed.

    Raises:
        UserError: nothing is exported, or there is no teacher.
    """
    writers = _writers(run, compares)
    prompts = _typed(writers) if prompt is None else iter([prompt])
    for number, text in enumerate(prompts):
        drawn = replace(sampling, seed=sampling.seed + number)
        try:
            for name, writer in writers.items():
                print(f"{name}: {text}" if compares else text, end="", flush=True)
                for piece in writer.stream(text, max_new_tokens, drawn):
                    print(piece, end="", flush=True)
                print()
        except KeyboardInterrupt:
            # Of one who types: enough of this text, not of all.
            if prompt is not None or not sys.stdin.isatty():
                raise
            print()


def _writers(run: RunDirectory, compares: bool) -> dict[str, Writer]:
    from daramgpt.generate import Writer

    writers = {"student": Writer.load(run.export)}
    if compares:
        from daramgpt import planner

        recipe, plan = recipes.load(str(run.recipe)) if run.recipe.is_file() else None, planner.read_plan(run)
        if recipe is None or plan is None or recipe.teacher is None:
            raise UserError(f"--compare: the run in {run.path} has no teacher", "leave out --compare")
        writers["teacher"] = Writer(load_teacher(recipe, run, plan).model, writers["student"].tokenizer)
    return writers


def _typed(writers: dict[str, Writer]) -> Iterator[str]:
    """Lines as they come, up to the end of the input; whoever types is told what to do."""
    if not sys.stdin.isatty():
        for line in sys.stdin:
            yield line.rstrip("\n")
        return
    with contextlib.suppress(ImportError):
        # Gives `input` its history and its keys.
        import readline  # noqa: F401
    print(f"Type the beginning of a text, and {' and '.join(writers)} will go on with it; Ctrl-D ends.")
    while True:
        try:
            yield input("> ")
        except (EOFError, KeyboardInterrupt):
            print()
            return
