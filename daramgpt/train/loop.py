"""One session's steps: rows in, optimizer steps, checkpoints, until the end or a reason to stop.

The rows of a step, its learning rate and its place in the curriculum are functions of its number and of the horizon
that the checkpoint keeps, so a run that goes on from a checkpoint does what one never interrupted would have done.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import time
from dataclasses import replace
from typing import Any

import torch

from daramgpt import budget, checkpoint
from daramgpt.engine import Distiller, LossScaleFloorError
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger, identity, sessions
from daramgpt.progress import Outlook, TrainingDisplay
from daramgpt.recipe import Schedule, dump
from daramgpt.recipe_changes import settings_that_matter
from daramgpt.shards import Feed, Prefetch
from daramgpt.trackers import Trackers
from daramgpt.train.held_out import HeldOut
from daramgpt.train.out_of_memory import StepOutOfMemoryError, as_step_fault
from daramgpt.train.position import Position
from daramgpt.train.schedule import learning_rate, placed
from daramgpt.train.session import Clock
from daramgpt.train.training import Training

# Saving is given this factor over the longest save so far before the deadline.
SAVE_MARGIN = 1.5
# Between the lines by which the ledger knows how long a session lasted that was killed.
BEAT_SECONDS = 60.0
# A horizon that the hours left do not reach by this share is placed anew before the session's end.
MOST_SHORTFALL = 0.02


class Loop:
    """A session of a training.

    Args:
        training: what it is given.
        feed: its rows.
        distiller: with the weights of `position`.
        position: where the training stands; the loop moves it.
    """

    def __init__(self, training: Training, feed: Feed, distiller: Distiller, position: Position) -> None:
        self.training, self.feed, self.distiller, self.position = training, feed, distiller, position
        self._schedule = Schedule.model_validate(training.plan["schedule"])
        found = sessions(training.ledger)
        self._ledger = Ledger(training.ledger)
        used = sum(session.seconds for session in found)
        own = [session for session in found if session.training == training.label]
        longest_save = max([1.0, *(session.save_seconds for session in own)])
        self.clock = Clock(time.monotonic(), used, longest_save)
        self._left = budget.left(training.recipe.budget, found, time.time())
        # By its earlier sessions, until this one has a step.
        self._usual_step_seconds = sum(session.seconds for session in own) / max(1, position.step)
        self._first_step = position.step
        self._saved_step, self._saved_tokens = position.step, position.tokens
        self._saved_at = self._beat_at = self.clock.started
        # What went to sessions before the one that the ledger has now: where the horizon is placed anew, one begins.
        self._seconds_before = 0.0
        self._asked: str | None = None
        self._held_out = HeldOut(training, feed, distiller, position)

    def __call__(self) -> str:
        """Train.

        Returns:
            ``done``, ``deadline`` or ``interrupted``; a checkpoint of the last step stands in each case.

        Raises:
            StepOutOfMemoryError: a step did not fit.
            LossScaleFloorError: a step overflowed fp16 at the least loss scale; nothing moved.
            UserError: a loss or a gradient is not finite, which nothing moved by, or the disk is full.
        """
        training, position, distiller = self.training, self.position, self.distiller
        if distiller.is_first:
            self._ledger.start(training.label, training.machine, position.step, position.tokens)
        if budget.has_grown(training.recipe.budget, position.horizon.budget_hours):
            self._place_horizon()
        reason: str | None = None
        fault: StepOutOfMemoryError | None = None
        first, end_step = distiller.is_first, position.horizon.end_step
        with (
            contextlib.closing(self._trackers(first)) as trackers,
            TrainingDisplay(
                training.console,
                training.run.metrics,
                training.label,
                end_step,
                position.step,
                self._outlook,
                trackers.log,
                first,
            ) as display,
            contextlib.closing(Prefetch(self.feed, distiller.device)) as rows,
        ):
            try:
                is_end = self._has_no_hours()
                while position.step < position.horizon.end_step and not is_end:
                    if position.step in position.passed_over:
                        position.step += 1
                        continue
                    entry, is_end, is_due = self._step(rows)
                    if entry is not None:
                        display.step(entry)
                        if "plateau" in entry:
                            position.horizon = self._held_out.after_plateau(position)
                            display.num_steps = position.horizon.end_step
                    # Every rank takes the same decision, whoever was asked.
                    if is_due and not is_end and position.step > self._saved_step:
                        self._save_on_the_way()
                        display.num_steps = position.horizon.end_step
                    self._beat()
                reason = "done" if position.step >= position.horizon.end_step else self._asked or "interrupted"
                if reason != "done":
                    self._place_horizon()
                if position.step > self._saved_step:
                    self._save()
            except LossScaleFloorError:
                reason = "went back"
                raise
            except (StepOutOfMemoryError, RuntimeError) as error:
                fault = as_step_fault(error, distiller.world_size)
            finally:
                if fault is None:
                    self._end(reason or "failed")
        if fault is not None:
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            if fault.is_shared and distiller.is_intact and position.step > self._saved_step:
                try:
                    self._save()
                except RuntimeError as error:
                    fault = as_step_fault(error, distiller.world_size)
            self._end("out of memory")
            raise fault
        assert reason is not None
        return reason

    def _trackers(self, is_first: bool) -> Trackers:
        training, recipe = self.training, self.training.recipe
        name = f"{recipe.name}-{identity(training.ledger)}"
        settings = settings_that_matter(recipe)
        names = recipe.report_to if is_first else ()
        return Trackers(
            names, training.ledger.parent / "trackers", name, self.position.step, settings, training.console
        )

    def _outlook(self) -> Outlook:
        """Of the step that was made last."""
        training, now = self.training, time.monotonic()
        number, share = self.feed.place_in_stage(self.position.step - 1)
        ends = [self._left.seconds - self.clock.seconds, training.stop.seconds_left]
        return Outlook(
            number,
            len(training.shards.stages),
            share,
            training.plan["predicted"].get("tokens_per_second"),
            memory_limit_bytes(),
            training.recipe.budget.budget_hours,
            self._saved_at + 60 * training.recipe.checkpoint.every_minutes - now,
            min(one for one in ends if one is not None),
        )

    def _step(self, rows: Prefetch) -> tuple[dict[str, Any] | None, bool, bool]:
        """One optimizer step; moves the position.

        Returns:
            The line for metrics, None where fp16 overflowed; and over all ranks, whether one was asked to stop, and
            whether a checkpoint is due.
        """
        position, plan, distiller, clock = self.position, self.training.plan, self.distiller, self.clock
        step, start = position.step, clock.step_starts()
        rate = learning_rate(plan["learning_rate"], self._schedule, step, position.horizon)
        num_targets = self.feed.num_targets(step)
        result = distiller.step(rows.batches(step), num_targets, rate, self._ends_and_saves)
        is_end, is_due = result.flags
        loss = self.training.recipe.loss.total(result.kd, result.ce, result.hidden)
        if not result.is_finite:
            # The weights are those of the step before.
            if step > self._saved_step:
                self._save()
            raise UserError(
                f"step {step + 1}: loss {loss}, gradient norm {result.grad_norm}",
                "nothing moved, and the step before is saved; lower optimizer.learning_rate in a new run",
            )
        if not result.applied:
            # An overflow is how the loss scale finds its value: the same rows are fed again.
            position.skipped_steps += 1
            return None, is_end, is_due
        position.step += 1
        position.tokens += num_targets
        clock.stepped(time.monotonic() - start, num_targets)
        entry = {
            "step": position.step,
            "tokens": position.tokens,
            "stage": self.feed.stage(step),
            "loss": loss,
            "kd": result.kd,
            "ce": result.ce,
            **({"hidden": result.hidden} if result.hidden else {}),
            "lr": rate,
            "grad_norm": result.grad_norm,
            "loss_scale": distiller.loss_scale(),
            "skipped_steps": position.skipped_steps,
            "tokens_per_second": 1 / clock.token_seconds,
            "peak_memory_bytes": peak_memory_bytes(),
            "hours_used": (clock.used_before + clock.seconds) / 3600,
            "hours_left": clock.token_seconds * self._step_tokens * (position.horizon.end_step - position.step) / 3600,
            **self._held_out(position),
        }
        return entry, is_end, is_due

    @property
    def _step_tokens(self) -> int:
        return int(self.training.plan["batch_rows"] * self.training.plan["context_tokens"])

    def _ends_and_saves(self) -> tuple[bool, bool]:
        """Whether this rank was asked to stop, and whether a checkpoint is due; the step is still being computed."""
        due = time.monotonic() - self._saved_at >= 60 * self.training.recipe.checkpoint.every_minutes
        return self._asks_to_stop(self.clock.seconds_for_another_step(self._step_tokens)), due

    def _asks_to_stop(self, step_seconds: float) -> bool:
        """Whether this rank is to stop, with so many seconds for one more step."""
        needed = step_seconds + self._held_out.longest_seconds + SAVE_MARGIN * self.clock.save_seconds
        if self.training.persister is not None:
            needed += self.training.persister.longest_seconds
        self._asked = self.training.stop.reason(needed)
        if self._asked is None and self.clock.seconds + needed > self._left.seconds:
            self._asked = "deadline"
        return self._asked is not None

    def _has_no_hours(self) -> bool:
        """Whether week or budget were used up before; a session's own deadline lets it have a step at least."""
        if not self.distiller.any_rank(self._left.seconds <= 0):
            return False
        self._asked = "deadline"
        self.training.console(f"{self.training.label}: no hours are left ({self._left.bound}); raise that to go on now")
        return True

    def _save_on_the_way(self) -> None:
        """Save; where the horizon has come out of reach, as the end of a session and the beginning of another."""
        if not self.distiller.any_rank(self._is_out_of_reach()):
            self._save()
            return
        self._place_horizon()
        self._save()
        end_step, reason = self.position.horizon.end_step, "re-placed"
        self.training.console(
            f"{self.training.label}: at this speed the hours last until step {end_step:,}; the schedule ends there"
        )
        self._end(reason)
        self._seconds_before = self.clock.seconds
        if self.distiller.is_first:
            self._ledger.start(self.training.label, self.training.machine, self.position.step, self.position.tokens)

    def _is_out_of_reach(self) -> bool:
        steps = self.position.horizon.end_step - self.position.step
        return (
            self._schedule.horizon == "hours"
            and self._seconds_left() < (1 - MOST_SHORTFALL) * steps * self._step_seconds()
        )

    def _place_horizon(self) -> None:
        """Where the hours that are left will have been used up; the same on every rank."""
        position = self.position
        if self._schedule.horizon != "hours" or not self._step_seconds():
            return
        new = placed(
            self._schedule,
            position.horizon,
            position.step,
            self.training.plan["num_steps"],
            self._seconds_left(),
            self._step_seconds(),
            self.training.recipe.budget.budget_hours,
        )
        position.horizon = replace(new, end_step=self.distiller.largest(new.end_step))

    def _seconds_left(self) -> float:
        """Of the budget."""
        return max(0.0, 3600 * self.training.recipe.budget.budget_hours - self.clock.used_before - self.clock.seconds)

    def _step_seconds(self) -> float:
        """Of a step in this session, its part of the saves included."""
        num_steps = self.position.step - self._first_step
        return self.clock.seconds / num_steps if num_steps else self._usual_step_seconds

    def _save(self) -> None:
        position, start = self.position, time.monotonic()
        facts = {
            "recipe_sha256": hashlib.sha256(dump(self.training.recipe).encode()).hexdigest(),
            "world_size": self.distiller.world_size,
            "step": position.step,
            "tokens": position.tokens,
            "seconds_used": round(self.clock.used_before + self.clock.seconds, 3),
        }
        state = {
            **position.state(),
            "num_steps": position.horizon.end_step,
            "settings": settings_that_matter(self.training.recipe),
            "shards_sha256": self.feed.sha256,
            "teacher_sha256": self.training.teacher_sha256,
        }
        keep, persister = self.training.recipe.checkpoint.keep, self.training.persister
        in_use = persister.busy_with if persister is not None else lambda: None
        path = checkpoint.save(self.training.run.checkpoints, self.distiller, state, keep, facts, in_use)
        if persister is not None and path is not None:
            persister.submit(path)
        self._saved_at, self._saved_step, self._saved_tokens = time.monotonic(), position.step, position.tokens
        self.clock.save_seconds = max(self.clock.save_seconds, self._saved_at - start)
        self._beat(self._saved_at - start)

    def _beat(self, save_seconds: float = 0.0) -> None:
        """Tell the ledger of a save, and once in a while that the session lives."""
        now = time.monotonic()
        if self.distiller.is_first and (save_seconds or now - self._beat_at >= BEAT_SECONDS):
            self._beat_at = now
            seconds = self.clock.seconds - self._seconds_before
            self._ledger.beat(self._saved_step, self._saved_tokens, seconds, save_seconds)

    def _end(self, reason: str) -> None:
        if self.distiller.is_first:
            seconds = self.clock.seconds - self._seconds_before
            self._ledger.end(self._saved_step, self._saved_tokens, seconds, reason)


def memory_limit_bytes() -> int:
    """Memory of the GPU where there is one, else of the machine."""
    if torch.cuda.is_available():
        return int(torch.cuda.get_device_properties(torch.cuda.current_device()).total_memory)
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def peak_memory_bytes() -> int:
    """Most memory this process has held: of the GPU where there is one, else resident."""
    if torch.cuda.is_available():
        return int(torch.cuda.max_memory_allocated())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
