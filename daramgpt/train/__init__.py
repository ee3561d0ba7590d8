"""The training loop and nothing else: rows in, optimizer steps, checkpoints, until the end or a reason to stop.

The loop's whole state is the engine's tensors, one step number and the tokens so far. The rows of a step, its learning
rate and its place in the curriculum are functions of that number, so a run that goes on from a checkpoint does what
one never interrupted would have done.
"""

from __future__ import annotations

import contextlib
import math
import resource
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from daramgpt import checkpoint, compiling, ds_config, student
from daramgpt.engine import Distiller
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger, seconds_used
from daramgpt.progress import Console, TrainingDisplay
from daramgpt.recipe import Recipe, Schedule
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Feed, Prefetch, Shards
from daramgpt.teacher import Teacher
from daramgpt.train.out_of_memory import StepOutOfMemoryError, as_step_fault, with_less_memory
from daramgpt.train.schedule import learning_rate
from daramgpt.train.session import Clock, StopRequest

__all__ = ["Clock", "StopRequest", "build_distiller", "learning_rate", "train"]

# As from `Distiller.gather`.
_Tensors = dict[str, dict[str, torch.Tensor]]
# Saving is given this factor over the longest save so far before the deadline.
SAVE_MARGIN = 1.5


def train(
    recipe: Recipe,
    run: RunDirectory,
    shards: Shards,
    plan: dict[str, Any],
    teacher: Teacher | None,
    stop: StopRequest,
    console: Console,
    ledger: Path,
    machine: str,
    label: str,
) -> str:
    """Train to the end of the curriculum, or until asked to stop; goes on from the newest checkpoint.

    Args:
        recipe, run, plan: of this run, which may be a part of another.
        shards: of the run or of the run it is a part of.
        teacher: None trains by plain cross-entropy.
        stop: when to stop before the end.
        console: for lines; its log takes what libraries print.
        ledger: of the whole run, whose hours its parts share.
        machine: name for the ledger.
        label: what is trained, for people and the ledger.

    Returns:
        ``done``, ``deadline`` or ``interrupted``; a checkpoint of the last step stands in each case.

    Raises:
        UserError: the loss is not finite, no checkpoint verifies, the disk is full, DeepSpeed refuses its config, the
            teacher cannot be shown documents one by one, not even one row fits the memory, or this rank ran out of it
            where others wait: then its line begins with `checkpoint.START_AGAIN`.
    """
    torch.set_num_threads(plan["num_threads"])
    torch.manual_seed(recipe.seed)
    if recipe.engine.compile != "none":
        compiling.check()
    if recipe.engine.compile == "all" and teacher is not None:
        compiling.compile_blocks(teacher.model)
    while True:
        position, tensors, loss_scaler = _newest(run, plan, console, label)
        distiller = build_distiller(recipe, run, shards, plan, teacher, tensors)
        if tensors is not None:
            distiller.restore(tensors, position["step"], loss_scaler)
        # Three times the weights are not to lie there for hours.
        tensors = None
        feed = Feed(
            shards,
            plan["batch_rows"],
            plan["micro_batch_rows"],
            distiller.rank,
            distiller.world_size,
            recipe.curriculum.passes,
            recipe.seed,
            recipe.curriculum.order,
        )
        assert feed.num_steps == plan["num_steps"], "the plan was made for these shards"
        with contextlib.closing(distiller):
            if not distiller.is_same_on_all_ranks(position["step"]):
                raise UserError(
                    f"{run.checkpoints}: the newest checkpoint, here of step {position['step']}, is not the same on "
                    "every node",
                    "share one run directory between the nodes, or copy the first node's to the others",
                )
            try:
                return _loop(
                    recipe, run, plan, feed, distiller, position, stop, console, Ledger(ledger), machine, label
                )
            except StepOutOfMemoryError as error:
                plan = with_less_memory(plan, run, console, label, error)


def _newest(
    run: RunDirectory, plan: dict[str, Any], console: Console, label: str
) -> tuple[dict[str, Any], _Tensors | None, dict[str, Any]]:
    """Position, tensors and loss scaler of the newest checkpoint; those of a beginning where there is none."""
    saved = checkpoint.newest(run.checkpoints, console)
    position = {"step": 0, "tokens": 0, "skipped_steps": 0}
    if saved is None:
        return position, None, {}
    console(f"{label}: goes on from step {saved.state['step']:,} of {plan['num_steps']:,} ({saved.path.name})")
    tensors = {name: saved.tensors(name) for name in checkpoint.TENSOR_FILES}
    return {**position, **saved.state}, tensors, saved.state["loss_scaler"]


def build_distiller(
    recipe: Recipe,
    run: RunDirectory,
    shards: Shards,
    plan: dict[str, Any],
    teacher: Teacher | None,
    tensors: _Tensors | None,
) -> Distiller:
    """A student with its optimizer, as a run of this plan trains it.

    Args:
        recipe, run, shards, plan, teacher: as of `train`.
        tensors: of a checkpoint, whose weights the student gets; None = as it is initialised.

    Raises:
        UserError: DeepSpeed refuses its config, the teacher cannot be shown documents one by one.
    """
    model = student.build(
        recipe.student, plan["student"]["vocab_size"], shards.context_tokens, shards.eos_token_id, recipe.seed
    )
    if tensors is not None:
        model.load_state_dict(tensors["weights"], strict=False)
    if recipe.engine.compile == "all":
        compiling.compile_blocks(model)
    if recipe.engine.activation_checkpointing:
        student.checkpoint_activations(model)
    document_start_id = None
    if recipe.curriculum.attention == "document":
        document_start_id = shards.eos_token_id
        if teacher is not None:
            teacher.check_documents(shards.context_tokens)
    return Distiller(
        model,
        recipe.loss,
        recipe.optimizer,
        ds_config.load(plan["ds_config"]),
        plan["micro_batch_rows"],
        plan["batch_rows"] // (plan["micro_batch_rows"] * plan["world_size"]),
        plan["loss_chunk_tokens"],
        teacher,
        run.log,
        document_start_id,
        recipe.engine.compile != "none",
    )


