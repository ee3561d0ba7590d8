"""The training loop and nothing else: rows in, optimizer steps, checkpoints, until the end or a reason to stop.

The loop's whole state is the engine's tensors, one step number and the tokens so far. The rows of a step, its learning
rate and its place in the curriculum are functions of that number, so a run that goes on from a checkpoint does what
one never interrupted would have done.
"""

from __future__ import annotations

import contextlib
import math
import resource
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from daramgpt import checkpoint, ds_config, planner, student
from daramgpt.engine import Distiller
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger, seconds_used
from daramgpt.progress import Console, TrainingDisplay
from daramgpt.recipe import Recipe, Schedule
from daramgpt.run_directory import RunDirectory, write_json
from daramgpt.shards import Feed, Shards
from daramgpt.teacher import Teacher

# As from `Distiller.gather`.
_Tensors = dict[str, dict[str, torch.Tensor]]
# Steps over which the speed shown and used for the deadline is averaged.
SPEED_WINDOW_STEPS = 20
# Saving is given this factor over the longest save so far before the deadline.
SAVE_MARGIN = 1.5


class StopRequest:
    """Why a session should stop soon, if it should: its deadline, a signal, or a file that another process writes.

    Args:
        deadline: Unix time by which the session is to be over, saving included; None = none.
        file: its existence asks to stop; None = none.
    """

    def __init__(self, deadline: float | None, file: Path | None = None) -> None:
        self.deadline, self.file = deadline, file
        self._signalled = False

    def listen(self) -> None:
        """Take SIGTERM and SIGINT as requests; a second SIGINT exits at once."""
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, _: Any) -> None:
        self._signalled = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def reason(self, seconds_needed: float) -> str | None:
        """``"interrupted"``, ``"deadline"`` or None.

        Args:
            seconds_needed: for one more step and a save.
        """
        if self._signalled or (self.file is not None and self.file.exists()):
            return "interrupted"
        if self.deadline is not None and time.time() + seconds_needed > self.deadline:
            return "deadline"
        return None


@dataclass(slots=True)
class Clock:
    """Seconds of this session, of its steps and of its saves."""

    started: float
    used_before: float
    save_seconds: float = 1.0
    token_seconds: float = 0.0

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started

    def stepped(self, seconds: float, num_tokens: int) -> None:
        """Average the seconds a token of the steps, the newest ones weighing most."""
        weight = 1.0 if not self.token_seconds else 1 / SPEED_WINDOW_STEPS
        self.token_seconds += weight * (seconds / num_tokens - self.token_seconds)


