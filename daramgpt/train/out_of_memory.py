"""Out of memory while training: which errors say so, and the plan that goes on with less.

The batch of a step stays what it is: half the rows a forward pass, twice as many passes. So the run is the same to
rounding, and only slower.
"""

from __future__ import annotations

from typing import Any

import torch

from daramgpt import planner
from daramgpt.errors import UserError
from daramgpt.progress import Console
from daramgpt.run_directory import RunDirectory, write_json


class StepOutOfMemoryError(Exception):
    """A step that did not fit; says what the allocator said.

    Raised in place of the allocator's error, because the tensors of the failed pass live as long as its traceback.
    """


def is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of a CPU whose system refuses more."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def with_less_memory(
    plan: dict[str, Any], run: RunDirectory, console: Console, label: str, reason: str
) -> dict[str, Any]:
    """A plan with a smaller micro-batch, kept for the sessions to come.

    Args:
        plan: that ran out of memory.
        run: whose plan it is.
        console: for lines.
        label: what is trained.
        reason: what the allocator said.

    Raises:
        UserError: there is none, or other ranks wait for this one and have to begin anew with it.
    """
    rows, smaller = plan["micro_batch_rows"], planner.with_smaller_micro_batch(plan)
    if smaller is None:
        raise UserError(
            f"{label}: out of memory with one row of {plan['context_tokens']} tokens a forward pass ({reason})",
            "lower curriculum.context_tokens or engine.loss_chunk_tokens, use a ds_config with offload, or "
            "set engine.activation_checkpointing=true",
        )
    write_json(run.plan, smaller)
    fault = f"{label}: out of memory with {rows} rows a forward pass ({reason})"
    if plan["world_size"] > 1:
        raise UserError(
            f"{fault}; {run.plan} has {smaller['micro_batch_rows']} now",
            "run the same command again, it goes on from the newest checkpoint",
        )
    console(f"{fault}; goes on with {smaller['micro_batch_rows']}, the batch of a step stays {plan['batch_rows']} rows")
    return smaller
