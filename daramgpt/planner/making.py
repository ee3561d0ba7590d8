"""Choose what the recipe leaves open, predict memory and hours, and freeze it: the plan before any probe.

The micro-batch is the largest that fits by `memory`, up to where a CPU gains nothing more; a probe may then find that a
smaller one is faster. Everything here is a function of its arguments: the same ones give the same plan, but for the
speed, where that is timed.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeAlias

from daramgpt import ds_config as ds_configs
from daramgpt.blocks import block_pairs
from daramgpt.errors import UserError
from daramgpt.planner import speed
from daramgpt.planner.memory import Memory, needed_memory
from daramgpt.planner.rates import Rates
from daramgpt.planner.shapes import ModelShape, Step, recipe_shape, step_flops
from daramgpt.planner.timing import Timings
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory, write_json

# Beyond this many tokens a forward pass gains nothing on a CPU: products are large enough, buffers only grow.
CPU_MICRO_BATCH_TOKENS = 4096
# [tokens, vocabulary] elements of a buffer of the loss, at most, and what its tokens are a multiple of. On two cores
# with AMX chunks of 655 tokens took 1.64 s for 4,096 tokens of a vocabulary of 51,200 in bf16, 1,024 took 1.48 and
# 2,048 1.44; in fp32 5.44, 5.21 and 5.10.
CHUNK_ELEMENTS = 2**26
CHUNK_UNIT_TOKENS = 512
# Of the memory that the machine has, for the allocator's own waste and for other processes.
MEMORY_SHARE = 0.85

RatesOf: TypeAlias = Callable[[Step], Rates | Timings]


@dataclass(frozen=True)
class TrainingSetup:
    """What is settled before a training is planned: by its shards, its teacher and the machine.

    Attributes:
        context_tokens, vocab_size: of the shards; the latter of all models.
        teacher: None trains by plain cross-entropy.
        world_size: ranks.
        dtype: of the student's arithmetic.
        ds_config: name or file.
        device: ``"cpu"`` or ``"cuda"``.
    """

    context_tokens: int
    vocab_size: int
    teacher: ModelShape | None
    world_size: int
    dtype: str
    ds_config: str
    device: str


def first_step(recipe: Recipe, setup: TrainingSetup, teacher_precision: str) -> Step:
    """A rank's share of the recipe's batch in forward passes of the recipe's rows, or of one row where it leaves them
    open.

    Raises:
        UserError: the loss compares hidden states of blocks that are not there.
    """
    rows = recipe.engine.micro_batch_rows or 1
    # Every rank and every micro-batch gets whole rows, so the batch is rounded up to a multiple of them.
    multiple = setup.world_size * rows
    batch_rows = -(-max(1, recipe.optimizer.batch_tokens // setup.context_tokens) // multiple) * multiple
    step = Step(
        student=recipe_shape(recipe.student, setup.vocab_size, setup.context_tokens),
        teacher=setup.teacher,
        teacher_precision=teacher_precision,
        dtype=setup.dtype,
        context_tokens=setup.context_tokens,
        micro_batch_rows=rows,
        micro_batches=batch_rows // multiple,
        chunk_tokens=0,
        optimizer_kind=recipe.optimizer.kind,
        ds_config=ds_configs.load(setup.ds_config),
        world_size=setup.world_size,
        device=setup.device,
        is_by_document=recipe.curriculum.attention == "document",
        recomputes=recipe.engine.activation_checkpointing,
        compared_blocks=_compared_blocks(recipe, setup.teacher),
    )
    return in_passes(step, rows, recipe.engine.loss_chunk_tokens)


def _compared_blocks(recipe: Recipe, teacher: ModelShape | None) -> tuple[int, ...]:
    if teacher is None or not recipe.loss.hidden_weight:
        return ()
    return tuple(other for _, other in block_pairs(recipe.loss.hidden_blocks, recipe.student.n_layer, teacher.n_layer))


def in_passes(step: Step, rows: int, chunk_tokens: int | None = None) -> Step:
    """The same batch in forward passes of so many rows, the loss in chunks of its own size where none is given."""
    tokens = rows * step.context_tokens
    units = max(1, CHUNK_ELEMENTS // step.student.vocab_size // CHUNK_UNIT_TOKENS)
    chunk = chunk_tokens or min(tokens, units * CHUNK_UNIT_TOKENS)
    batch_rows = step.micro_batch_rows * step.micro_batches
    return replace(step, micro_batch_rows=rows, micro_batches=batch_rows // rows, chunk_tokens=chunk)


def fits(needed: Memory, memory_limit_bytes: int) -> bool:
    """Whether a device of that memory holds it with room to spare."""
    return needed.device_bytes <= MEMORY_SHARE * memory_limit_bytes


def fitting_rows(step: Step, memory_limit_bytes: int, chunk_tokens: int | None = None) -> list[int]:
    """Rows a forward pass that divide the rank's share of the batch and fit, rising; one row is not asked."""
    rows_a_rank = step.micro_batch_rows * step.micro_batches
    # Divisors leave no micro-batch part empty.
    divisors = [divisor for divisor in range(1, rows_a_rank + 1) if rows_a_rank % divisor == 0]
    return [
        rows
        for rows in divisors
        if rows == 1 or fits(needed_memory(in_passes(step, rows, chunk_tokens)), memory_limit_bytes)
    ]


