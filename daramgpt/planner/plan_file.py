"""``plan.json``: what a run's arithmetic was frozen to."""

from __future__ import annotations

from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from daramgpt.errors import UserError
from daramgpt.recipe import Recipe, Schedule
from daramgpt.run_directory import RunDirectory, parse_json, read_text

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


Count = Annotated[int, Field(ge=1, le=2**40)]
Quantity = Annotated[float, Field(ge=0, le=1e30)]


class _Table(BaseModel):
    """Of a plan; what it has beyond its fields is for displays, or of another version."""

    model_config = ConfigDict(extra="allow", strict=True, allow_inf_nan=False)


class _Predicted(_Table):
    memory_bytes: dict[str, Quantity]
    memory_total_bytes: Quantity
    host_memory_bytes: dict[str, Quantity] = {}
    largest_micro_batch_rows: Count
    model_flops_per_token: Quantity
    gemm_flops_per_second: Quantity
    fewest_hours: Quantity
    tokens_per_second: Annotated[float, Field(gt=1e-9, le=1e30)] | None = None
    hours: Quantity | None = None


class _Trial(_Table):
    micro_batch_rows: Count
    tokens_per_second: Quantity | None
    hours: Quantity | None


class _Probe(_Table):
    reason: str = ""
    fastest_rows: Count | None = None
    largest_rows: int | None = None
    trials: list[_Trial] = []


class _Student(_Table):
    vocab_size: Count


class _Replaced(_Table):
    changes: list[str]


class _Plan(_Table):
    """What a plan needs to be one."""

    context_tokens: Count
    batch_rows: Count
    micro_batch_rows: Count
    loss_chunk_tokens: Count
    num_steps: Count
    schedule: Schedule
    learning_rate: Annotated[float, Field(gt=0)]
    num_threads: Annotated[int, Field(ge=1, le=4096)]
    world_size: Annotated[int, Field(ge=1, le=2**20)]
    dtype: Literal["fp32", "fp16", "bf16"]
    teacher_precision: Literal["llm-int8", "int8", "nf4", "bf16", "fp16", "fp32"] | None
    ds_config: str
    reasons: dict[str, str]
    predicted: _Predicted
    student: _Student
    probe: _Probe = _Probe()
    replaced: list[_Replaced] = []

    @model_validator(mode="after")
    def _rows_share_the_batch(self) -> Self:
        if self.batch_rows % (self.micro_batch_rows * self.world_size):
            raise ValueError(
                f"batch_rows {self.batch_rows} is no multiple of {self.micro_batch_rows} rows "
                f"on {self.world_size} ranks"
            )
        return self


def read_plan(run: RunDirectory) -> dict[str, Any] | None:
    """The frozen plan, or None where none was made.

    Raises:
        UserError: the file is there and is no plan.
    """
    try:
        plan = parse_json(read_text(run.plan))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{run.plan}: {error}", "remove it and plan again") from None
    missing = PLAN_KEYS - set(plan if isinstance(plan, dict) else ())
    if missing:
        raise UserError(f"{run.plan}: {', '.join(sorted(missing))} missing", "remove it and plan again")
    try:
        _Plan.model_validate(plan)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        key, message = ".".join(map(str, first["loc"])), first["msg"].removeprefix("Value error, ")
        raise UserError(f"{run.plan}: {key or 'plan'}: {message}", "remove it and plan again") from None
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
