"""The plan of a run: what shapes its arithmetic, with the memory and the hours that arithmetic says it takes.

Micro-batch, loss chunk, threads and schedule are chosen once and frozen in ``plan.json``: the same plan gives the same
weights, on the same machine to the bit. The memory of a micro-batch is predicted from shapes, component by component.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from daramgpt import hardware
from daramgpt.errors import UserError
from daramgpt.recipe import Recipe, Shape
from daramgpt.run_directory import RunDirectory, write_json

if TYPE_CHECKING:
    import torch

# Beyond this many tokens a forward pass gains nothing on a CPU: products are large enough, buffers only grow.
CPU_MICRO_BATCH_TOKENS = 4096
# [tokens, vocabulary] elements of a chunk's buffer: large products, buffers of some 100 MB.
CHUNK_ELEMENTS = 2**25
# Of the memory that the machine has, for the allocator's own waste and for other processes.
MEMORY_SHARE = 0.85
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
# What is chosen from the machine, each with a reason.
CHOICES = ("dtype", "teacher_precision", "ds_config")
PRECISION_BYTES = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "llm-int8": 1.0, "nf4": 0.5}


@dataclass(frozen=True)
class ModelShape:
    """What memory and FLOPs follow from.

    Attributes:
        n_embd, n_layer: of a GPT-2.
        vocab_size: rows of its head, which is tied to the embedding.
        num_positions: rows of its position embedding.
    """

    n_embd: int
    n_layer: int
    vocab_size: int
    num_positions: int

    @property
    def block_parameters(self) -> int:
        """Of all blocks: attention 4 D², MLP 8 D², biases and norms 13 D a block, final norm 2 D."""
        return self.n_layer * (12 * self.n_embd**2 + 13 * self.n_embd) + 2 * self.n_embd

    @property
    def embedding_parameters(self) -> int:
        return (self.vocab_size + self.num_positions) * self.n_embd

    @property
    def parameters(self) -> int:
        return self.block_parameters + self.embedding_parameters

    def forward_flops(self, context_tokens: int) -> float:
        """FLOPs a token of the forward pass: 2 a weight of blocks and head, and causal attention."""
        return 2.0 * (self.block_parameters + self.vocab_size * self.n_embd) + (
            2.0 * self.n_layer * context_tokens * self.n_embd
        )


def memory_bytes(
    student: ModelShape,
    teacher: ModelShape | None,
    teacher_precision: str,
    dtype: str,
    micro_batch_tokens: int,
    chunk_tokens: int,
    optimizer_kind: str = "adamw",
) -> dict[str, int]:
    """Bytes by component on one rank; ZeRO's sharding over several ranks is left out.

    Args:
        student, teacher: shapes.
        teacher_precision: of the teacher's blocks.
        dtype: of the student's arithmetic.
        micro_batch_tokens: of a forward pass.
        chunk_tokens: of the fused loss.
        optimizer_kind: of the recipe; ``"adamw-8bit"`` keeps a moment in a byte and 4 bytes for 256 of them.
    """
    moment_bytes = 2 * (1 + 4 / 256) if optimizer_kind == "adamw-8bit" else 8
    width = PRECISION_BYTES[dtype]
    # Attention keeps q, k, v, its output and their copies; the MLP 4 D twice; the norms and residuals the rest.
    per_token_layer = 18 * student.n_embd * width
    parts = {
        "student weights": student.parameters * width,
        "gradients": student.parameters * (width + 4),
        "optimizer": student.parameters * (moment_bytes + (0 if dtype == "fp32" else 4)),
        "activations": micro_batch_tokens * per_token_layer * student.n_layer,
        "loss buffers": 3 * chunk_tokens * student.vocab_size * 4,
    }
    if teacher is not None:
        blocks = teacher.block_parameters * PRECISION_BYTES[teacher_precision]
        parts["teacher weights"] = blocks + teacher.embedding_parameters * width
        parts["teacher activations"] = micro_batch_tokens * 12 * teacher.n_embd * width
    return {name: round(value) for name, value in parts.items()}


def step_flops(student: ModelShape, teacher: ModelShape | None, context_tokens: int) -> float:
    """Model FLOPs a trained token: three forward passes of the student, one of the teacher."""
    flops = 3.0 * student.forward_flops(context_tokens)
    return flops + (teacher.forward_flops(context_tokens) if teacher else 0.0)


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
) -> dict[str, Any]:
    """Choose what the recipe leaves open, predict, and freeze it in ``plan.json``.

    Args:
        recipe, run: whose plan.
        context_tokens, vocab_size, num_rows: of the shards; rows of one pass.
        teacher: None trains by plain cross-entropy.
        memory_limit_bytes: of the device.
        flops_per_second: its measured rate of matrix products.
        num_threads, world_size, dtype, teacher_precision, ds_config: chosen before, kept here.
        reasons: why, by choice.

    Raises:
        UserError: a row, or the micro-batch that the recipe asks for, does not fit the memory.
    """
    student = _shape(recipe.student, vocab_size, context_tokens)
    # Every rank and every micro-batch gets whole rows, so the batch is rounded up to a multiple of them.
    multiple = world_size * (recipe.engine.micro_batch_rows or 1)
    batch_rows = -(-max(1, recipe.optimizer.batch_tokens // context_tokens) // multiple) * multiple
    rows_a_rank = batch_rows // world_size

    def memory(rows: int) -> dict[str, int]:
        tokens = rows * context_tokens
        chunk = recipe.engine.loss_chunk_tokens or min(tokens, max(256, CHUNK_ELEMENTS // vocab_size))
        return memory_bytes(student, teacher, teacher_precision, dtype, tokens, chunk, recipe.optimizer.kind)

    def fits(rows: int) -> bool:
        return sum(memory(rows).values()) <= MEMORY_SHARE * memory_limit_bytes

    rows = recipe.engine.micro_batch_rows
    if not fits(rows or 1):
        needed = sum(memory(rows or 1).values()) / 1e9
        raise UserError(
            f"{rows or 1} rows of {context_tokens} tokens need {needed:.1f} GB, "
            f"{MEMORY_SHARE:.0%} of the device's {memory_limit_bytes / 1e9:.1f} GB may be taken",
            "lower engine.micro_batch_rows" if rows else "lower curriculum.context_tokens",
        )
    if rows is None:
        largest = max(1, CPU_MICRO_BATCH_TOKENS // context_tokens) if dtype == "fp32" else rows_a_rank
        # Divisors leave no micro-batch part empty.
        divisors = [divisor for divisor in range(1, rows_a_rank + 1) if rows_a_rank % divisor == 0]
        rows = max(divisor for divisor in divisors if divisor == 1 or (divisor <= largest and fits(divisor)))
    tokens = rows * context_tokens
    num_steps = -(-num_rows * recipe.curriculum.passes // batch_rows)
    flops = step_flops(student, teacher, context_tokens)
    total_tokens = num_rows * recipe.curriculum.passes * context_tokens
    parts = memory(rows)
    plan = {
        "context_tokens": context_tokens,
        "batch_rows": batch_rows,
        "micro_batch_rows": rows,
        "loss_chunk_tokens": recipe.engine.loss_chunk_tokens or min(tokens, max(256, CHUNK_ELEMENTS // vocab_size)),
        "num_steps": num_steps,
        "schedule": recipe.schedule.model_dump(),
        "learning_rate": recipe.optimizer.learning_rate,
        "num_threads": num_threads,
        "world_size": world_size,
        "dtype": dtype,
        "teacher_precision": teacher_precision if teacher else None,
        "ds_config": ds_config,
        "reasons": reasons,
        "predicted": {
            "memory_bytes": parts,
            "memory_total_bytes": sum(parts.values()),
            "model_flops_per_token": flops,
            "gemm_flops_per_second": flops_per_second,
            # No run goes faster than its matrix products alone.
            "fewest_hours": total_tokens * flops / flops_per_second / 3600 / world_size,
        },
        "student": asdict(student) | {"parameters": student.parameters},
    }
    write_json(run.plan, plan)
    return plan


def with_smaller_micro_batch(plan: dict[str, Any]) -> dict[str, Any] | None:
    """The plan with at most half the rows a forward pass, its steps the same; None where one row is all there is."""
    rows_a_rank = plan["batch_rows"] // plan["world_size"]
    most = plan["micro_batch_rows"] // 2
    rows = max((divisor for divisor in range(1, most + 1) if rows_a_rank % divisor == 0), default=0)
    if not rows:
        return None
    chunk_tokens = min(plan["loss_chunk_tokens"], rows * plan["context_tokens"])
    return {**plan, "micro_batch_rows": rows, "loss_chunk_tokens": chunk_tokens}


def choose_teacher_precision(
    recipe: Recipe,
    machine: hardware.Machine,
    *,
    dtype: str,
    teacher: ModelShape,
    context_tokens: int,
    vocab_size: int,
    world_size: int,
) -> tuple[str, str]:
    """What ``teacher.precision = "auto"`` becomes on `machine`, and why.

    Memory and compute capability give the candidates, a measurement decides. Where torch does not see the GPU,
    capability alone does.

    Raises:
        UserError: no candidate works on the device.
    """
    import torch

    from daramgpt.teacher import DTYPES, choice

    by_capability = hardware.choose(machine)
    if machine.gpus and not torch.cuda.is_available():
        reason = by_capability.reasons["teacher_precision"]
        return by_capability.teacher_precision, f"{reason}; by capability alone, as torch sees no GPU to measure on"
    device = torch.device(machine.device)
    limit_bytes = MEMORY_SHARE * (machine.gpu_memory_bytes or machine.memory_bytes)
    student = _shape(recipe.student, vocab_size, context_tokens)
    micro_batch_tokens = max(
        context_tokens, min(recipe.optimizer.batch_tokens // world_size, choice.MOST_TOKENS[device.type])
    )

    def needed_bytes(precision: str, tokens: int) -> int:
        chunk = recipe.engine.loss_chunk_tokens or min(tokens, max(256, CHUNK_ELEMENTS // vocab_size))
        return sum(memory_bytes(student, teacher, precision, dtype, tokens, chunk, recipe.optimizer.kind).values())

    if needed_bytes("int8", context_tokens) > limit_bytes:
        needed = needed_bytes("int8", context_tokens) / 1e9
        return "nf4", (
            f"with int8 one row needs {needed:.1f} GB, {MEMORY_SHARE:.0%} of the device's "
            f"{limit_bytes / MEMORY_SHARE / 1e9:.1f} GB may be taken; half as large, at a larger error; not measured"
        )
    candidates, left_out = [], {}
    for precision in hardware.teacher_candidates(machine, dtype):
        needed = needed_bytes(precision, micro_batch_tokens) / 1e9
        # Eight bits are the least there is short of nf4; there the plan takes a smaller micro-batch.
        if PRECISION_BYTES[precision] > 1 and needed * 1e9 > limit_bytes:
            left_out[precision] = f"does not fit with {micro_batch_tokens:,} tokens ({needed:.1f} GB)"
        else:
            candidates.append(precision)
    return choice.choose(
        candidates,
        width=teacher.n_embd,
        num_tokens=micro_batch_tokens,
        compute_dtype=DTYPES[dtype],
        device=device,
        left_out=left_out,
    )


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


def describe(plans: dict[str, dict[str, Any]], say: Callable[[str], None]) -> None:
    """Print the plans of a run's trainings, by what is trained, for people; what they share only once."""
    choices = {
        label: {key: f"{key}: {plan[key]} ({plan['reasons'][key]})" for key in CHOICES if plan[key] is not None}
        for label, plan in plans.items()
    }
    for key in CHOICES:
        lines = {lines[key] for lines in choices.values() if key in lines}
        if len(lines) == 1:
            say(lines.pop())
            for own in choices.values():
                own.pop(key, None)
    for label, plan in plans.items():
        _describe_training(label, plan, say)
        for line in choices[label].values():
            say(f"  {line}")