def make_plan(
    recipe: Recipe,
    run: RunDirectory,
    setup: TrainingSetup,
    *,
    teacher_precision: str,
    num_rows: int,
    num_threads: int,
    memory_limit_bytes: int,
    flops_per_second: float,
    reasons: dict[str, str],
    rates: RatesOf | None = None,
) -> dict[str, Any]:
    """Choose what the recipe leaves open, predict, and freeze it in ``plan.json``.

    Args:
        recipe, run: whose plan.
        setup: of the training.
        teacher_precision: of the teacher's blocks.
        num_rows: of the shards; rows of one pass.
        num_threads: of a rank.
        memory_limit_bytes: of the device.
        flops_per_second: best measured rate of its matrix products.
        reasons: of what was chosen before, by choice.
        rates: gives those of the device for the step that is planned; without it no speed is predicted.

    Raises:
        UserError: a row, or the micro-batch that the recipe asks for, does not fit the memory; or the loss compares
            hidden states of blocks that are not there.
    """
    chunk_tokens, context_tokens = recipe.engine.loss_chunk_tokens, setup.context_tokens
    step = first_step(recipe, setup, teacher_precision)
    rows = recipe.engine.micro_batch_rows
    needed = needed_memory(step)
    if not fits(needed, memory_limit_bytes):
        raise UserError(
            f"{rows or 1} rows of {context_tokens} tokens need {needed.device_bytes / 1e9:.1f} GB, "
            f"{MEMORY_SHARE:.0%} of the device's {memory_limit_bytes / 1e9:.1f} GB may be taken",
            "lower engine.micro_batch_rows" if rows else "lower curriculum.context_tokens",
        )
    fitting = fitting_rows(step, memory_limit_bytes, chunk_tokens)
    if rows is None:
        most = max(1, CPU_MICRO_BATCH_TOKENS // context_tokens) if setup.device == "cpu" else fitting[-1]
        rows = max(divisor for divisor in fitting if divisor == 1 or divisor <= most)
    step = in_passes(step, rows, chunk_tokens)
    batch_rows = rows * step.micro_batches * step.world_size
    num_tokens = num_rows * recipe.curriculum.passes * context_tokens
    flops = step_flops(step.student, step.teacher, context_tokens)
    plan = {
        "context_tokens": context_tokens,
        "batch_rows": batch_rows,
        "micro_batch_rows": rows,
        "loss_chunk_tokens": step.chunk_tokens,
        "num_steps": -(-num_rows * recipe.curriculum.passes // batch_rows),
        "schedule": recipe.schedule.model_dump(),
        "learning_rate": recipe.optimizer.learning_rate,
        "num_threads": num_threads,
        "world_size": step.world_size,
        "dtype": step.dtype,
        "teacher_precision": teacher_precision if step.teacher else None,
        "ds_config": setup.ds_config,
        "reasons": reasons,
        "predicted": {
            **_predicted(step, rates, num_tokens),
            "largest_micro_batch_rows": fitting[-1],
            "model_flops_per_token": flops,
            "gemm_flops_per_second": flops_per_second,
            # No run goes faster than its matrix products alone.
            "fewest_hours": num_tokens * flops / flops_per_second / 3600 / step.world_size,
        },
        "student": asdict(step.student) | {"parameters": step.student.parameters},
    }
    write_json(run.plan, plan)
    return plan


def predicted_anew(
    plan: dict[str, Any], recipe: Recipe, setup: TrainingSetup, num_rows: int, rates: RatesOf | None
) -> dict[str, Any]:
    """The plan with memory, speed and hours of the micro-batch that it has now, which may not be the one it was made
    with.

    Args:
        plan: as from `make_plan`, its micro-batch exchanged.
        recipe, setup, num_rows, rates: as of `make_plan`.
    """
    # Where there is no teacher there is no precision, and nothing depends on it.
    step = first_step(recipe, setup, plan["teacher_precision"] or "fp32")
    step = in_passes(step, plan["micro_batch_rows"], plan["loss_chunk_tokens"])
    found = _predicted(step, rates, num_rows * recipe.curriculum.passes * setup.context_tokens)
    return {**plan, "predicted": {**plan["predicted"], **found}}


def _predicted(step: Step, rates: RatesOf | None, num_tokens: int) -> dict[str, Any]:
    """Memory, and where rates are known speed and hours, of a run of so many tokens."""
    needed = needed_memory(step)
    found: dict[str, Any] = {
        "memory_bytes": needed.device,
        "memory_total_bytes": needed.device_bytes,
        "host_memory_bytes": needed.host,
    }
    if rates is None:
        return found
    here = rates(step)
    tokens_per_second = speed.tokens_per_second(step, here)
    return {
        **found,
        "seconds_per_step": speed.step_seconds(step, here),
        "tokens_per_second": tokens_per_second,
        "hours": num_tokens / tokens_per_second / 3600,
        "rates": asdict(here),
    }
