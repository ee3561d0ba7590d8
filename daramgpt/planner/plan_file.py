"""``plan.json``: what a run's arithmetic was frozen to."""

from __future__ import annotations

import json
from typing import Any

from daramgpt.errors import UserError
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory

PLAN_KEYS = {
    "context_tokens",
    "batch_rows",
    "micro_batch_rows",
    "loss_chunk_tokens",
    "num_steps",
    "schedule",
    "learning_rate",
    "num_threads",
    "world_size",
    "dtype",
    "teacher_precision",
    "ds_config",
    "reasons",
    "predicted",
    "student",
}


def read_plan(run: RunDirectory) -> dict[str, Any] | None:
    """The frozen plan, or None where none was made.

    Raises:
        UserError: the file is there and is no plan.
    """
    try:
        plan = json.loads(run.plan.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{run.plan}: {error}", "remove it and plan again") from None
    missing = PLAN_KEYS - set(plan if isinstance(plan, dict) else ())
    if missing:
        raise UserError(f"{run.plan}: {', '.join(sorted(missing))} missing", "remove it and plan again")
    return plan


def with_smaller_micro_batch(plan: dict[str, Any]) -> dict[str, Any] | None:
    """The plan with at most half the rows a forward pass, its steps the same; None where one row is all there is."""
    rows_a_rank = plan["batch_rows"] // plan["world_size"]
    most = plan["micro_batch_rows"] // 2
    rows = max((divisor for divisor in range(1, most + 1) if rows_a_rank % divisor == 0), default=0)
    return with_micro_batch(plan, rows) if rows else None


def with_micro_batch(plan: dict[str, Any], rows: int) -> dict[str, Any]:
    """The plan with that many rows a forward pass, its steps the same; the loss takes no more tokens than there are."""
    assert plan["batch_rows"] % (rows * plan["world_size"]) == 0, f"{rows} rows leave part of a batch"
    chunk_tokens = min(plan["loss_chunk_tokens"], rows * plan["context_tokens"])
    return {**plan, "micro_batch_rows": rows, "loss_chunk_tokens": chunk_tokens}


def with_recipe(plan: dict[str, Any], recipe: Recipe) -> dict[str, Any]:
    """The plan with the learning rate and the schedule of the recipe, which a run may be told to change."""
    return {**plan, "learning_rate": recipe.optimizer.learning_rate, "schedule": recipe.schedule.model_dump()}