def _loop(
    recipe: Recipe,
    run: RunDirectory,
    plan: dict[str, Any],
    feed: Feed,
    distiller: Distiller,
    position: dict[str, Any],
    stop: StopRequest,
    console: Console,
    ledger: Ledger,
    machine: str,
    label: str,
) -> str:
    clock = Clock(time.monotonic(), seconds_used(ledger.path))
    if distiller.is_first:
        ledger.start(label, machine, position["step"], position["tokens"])
    num_steps, saved_step, saved_at, reason = plan["num_steps"], position["step"], time.monotonic(), None
    step_tokens = plan["batch_rows"] * plan["context_tokens"]
    budget_seconds = 3600 * recipe.budget.budget_hours - clock.used_before
    asked: str | None = None

    def save() -> None:
        nonlocal saved_step, saved_at
        start = time.monotonic()
        checkpoint.save(run.checkpoints, distiller, {**position, "num_steps": num_steps}, recipe.checkpoint.keep)
        saved_at, saved_step = time.monotonic(), position["step"]
        clock.save_seconds = max(clock.save_seconds, saved_at - start)
        if distiller.is_first:
            ledger.beat(position["step"], position["tokens"], clock.seconds)

    def ends_and_saves() -> tuple[bool, bool]:
        """Whether this rank was asked to stop, and whether a checkpoint is due; the step is still being computed."""
        nonlocal asked
        needed = clock.seconds_for_another_step(step_tokens) + SAVE_MARGIN * clock.save_seconds
        asked = stop.reason(needed) or ("deadline" if clock.seconds + needed > budget_seconds else None)
        return asked is not None, time.monotonic() - saved_at >= 60 * recipe.checkpoint.every_minutes

    fault: StepOutOfMemoryError | None = None
    with (
        TrainingDisplay(console, run.metrics, label, num_steps, position["step"], distiller.is_first) as display,
        contextlib.closing(Prefetch(feed, distiller.device)) as rows,
    ):
        try:
            while position["step"] < num_steps:
                entry, is_end, is_due = _step(recipe, plan, feed, rows, distiller, position, clock, ends_and_saves)
                if entry is not None:
                    display.step(entry)
                # Every rank takes the same decision, whoever was asked.
                if is_end:
                    reason = asked or "interrupted"
                    break
                if is_due and position["step"] > saved_step:
                    save()
            if position["step"] > saved_step:
                save()
            reason = "done" if position["step"] >= num_steps else reason
        except (StepOutOfMemoryError, RuntimeError) as error:
            fault = as_step_fault(error, distiller.world_size)
        finally:
            if distiller.is_first and fault is None:
                ledger.end(saved_step, position["tokens"], clock.seconds, reason or "failed")
    if fault is not None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if fault.is_shared and distiller.is_intact and position["step"] > saved_step:
            try:
                save()
            except RuntimeError as error:
                fault = as_step_fault(error, distiller.world_size)
        if distiller.is_first:
            ledger.end(saved_step, position["tokens"], clock.seconds, "out of memory")
        raise fault
    assert reason is not None
    return reason


def _step(
    recipe: Recipe,
    plan: dict[str, Any],
    feed: Feed,
    rows: Prefetch,
    distiller: Distiller,
    position: dict[str, Any],
    clock: Clock,
    ends_and_saves: Callable[[], tuple[bool, bool]],
) -> tuple[dict[str, Any] | None, bool, bool]:
    """One optimizer step; advances `position`.

    Returns:
        The line for metrics, None where fp16 overflowed; and what `ends_and_saves` says, over all ranks.
    """
    step, start = position["step"], clock.step_starts()
    schedule = Schedule.model_validate(plan["schedule"])
    rate = learning_rate(plan["learning_rate"], schedule, step, plan["num_steps"])
    num_targets = feed.num_targets(step)
    result = distiller.step(rows.batches(step), num_targets, rate, ends_and_saves)
    is_end, is_due = result.flags
    if not result.applied:
        # An overflow is how the loss scale finds its value: the same rows are fed again.
        position["skipped_steps"] += 1
        return None, is_end, is_due
    loss = recipe.loss.kd_weight * result.kd + recipe.loss.ce_weight * result.ce
    if not (math.isfinite(loss) and math.isfinite(result.grad_norm)):
        raise UserError(
            f"step {step + 1}: loss {loss}, gradient norm {result.grad_norm}",
            "lower optimizer.learning_rate; the checkpoints before this step are good",
        )
    position["step"] += 1
    position["tokens"] += num_targets
    clock.stepped(time.monotonic() - start, num_targets)
    step_tokens = plan["batch_rows"] * plan["context_tokens"]
    left = plan["num_steps"] - position["step"]
    entry = {
        "step": position["step"],
        "tokens": position["tokens"],
        "stage": feed.stage(step),
        "loss": loss,
        "kd": result.kd,
        "ce": result.ce,
        "lr": rate,
        "grad_norm": result.grad_norm,
        "loss_scale": distiller.loss_scale(),
        "skipped_steps": position["skipped_steps"],
        "tokens_per_second": 1 / clock.token_seconds,
        "peak_memory_bytes": peak_memory_bytes(),
        "hours_used": (clock.used_before + clock.seconds) / 3600,
        "hours_left": clock.token_seconds * step_tokens * left / 3600,
    }
    return entry, is_end, is_due


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