def learning_rate(peak: float, schedule: Schedule, step: int, num_steps: int) -> float:
    """Of step number `step` (from 0): linear warm-up, plateau, linear decay (arXiv 2404.06395)."""
    warmup_steps = schedule.warmup_fraction * num_steps
    decay_steps = schedule.decay_fraction * num_steps
    factor = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    left = num_steps - step
    if left < decay_steps:
        factor = min(factor, schedule.final_ratio + (1 - schedule.final_ratio) * left / decay_steps)
    return peak * factor


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
            teacher cannot be shown documents one by one.
    """
    torch.set_num_threads(plan["num_threads"])
    torch.manual_seed(recipe.seed)
    saved = checkpoint.newest(run.checkpoints, console)
    position = {"step": 0, "tokens": 0, "skipped_steps": 0, **(saved.state if saved else {})}
    tensors: _Tensors | None = None
    loss_scaler: dict[str, Any] = {}
    if saved:
        console(f"{label}: goes on from step {position['step']:,} of {plan['num_steps']:,} ({saved.path.name})")
        tensors = {name: saved.tensors(name) for name in checkpoint.TENSOR_FILES}
        loss_scaler = saved.state["loss_scaler"]
    while True:
        distiller = _distiller(recipe, run, shards, plan, teacher, tensors)
        if tensors is not None:
            distiller.restore(tensors, position["step"], loss_scaler)
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
            try:
                return _loop(
                    recipe, run, plan, feed, distiller, position, stop, console, Ledger(ledger), machine, label
                )
            except RuntimeError as error:
                if not _is_out_of_memory(error):
                    raise
                plan = _with_less_memory(plan, run, console, label, error)
            # Not in the handler: the failed pass's tensors live as long as its traceback. The optimizer has not moved.
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            tensors, loss_scaler = distiller.gather(), distiller.loss_scaler()


def _distiller(
    recipe: Recipe,
    run: RunDirectory,
    shards: Shards,
    plan: dict[str, Any],
    teacher: Teacher | None,
    tensors: _Tensors | None,
) -> Distiller:
    """A student with its optimizer; with the weights among `tensors`, if there are any."""
    model = student.build(
        recipe.student, plan["student"]["vocab_size"], shards.context_tokens, shards.eos_token_id, recipe.seed
    )
    if tensors is not None:
        model.load_state_dict(tensors["weights"], strict=False)
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
    )


def _is_out_of_memory(error: RuntimeError) -> bool:
    """Of a GPU, or of a CPU whose system refuses more."""
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


def _with_less_memory(
    plan: dict[str, Any], run: RunDirectory, console: Console, label: str, error: RuntimeError
) -> dict[str, Any]:
    """A plan with a smaller micro-batch, kept for the sessions to come.

    Raises:
        UserError: there is none, or other ranks wait for this one and have to begin anew with it.
    """
    rows, smaller = plan["micro_batch_rows"], planner.with_smaller_micro_batch(plan)
    reason = str(error).splitlines()[0]
    if smaller is None:
        raise UserError(
            f"{label}: out of memory with one row of {plan['context_tokens']} tokens a forward pass ({reason})",
            "lower curriculum.context_tokens or engine.loss_chunk_tokens, or use a ds_config with offload",
        ) from None
    write_json(run.plan, smaller)
    fault = f"{label}: out of memory with {rows} rows a forward pass ({reason})"
    if plan["world_size"] > 1:
        raise UserError(f"{fault}; {run.plan} has {smaller['micro_batch_rows']} now", "run the same command again")
    console(f"{fault}; goes on with {smaller['micro_batch_rows']}, the batch of a step stays {plan['batch_rows']} rows")
    return smaller


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

    def save() -> None:
        nonlocal saved_step, saved_at
        start = time.monotonic()
        checkpoint.save(run.checkpoints, distiller, {**position, "num_steps": num_steps}, recipe.checkpoint.keep)
        saved_at, saved_step = time.monotonic(), position["step"]
        clock.save_seconds = max(clock.save_seconds, saved_at - start)
        if distiller.is_first:
            ledger.beat(position["step"], position["tokens"], clock.seconds)

    with TrainingDisplay(console, run.metrics, label, num_steps, position["step"], distiller.is_first) as display:
        try:
            while position["step"] < num_steps:
                entry = _step(recipe, plan, feed, distiller, position, clock)
                if entry is not None:
                    display.step(entry)
                needed = clock.token_seconds * step_tokens + SAVE_MARGIN * clock.save_seconds
                asked = stop.reason(needed) or ("deadline" if clock.seconds + needed > budget_seconds else None)
                # Every rank takes the same decision, whoever was asked.
                if distiller.any_rank(asked is not None):
                    reason = asked or "interrupted"
                    break
                due = time.monotonic() - saved_at >= 60 * recipe.checkpoint.every_minutes
                if distiller.any_rank(due) and position["step"] > saved_step:
                    save()
            if position["step"] > saved_step:
                save()
            reason = "done" if position["step"] >= num_steps else reason
        except RuntimeError as error:
            reason = "out of memory" if _is_out_of_memory(error) else None
            raise
        finally:
            if distiller.is_first:
                ledger.end(saved_step, position["tokens"], clock.seconds, reason or "failed")
    assert reason is not None
    return reason


def _step(
    recipe: Recipe, plan: dict[str, Any], feed: Feed, distiller: Distiller, position: dict[str, Any], clock: Clock
) -> dict[str, Any] | None:
    """One optimizer step; advances `position` and gives the line for metrics, or None where fp16 overflowed."""
    step, start = position["step"], time.monotonic()
    schedule = Schedule.model_validate(plan["schedule"])
    rate = learning_rate(plan["learning_rate"], schedule, step, plan["num_steps"])
    num_targets = feed.num_targets(step)
    batches = (feed.batch(step, micro) for micro in range(feed.micro_batches))
    result = distiller.step(batches, num_targets, rate)
    if not result.applied:
        # An overflow is how the loss scale finds its value: the same rows are fed again.
        position["skipped_steps"] += 1
        return None
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
    return {
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


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
