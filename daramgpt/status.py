"""Where a run stands, read from its files alone, so that it answers at once and while the run is going on."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from daramgpt import budget, checkpoint, recipe
from daramgpt.ledger import MOST_COUNT, Session, sessions
from daramgpt.recipe import Budget, Recipe
from daramgpt.run_directory import RunDirectory, is_locked, read_json
from daramgpt.text_table import aligned, fitted, hung, terminal_columns

# Tokens a second; below them no calendar ends.
LEAST_SPEED = 1e-6
STAGE_HEADINGS = ("stage", "text MB", "tokens", "first step", "last step", "trained")


@dataclass(frozen=True)
class StageStatus:
    """A stage of the curriculum and how much of it has been trained."""

    name: str
    text_bytes: int
    tokens: int
    first_step: int
    last_step: int
    trained_fraction: float


@dataclass(frozen=True)
class Status:
    """What `read` finds.

    Attributes:
        state: ``new`` (nothing trained), ``running``, ``done`` (trained, evaluated, exported, reported),
            ``deadline``, ``interrupted``, or ``dead`` (the last session ended without a word, or by a fault).
        step, num_steps, tokens: of the student; num_steps is 0 before there is a plan.
        skipped_steps: by fp16 overflow.
        missing: what is left before the run is done.
        calendar: sessions and weeks to come, in a line; empty where nothing is left to train, or no speed is known.
    """

    state: str
    step: int
    num_steps: int
    tokens: int
    skipped_steps: int
    stages: list[StageStatus]
    sessions: list[Session]
    hours_used: float
    budget_hours: float
    missing: list[str]
    calendar: str


def read(run: RunDirectory, hours: Budget | None = None) -> Status:
    """Where a run stands; a directory without a run is ``new``.

    Args:
        run: its directory.
        hours: those of the command line; None = as the run's own recipe says.

    Raises:
        UserError: its recipe cannot be read.
    """
    stored = recipe.load(str(run.recipe)) if run.recipe.is_file() else None
    position = checkpoint.newest_state(run.checkpoints) or {}
    plan = read_json(run.plan)
    found = sessions(run.ledger)
    step, num_steps = _count(position, "step"), _count(plan, "num_steps")
    hours = hours or (stored.budget if stored else None)
    if num_steps and hours is not None:
        num_steps = budget.end_step(position, num_steps, hours)
    missing = _missing(stored, run, step, num_steps)
    if is_locked(run):
        state = "running"
    elif not missing:
        state = "done"
    elif not found:
        state = "new"
    elif found[-1].reason in ("deadline", "interrupted"):
        state = found[-1].reason
    else:
        state = "interrupted" if found[-1].reason == "done" else "dead"
    return Status(
        state=state,
        step=step,
        num_steps=num_steps,
        tokens=_count(position, "tokens"),
        skipped_steps=_count(position, "skipped_steps"),
        stages=_stages(run, plan, step),
        sessions=found,
        hours_used=sum(session.seconds for session in found) / 3600,
        budget_hours=hours.budget_hours if hours else 0.0,
        missing=missing,
        calendar=calendar_line(stored, run, found) if stored else "",
    )


def calendar_line(of: Recipe, run: RunDirectory, found: list[Session]) -> str:
    """When a run will be done, by the speed of its newest sessions, or before them by its plans.

    Args:
        of: recipe of the run.
        run: its directory.
        found: its sessions.
    """
    needed = to_train = trained = 0.0
    trainings = {"teacher": run.part("teacher"), "student": run, "student without a teacher": run.part("baseline")}
    for label, part in trainings.items():
        plan, position = read_json(part.plan), checkpoint.newest_state(part.checkpoints) or {}
        steps, step = _count(plan, "num_steps"), _count(position, "step")
        step_tokens = _count(plan, "batch_rows") * _count(plan, "context_tokens")
        predicted = plan.get("predicted")
        speed = predicted.get("tokens_per_second") if isinstance(predicted, dict) else None
        for session in found:
            if session.training == label and session.seconds > 0 and session.tokens > session.first_tokens:
                speed = (session.tokens - session.first_tokens) / session.seconds
        if not steps or not isinstance(speed, (int, float)) or not LEAST_SPEED < speed < MOST_COUNT:
            continue
        needed += max(0, steps - step) * step_tokens / speed
        if part is run:
            to_train, trained = steps, min(step, steps)
    if not needed or not to_train:
        return ""
    return budget.describe(budget.calendar(of.budget, found, time.time(), needed, trained / to_train), of.budget)


def _missing(stored: Recipe | None, run: RunDirectory, step: int, num_steps: int) -> list[str]:
    if stored is None:
        return ["prepare"]
    missing = []
    if not (run.shards / "index.json").is_file():
        missing.append("prepare")
    trains_teacher = stored.teacher is not None and stored.teacher.train is not None
    for name in ["teacher"] * trains_teacher + ["baseline"] * stored.evaluation.baseline:
        part = run.part(name)
        part_step = _count(checkpoint.newest_state(part.checkpoints) or {}, "step")
        if part_step < _count(read_json(part.plan), "num_steps", default=1):
            missing.append(f"train ({name})")
    if not num_steps or step < num_steps:
        missing.append("train")
    evaluation = read_json(run.evaluation)
    if evaluation.get("state") != "done" or evaluation.get("step") != step:
        missing.append("evaluate")
    if not (run.export / "model.safetensors").is_file() or read_json(run.export / "export.json").get("step") != step:
        missing.append("export")
    if not run.report.is_file():
        missing.append("report")
    return missing


def _stages(run: RunDirectory, plan: dict[str, Any], step: int) -> list[StageStatus]:
    """Stages of the first pass, by the steps that the plan gives them."""
    index = read_json(run.shards / "index.json")
    batch_rows, row, stages = _count(plan, "batch_rows"), 0, []
    for stage in tables(index.get("stages")):
        rows = _count(stage, "rows")
        first, last = (row // batch_rows, (row + rows - 1) // batch_rows) if batch_rows else (0, 0)
        trained = min(1.0, max(0.0, (step * batch_rows - row) / rows)) if rows else 1.0
        stages.append(
            StageStatus(
                str(stage.get("name")),
                _count(stage, "text_bytes"),
                _count(stage, "tokens"),
                first + 1,
                last + 1,
                trained,
            )
        )
        row += rows
    return stages


def _written_so_far(run: RunDirectory) -> str:
    """The stages of a `prepare` that is not finished, or nothing."""
    progress = read_json(run.shards.with_name(f"{run.shards.name}.partial") / "progress.json")
    parts = [
        f"{stage.get('name')} ({_count(stage, 'text_bytes') / 1e6:,.1f} MB)" for stage in tables(progress.get("stages"))
    ]
    found: Any = progress.get("stage")
    for key in ("training", "counts"):
        found = found.get(key) if isinstance(found, dict) else None
    if isinstance(found, dict):
        parts.append(f"{_count(found, 'text_bytes') / 1e6:,.1f} MB of the next stage")
    return ", ".join(parts)


def lines(status: Status, run: RunDirectory) -> list[str]:
    """The status for people, a line each."""
    share = f" ({status.step / status.num_steps:.1%})" if status.num_steps else ""
    result = [
        f"{run.path}: {status.state}",
        f"step {status.step:,} of {status.num_steps:,}{share}, {status.tokens:,} tokens, "
        f"{status.hours_used:.2f} of {status.budget_hours:g} hours used",
    ]
    if status.calendar:
        result.append(status.calendar)
    if status.missing:
        result.append(f"left to do: {', '.join(status.missing)}")
    if written := _written_so_far(run):
        result.append(f"prepare has written {written}")
    result = [piece for line in result for piece in hung(line, terminal_columns())]
    if status.stages:
        rows = [
            (
                stage.name,
                f"{stage.text_bytes / 1e6:,.2f}",
                f"{stage.tokens:,}",
                f"{stage.first_step:,}" if status.num_steps else "–",
                f"{stage.last_step:,}" if status.num_steps else "–",
                f"{stage.trained_fraction:.0%}",
            )
            for stage in status.stages
        ]
        result += ["", *_table([STAGE_HEADINGS, *rows])]
    if status.sessions:
        session_rows = [
            (
                str(session.number),
                session.training,
                datetime.fromtimestamp(session.started).strftime("%Y-%m-%d %H:%M"),
                f"{session.first_step:,} → {session.step:,}",
                f"{session.tokens:,}",
                f"{session.seconds / 60:,.1f}",
                "now" if status.state == "running" and session is status.sessions[-1] else session.reason,
            )
            for session in status.sessions
        ]
        headings = ("session", "training", "started", "steps", "tokens", "minutes", "ended")
        result += ["", *_table([headings, *session_rows])]
    return result


def _table(cells: Sequence[Sequence[str]]) -> list[str]:
    return [line for table in fitted(cells, terminal_columns()) for line in aligned(table)]


def _count(data: dict[str, Any], key: str, default: int = 0) -> int:
    """A whole number of a file, or `default` where it holds none."""
    value = data.get(key, default)
    return value if isinstance(value, int) and 0 <= value < MOST_COUNT else default


def tables(value: Any) -> list[dict[str, Any]]:
    """The objects of a list that a file may hold."""
    return [table for table in value if isinstance(table, dict)] if isinstance(value, list) else []
