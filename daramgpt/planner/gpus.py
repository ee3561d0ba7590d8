"""Hours of a curriculum on every GPU of the table, and what fits a card: for those that are not at hand.

For each GPU the choices are those that `hardware.choose` would make there, the memory that of its card, the rates
those of its data sheet. Several of a kind work side by side, as if they never waited for each other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from daramgpt import hardware
from daramgpt.errors import UserError
from daramgpt.gpu_table import GPU_TABLE, table_key
from daramgpt.hardware import Gpu, Machine
from daramgpt.planner import rates as machine_rates
from daramgpt.planner import speed
from daramgpt.planner.making import MEMORY_SHARE, TrainingSetup, first_step, fitting_rows, in_passes
from daramgpt.planner.memory import needed_memory
from daramgpt.planner.shapes import ModelShape, Step
from daramgpt.recipe import Recipe

# Of the host that a card sits in, where it is not at hand.
HOST_BYTES, HOST_CORES = 13 * 2**30, 2
# Sets that people get for free, beside each GPU of the table alone.
SETS = ("T4 x 2",)
# UTF-8 bytes a token of Korean text: 8.12 GB of it are about 1.3e9 tokens.
BYTES_PER_TOKEN = 6.25
# Beyond this many tokens a GPU's products gain nothing.
GPU_MICRO_BATCH_TOKENS = 16384
# The reference loop's memory, per position: fp32 logits that live at once, of both models (student's logits and their
# gradient; log-softmax of the cross-entropy and of the divergence with its gradient; teacher's logits and softmax), and
# numbers a channel and block that its transformers GPT-2 keeps (the plain chain of gelu_new keeps seven of 4 D).
REFERENCE_LOGITS, REFERENCE_ACTIVATIONS = 7, 36


@dataclass(frozen=True)
class Forecast:
    """One set of GPUs.

    Attributes:
        name: such as ``"T4 x 2"``.
        step: on one of them; None where one row does not fit.
        tokens_per_second, hours: of all together.
        memory_bytes: of one.
        largest_tokens: the largest micro-batch that fits one, whatever the batch.
        reference_tokens: the largest padded batch of the reference loop that fits one, in positions.
        rates: of one.
    """

    name: str
    step: Step | None
    tokens_per_second: float
    hours: float
    memory_bytes: int
    largest_tokens: int
    reference_tokens: int
    rates: machine_rates.Rates


def names() -> list[str]:
    """Every set that is forecast when none is named."""
    return [*GPU_TABLE, *SETS]


def parse(name: str) -> tuple[str, int]:
    """``"T4 x 2"`` as a key of the table and a count.

    Raises:
        UserError: the table has no such GPU.
    """
    match = re.fullmatch(r"\s*(.+?)(?:\s+[x×*]\s*(\d+))?\s*", name, re.IGNORECASE)
    key = table_key(match[1]) if match else None
    count = int(match[2] or 1) if match else 0
    if key is None or count < 1:
        raise UserError(f'--gpu: "{name}" is not known', f'write it as "T4 x 2"; known: {", ".join(GPU_TABLE)}')
    return key, count


def machine(name: str) -> Machine:
    """A machine with those GPUs."""
    key, count = parse(name)
    sheet = GPU_TABLE[key]
    gpu = Gpu(key, sheet.memory_gigabytes * 10**9, sheet.capability)
    return Machine((gpu,) * count, HOST_CORES, HOST_BYTES)


def curriculum_tokens(recipe: Recipe) -> float:
    """Of all stages and passes, where there are no shards that would tell."""
    taken = sum(stage.take for stage in recipe.curriculum.stages)
    return taken * recipe.curriculum.scale * recipe.curriculum.passes / BYTES_PER_TOKEN


def forecast(recipe: Recipe, name: str, teacher: ModelShape, context_tokens: int, total_tokens: float) -> Forecast:
    """Memory and hours of a recipe on GPUs of a kind."""
    key, count = parse(name)
    there = machine(name)
    chosen = hardware.choose(there)
    precision = recipe.teacher.precision if recipe.teacher else "auto"
    setup = TrainingSetup(
        context_tokens=context_tokens,
        vocab_size=teacher.vocab_size,
        teacher=teacher,
        world_size=count,
        dtype=chosen.dtype,
        ds_config=chosen.ds_config if recipe.engine.ds_config == "auto" else recipe.engine.ds_config,
        device="cuda",
    )
    one_row = first_step(recipe, setup, chosen.teacher_precision if precision == "auto" else precision)
    card_bytes, chunk_tokens = there.gpu_memory_bytes, recipe.engine.loss_chunk_tokens
    is_half = recipe.teacher is not None and recipe.teacher.half_accumulation
    rates = machine_rates.of_gpu(key, one_row.dtype, is_half)
    largest = largest_rows(one_row, card_bytes, chunk_tokens)
    step, tokens_per_second = None, 0.0
    if largest:
        rows = recipe.engine.micro_batch_rows or max(
            rows
            for rows in fitting_rows(one_row, card_bytes, chunk_tokens)
            if rows == 1 or rows * context_tokens <= GPU_MICRO_BATCH_TOKENS
        )
        step = in_passes(one_row, rows, chunk_tokens)
        tokens_per_second = speed.tokens_per_second(step, rates)
    return Forecast(
        name=f"{key} x {count}" if count > 1 else key,
        step=step,
        tokens_per_second=tokens_per_second,
        hours=total_tokens / tokens_per_second / 3600 if tokens_per_second else float("inf"),
        memory_bytes=needed_memory(step).device_bytes if step else 0,
        largest_tokens=largest * context_tokens,
        reference_tokens=reference_positions(one_row.student, teacher, card_bytes),
        rates=rates,
    )


def largest_rows(step: Step, memory_limit_bytes: int, chunk_tokens: int | None = None) -> int:
    """Most rows a forward pass that fit, whatever the batch; 0 where one does not."""

    def fits(rows: int) -> bool:
        alone = replace(step, micro_batch_rows=rows, micro_batches=2)
        needed = needed_memory(in_passes(alone, rows, chunk_tokens)).device_bytes
        return needed <= MEMORY_SHARE * memory_limit_bytes

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def reference_bytes(student: ModelShape, teacher: ModelShape) -> tuple[int, int]:
    """Of the reference loop: whatever its batch, and per padded position. All in fp32, nothing sharded or moved."""
    fixed = 4 * teacher.parameters + 16 * student.parameters
    logits = REFERENCE_LOGITS * student.vocab_size
    return fixed, 4 * (logits + REFERENCE_ACTIVATIONS * student.n_layer * student.n_embd)


def reference_positions(student: ModelShape, teacher: ModelShape, memory_limit_bytes: int) -> int:
    """Padded positions of the largest batch that the reference loop fits into the same share of the same card."""
    fixed, of_position = reference_bytes(student, teacher)
    return max(0, int((MEMORY_SHARE * memory_limit_bytes - fixed) // of_position))
