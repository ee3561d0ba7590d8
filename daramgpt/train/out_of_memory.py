"""Out of memory while training: the plan that goes on with less.

The batch of a step stays what it is: half the rows a forward pass, twice as many passes. So the run is the same to
rounding, and only slower.

Where all ranks have left the step they save and go on in the same processes, nothing lost. Where other ranks may wait
for the one that failed, it ends, and whoever started the ranks ends the others and starts all again from the newest
checkpoint (`daramgpt.launcher`).
"""

from __future__ import annotations

import os
from typing import Any

from daramgpt import planner
from daramgpt.checkpoint import START_AGAIN
from daramgpt.engine import StepOutOfMemoryError, is_out_of_memory
from daramgpt.errors import UserError
from daramgpt.progress import Console
from daramgpt.run_directory import RunDirectory, write_json

__all__ = ["StepOutOfMemoryError", "as_step_fault", "is_out_of_memory", "with_less_memory"]


def as_step_fault(error: StepOutOfMemoryError | RuntimeError, world_size: int) -> StepOutOfMemoryError:
    """A new error in place of one whose traceback holds tensors; raises what is of another kind.

    Args:
        error: that ended a step, or a save.
        world_size: ranks; an allocator's error has left others waiting, where there are others.
    """
    if isinstance(error, StepOutOfMemoryError):
        return StepOutOfMemoryError(str(error), error.is_shared)
    if not is_out_of_memory(error):
        raise error
    return StepOutOfMemoryError(str(error).splitlines()[0], is_shared=world_size == 1)


def with_less_memory(
    plan: dict[str, Any], run: RunDirectory, console: Console, label: str, error: StepOutOfMemoryError
) -> dict[str, Any]:
    """A plan with a smaller micro-batch, kept for the sessions to come.

    Args:
        plan: that ran out of memory.
        run: whose plan it is.
        console: for lines.
        label: what is trained.
        error: of this rank.

    Raises:
        UserError: there is none, or other ranks may wait for this one: then all have to start again.
    """
    rows, smaller = plan["micro_batch_rows"], planner.with_smaller_micro_batch(plan)
    if smaller is None:
        raise UserError(
            f"{label}: out of memory with one row of {plan['context_tokens']} tokens a forward pass ({error})",
            "lower curriculum.context_tokens or engine.loss_chunk_tokens, use a ds_config with offload, or "
            "set engine.activation_checkpointing=true",
        )
    if not error.is_shared or os.environ.get("LOCAL_RANK", "0") == "0":
        # One rank of each machine: they may share the run directory or each have a copy.
        write_json(run.plan, smaller)
    fault, less = f"{label}: out of memory with {rows} rows a forward pass ({error})", smaller["micro_batch_rows"]
    if not error.is_shared:
        raise UserError(f"{START_AGAIN}{fault}", f"from now on with {less}, the same batch a step")
    console(f"{fault}; goes on with {less}, the batch of a step stays {plan['batch_rows']} rows")
    return smaller
