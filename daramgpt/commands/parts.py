"""The trainings of a run, and the shards and the teacher that they share."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory

if TYPE_CHECKING:
    from daramgpt.shards import Shards
    from daramgpt.teacher import Teacher


def parts_of(recipe: Recipe, run: RunDirectory) -> list[tuple[str, Recipe, RunDirectory]]:
    """The trainings of a run in their order: label, recipe, directory."""
    parts = []
    if recipe.teacher is not None and recipe.teacher.train is not None:
        parts.append(("teacher", recipe.teacher_part(), run.part("teacher")))
    parts.append(("student", recipe, run))
    if recipe.evaluation.baseline:
        parts.append(("student without a teacher", recipe.baseline_part(), run.part("baseline")))
    return parts


def open_shards(run: RunDirectory) -> Shards:
    """Those of the run; its parts have none of their own.

    Raises:
        UserError: there are none, or not all of them.
    """
    from daramgpt.shards import Shards

    if not (run.shards / "index.json").is_file():
        raise UserError(f"{run.shards} holds no shards", "prepare the run first: python -m daramgpt prepare RECIPE")
    return Shards(run.shards)


def teacher_dir(recipe: Recipe, run: RunDirectory) -> Path:
    """Directory of the run's teacher; `run` is the run itself, not a part."""
    from daramgpt import teacher

    assert recipe.teacher is not None
    if recipe.teacher.model:
        return teacher.resolve(recipe.teacher.model, recipe.teacher.revision)
    return run.part("teacher").export


def load_teacher(part: Recipe, run: RunDirectory, plan: dict[str, Any]) -> Teacher:
    """The teacher of a training, on this rank's device in the plan's precision; `run` is the run itself."""
    import torch

    from daramgpt import teacher

    assert part.teacher is not None
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if torch.cuda.is_available() else None
    return teacher.load(
        teacher_dir(part, run),
        plan["teacher_precision"],
        teacher.DTYPES[plan["dtype"]],
        device,
        run.teacher_weights,
        part.teacher.half_accumulation,
    )


def export_teacher(part: Recipe, part_run: RunDirectory, run: RunDirectory) -> None:
    """The trained teacher as a Hugging Face directory, from which it is loaded like any other."""
    from daramgpt import checkpoint, export

    saved = checkpoint.newest(part_run.checkpoints)
    assert saved is not None
    record = {"checkpoint_sha256": saved.sha256}
    if not export.stands(part_run.export, record):
        tokenizer_dir = open_shards(run).tokenizer_dir
        model = export.restore_student(part.student, saved.weights(), tokenizer_dir)
        export.save_model(model, tokenizer_dir, part_run.export, record=record)
