"""A run of 284 hours by a clock that is wound by hand: sessions of random length, killed, bounded by week and budget.

The loop, its ledger, its hours, its checkpoints and its schedule are the real ones; the engine only lets time pass, and
its weights are a record of the steps that it was given.
"""

from __future__ import annotations

import os
import random
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from daramgpt import checkpoint, ledger
from daramgpt.budget import HOUR, WEEK, week_start
from daramgpt.engine import StepResult
from daramgpt.progress import Console
from daramgpt.recipe import Recipe, validate
from daramgpt.run_directory import RunDirectory
from daramgpt.train import Position, StopRequest, Training
from daramgpt.train.loop import BEAT_SECONDS, Loop
from daramgpt.train.schedule import first_horizon

STEP_SECONDS, SAVE_SECONDS = 600.0, 40.0
BUDGET_HOURS, SESSION_HOURS, WEEKLY_HOURS = 284.0, 9.0, 30.0
BEGIN = 1.7e9


class KilledError(BaseException):
    """In place of SIGKILL."""


class Clock:
    """What `time` says; after `killed_at` nothing is written any more."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.killed_at = BEGIN, float("inf")
        # Nothing here outlives a kill by the disk's grace, and syncing takes most of the time.
        monkeypatch.setattr(os, "fsync", lambda _: None)
        monkeypatch.setattr(time, "time", lambda: self.now)
        monkeypatch.setattr(time, "monotonic", lambda: self.now - BEGIN)
        append = ledger.Ledger._append

        def written(of: ledger.Ledger, *arguments: Any, **fields: Any) -> None:
            if self.now < self.killed_at:
                append(of, *arguments, **fields)

        monkeypatch.setattr(ledger.Ledger, "_append", written)

    def passes(self, seconds: float) -> None:
        self.now += seconds
        if self.now >= self.killed_at:
            raise KilledError


class Feed:
    """Rows that are the number of their step."""

    micro_batches, sha256 = 1, "0"

    def __init__(self, num_steps: int) -> None:
        self.num_steps = num_steps

    def batch(self, step: int, _: int) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.tensor([step]), torch.tensor([step])

    def num_targets(self, _: int) -> int:
        return 1000

    def stage(self, _: int) -> str:
        return "web"


class Distiller:
    """An engine whose weights are the number of steps, the sum of their rows and a hash of their order."""

    rank, world_size, is_first, is_intact, device = 0, 1, True, True, torch.device("cpu")

    def __init__(self, clock: Clock, step_seconds: float, weights: torch.Tensor | None) -> None:
        self.clock, self.step_seconds = clock, step_seconds
        self.weights = torch.zeros(3, dtype=torch.float64) if weights is None else weights
        self.rate = 0.0

    def step(self, batches: Any, num_targets: int, rate: float, flags: Any) -> StepResult:
        [(rows, _)] = batches
        self.clock.passes(self.step_seconds * random.uniform(0.95, 1.05))
        row, self.rate = float(rows[0]), rate
        count, total, order = self.weights.tolist()
        self.weights = torch.tensor([count + 1, total + row, (order * 31 + row) % 1e9], dtype=torch.float64)
        return StepResult(kd=1.0, ce=1.0, hidden=0.0, grad_norm=1.0, applied=True, is_finite=True, flags=tuple(flags()))

    def gather(self) -> dict[str, dict[str, torch.Tensor]]:
        self.clock.passes(SAVE_SECONDS)
        return {name: {"steps": self.weights.clone()} for name in checkpoint.TENSOR_FILES}

    def any_rank(self, flag: bool) -> bool:
        return flag

    def largest(self, number: int) -> int:
        return number

    def loss_scaler(self) -> dict[str, Any]:
        return {}

    def loss_scale(self) -> float:
        return 1.0


def expected_weights(num_steps: int) -> list[float]:
    order = 0.0
    for step in range(num_steps):
        order = (order * 31 + step) % 1e9
    return [num_steps, num_steps * (num_steps - 1) / 2, order]


class LongRun:
    """A run of `hours` at the usual speed, and its sessions."""

    def __init__(self, folder: Path, clock: Clock, horizon: str, hours: float) -> None:
        self.clock, self.run = clock, RunDirectory(folder / "run")
        self.recipe: Recipe = validate(
            {
                "name": "long",
                "curriculum": {"stages": [{"name": "web", "corpus": "web", "take": "8KB", "unit": "sentence"}]},
                "teacher": {"model": "none"},
                "schedule": {"horizon": horizon},
                "checkpoint": {"every_minutes": 60},
                # There is no text to measure.
                "evaluation": {"points": 0},
                "budget": {
                    "budget_hours": BUDGET_HOURS,
                    "session_hours": SESSION_HOURS,
                    "weekly_hours": WEEKLY_HOURS,
                },
            },
            "test",
        )
        self.plan = {
            "num_steps": int(hours * HOUR / STEP_SECONDS),
            "schedule": self.recipe.schedule.model_dump(),
            "learning_rate": 1.0,
            "batch_rows": 1,
            "micro_batch_rows": 1,
            "context_tokens": 1000,
            "predicted": {"hours": hours},
        }
        self.rate, self.seconds = 0.0, 0.0
        self.console = Console(self.run.path / "log.txt", silent=True)

    def session(self, step_seconds: float) -> str | None:
        """How a session ended; None where it was killed."""
        saved = checkpoint.newest(self.run.checkpoints, self.console)
        weights, position = None, Position(first_horizon(self.plan, BUDGET_HOURS))
        if saved is not None:
            weights = saved.weights()["steps"]
            position = Position.read(saved.state, self.plan["num_steps"])
        distiller = Distiller(self.clock, step_seconds, weights)
        start = self.clock.now
        stop = StopRequest(start + SESSION_HOURS * HOUR)
        training = Training(
            "student",
            self.recipe,
            self.run,
            self.plan,
            None,  # type: ignore[arg-type]
            None,
            stop,
            self.console,
            self.run.ledger,
            "here",
        )
        loop = Loop(training, Feed(self.plan["num_steps"]), distiller, position)  # type: ignore[arg-type]
        try:
            return loop()
        except KilledError:
            return None
        finally:
            self.rate = distiller.rate or self.rate
            self.seconds += self.clock.now - start


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("horizon", "hours"), [("hours", 400.0), ("tokens", 200.0)])
def test_sessions_killed_at_random(
    horizon: str, hours: float, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)
    run = LongRun(tmp_path, clock, horizon, hours)
    chance = random.Random(seed)
    random.seed(seed)
    kills, reason = 0, None
    for _ in range(400):
        clock.killed_at = clock.now + chance.uniform(0, 16) * HOUR
        reason = run.session(STEP_SECONDS * chance.choice([0.8, 1.0, 1.3]))
        kills += reason is None
        used = ledger.seconds_used(run.run.ledger)
        assert used <= BUDGET_HOURS * HOUR + SAVE_SECONDS
        found = ledger.sessions(run.run.ledger)
        week = week_start(clock.now, "saturday")
        this_week = sum(min(one.seconds, max(0.0, one.ended - week)) for one in found)
        assert this_week <= WEEKLY_HOURS * HOUR + SAVE_SECONDS
        clock.killed_at = float("inf")
        if reason == "done" or BUDGET_HOURS * HOUR - used < 2 * STEP_SECONDS + 2 * SAVE_SECONDS:
            break
        clock.now += chance.uniform(0, 30) * HOUR
        if this_week > (WEEKLY_HOURS - 1) * HOUR:
            clock.now = max(clock.now, week + WEEK)
    assert kills > 5
    saved = checkpoint.newest(run.run.checkpoints)
    assert saved is not None
    # Every step once and in order, whatever was trained twice on the way.
    assert saved.weights()["steps"].tolist() == expected_weights(saved.state["step"])
    # The ledger knows of all hours but those since the last line of the sessions that were killed.
    unknown = run.seconds - ledger.seconds_used(run.run.ledger)
    assert 0 <= unknown <= kills * (BEAT_SECONDS + 1.5 * STEP_SECONDS + SAVE_SECONDS)
    if horizon == "tokens":
        assert reason == "done" and saved.state["step"] == run.plan["num_steps"]
    else:
        # The hours do not reach the end of the curriculum, and most of them were used.
        assert saved.state["step"] < run.plan["num_steps"]
        assert ledger.seconds_used(run.run.ledger) > 0.93 * BUDGET_HOURS * HOUR
    assert run.rate < 0.02
