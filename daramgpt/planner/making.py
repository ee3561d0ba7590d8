"""Choose what the recipe leaves open, predict memory and hours, and freeze it: the plan before any probe.

The micro-batch is the largest that fits by `memory`, up to where a CPU gains nothing more; a probe may then find that a
smaller one is faster. Everything here is a function of its arguments: the same ones give the same plan.
"""

from __future__ import annotations

from dataclasses import asdict, replace
from typing import Any

from daramgpt import ds_config as ds_configs
from daramgpt.errors import UserError
from daramgpt.planner import speed
from daramgpt.planner.memory import Memory, needed_memory
from daramgpt.planner.rates import Rates
from daramgpt.planner.shapes import ModelShape, Step, step_flops, student_shape
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


def first_step(
    recipe: Recipe,
    *,
    context_tokens: int,
    vocab_size: int,
    teacher: ModelShape | None,
    teacher_precision: str,
    world_size: int,
    dtype: str,
    ds_config: str,
    device: str,
) -> Step:
    """A rank's share of the recipe's batch in forward passes of the recipe's rows, or of one row where it leaves them
    open."""
    rows = recipe.engine.micro_batch_rows or 1
    # Every rank and every micro-batch gets whole rows, so the batch is rounded up to a multiple of them.
    multiple = world_size * rows
    batch_rows = -(-max(1, recipe.optimizer.batch_tokens // context_tokens) // multiple) * multiple
    step = Step(
        student=student_shape(recipe.student, vocab_size, context_tokens),
        teacher=teacher,
        teacher_precision=teacher_precision,
        dtype=dtype,
        context_tokens=context_tokens,
        micro_batch_rows=rows,
        micro_batches=batch_rows // multiple,
        chunk_tokens=0,
        optimizer_kind=recipe.optimizer.kind,
        ds_config=ds_configs.load(ds_config),
        world_size=world_size,
        device=device,
        is_by_document=recipe.curriculum.attention == "document",
        recomputes=recipe.engine.activation_checkpointing,
    )
    return in_passes(step, rows, recipe.engine.loss_chunk_tokens)


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
    *,
    context_tokens: int,
    vocab_size: int,
    num_rows: int,
    teacher: ModelShape | None,
    memory_limit_bytes: int,
    flops_per_second: float,
    num_threads: int,
    world_size: int,
    dtype: str,
    teacher_precision: str,
    ds_config: str,
    reasons: dict[str, str],
    device: str = "cpu",
    rates: Rates | None = None,
) -> dict[str, Any]:
    """Choose what the recipe leaves open, predict, and freeze it in ``plan.json``.

    Args:
        recipe, run: whose plan.
        context_tokens, vocab_size, num_rows: of the shards; rows of one pass.
        teacher: None trains by plain cross-entropy.
        memory_limit_bytes: of the device.
        flops_per_second: best measured rate of its matrix products.
        num_threads, world_size, dtype, teacher_precision, ds_config: chosen before, kept here.
        reasons: why, by choice.
        device: ``"cpu"`` or ``"cuda"``.
        rates: of the device; without them no speed is predicted.

    Raises:
        UserError: a row, or the micro-batch that the recipe asks for, does not fit the memory.
    """
    chunk_tokens = recipe.engine.loss_chunk_tokens
    step = first_step(
        recipe,
        context_tokens=context_tokens,
        vocab_size=vocab_size,
        teacher=teacher,
        teacher_precision=teacher_precision,
        world_size=world_size,
        dtype=dtype,
        ds_config=ds_config,
        device=device,
    )
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
        most = max(1, CPU_MICRO_BATCH_TOKENS // context_tokens) if device == "cpu" else fitting[-1]
        rows = max(divisor for divisor in fitting if divisor == 1 or divisor <= most)
    step = in_passes(step, rows, chunk_tokens)
    batch_rows = rows * step.micro_batches * world_size
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
        "world_size": world_size,
        "dtype": dtype,
        "teacher_precision": teacher_precision if teacher else None,
        "ds_config": ds_config,
        "reasons": reasons,
        "predicted": {
            **_predicted(step, rates, num_tokens),
            "largest_micro_batch_rows": fitting[-1],
            "model_flops_per_token": flops,
            "gemm_flops_per_second": flops_per_second,
            # No run goes faster than its matrix products alone.
            "fewest_hours": num_tokens * flops / flops_per_second / 3600 / world_size,
        },
        "student": asdict(step.student) | {"parameters": step.student.parameters},
    }
    write_json(run.plan, plan)
    return plan


def _predicted(step: Step, rates: Rates | None, num_tokens: int) -> dict[str, Any]:
    """Memory, and where rates are known speed and hours, of a run of so many tokens."""
    needed = needed_memory(step)
    found: dict[str, Any] = {
        "memory_bytes": needed.device,
        "memory_total_bytes": needed.device_bytes,
        "host_memory_bytes": needed.host,
    }
    if rates is None:
        return found
    tokens_per_second = speed.tokens_per_second(step, rates)
    return {
        **found,
        "seconds_per_step": speed.step_seconds(step, rates),
        "tokens_per_second": tokens_per_second,
        "hours": num_tokens / tokens_per_second / 3600,
        "rates": asdict(rates),
    }