def _describe_training(label: str, plan: dict[str, Any], say: Callable[[str], None]) -> None:
    predicted = plan["predicted"]
    rows, context = plan["micro_batch_rows"], plan["context_tokens"]
    say(f"{label}:")
    say(
        f"  {plan['num_steps']:,} steps of {plan['batch_rows']} rows of {context} tokens, "
        f"{rows} rows ({rows * context:,} tokens) a forward pass, loss {plan['loss_chunk_tokens']:,} tokens at a time"
    )
    parts = sorted(predicted["memory_bytes"].items(), key=lambda item: -item[1])
    say(
        f"  memory {predicted['memory_total_bytes'] / 1e9:.2f} GB: "
        + ", ".join(f"{name} {size / 1e6:,.0f} MB" for name, size in parts)
    )
    say(
        f"  {predicted['model_flops_per_token'] / 1e6:,.1f} MFLOP a token; at this device's "
        f"{predicted['gemm_flops_per_second'] / 1e9:,.0f} GFLOP/s no less than {predicted['fewest_hours']:.3f} hours"
    )


def gemm_rate(dtype: str, sizes: Sequence[int], device: torch.device, seconds: float = 0.1) -> float:
    """Best measured FLOP/s of square matrix products.

    Args:
        dtype: ``"fp32"``, ``"fp16"`` or ``"bf16"``.
        sizes: rows, tried one after the other.
        device: that multiplies.
        seconds: for each size, and at least two products.
    """
    import torch

    from daramgpt.teacher import DTYPES

    def synchronise() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    best = 0.0
    for size in sizes:
        left, right = (torch.randn(size, size, device=device, dtype=DTYPES[dtype]) for _ in range(2))
        product = torch.empty_like(left)
        deadline, tries = time.perf_counter() + seconds, 0
        while tries < 2 or time.perf_counter() < deadline:
            synchronise()
            start = time.perf_counter()
            torch.mm(left, right, out=product)
            synchronise()
            best = max(best, 2 * size**3 / (time.perf_counter() - start))
            tries += 1
    return best


def teacher_shape(model_dir: Path) -> ModelShape:
    """Shape of a teacher from its config alone.

    Raises:
        UserError: the config cannot be read.
    """
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(model_dir)
        return ModelShape(
            config.hidden_size, config.num_hidden_layers, config.vocab_size, config.max_position_embeddings
        )
    except (OSError, ValueError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"teacher.model: {model_dir}: {reason}", "give a causal language model") from None


def _shape(shape: Shape, vocab_size: int, context_tokens: int) -> ModelShape:
    return ModelShape(shape.n_embd, shape.n_layer, vocab_size, context_tokens)
