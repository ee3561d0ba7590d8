"""Hours: what a session, a week and the whole run may still take, and the calendar that follows.

Hours are those of training, saving included, as the ledger has them. A week begins on the recipe's weekday at midnight
UTC, which is when free services give their hours anew.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from daramgpt.ledger import Session
from daramgpt.recipe import Budget

HOUR = 3600.0
DAY = 24 * HOUR
WEEK = 7 * DAY
WEEKDAYS = ("monday", "tuesday", "wednesday", "thursday", "friday", "saturday", "sunday")
# The Unix epoch was a Thursday.
_EPOCH_WEEKDAY = WEEKDAYS.index("thursday")
# Beyond so many weeks a calendar says nothing.
MOST_WEEKS = 1000


@dataclass(frozen=True)
class Left:
    """What may still be trained from a moment on.

    Attributes:
        seconds: infinite where nothing bounds it.
        bound: what bounds it, for people; empty where nothing does.
    """

    seconds: float
    bound: str


def week_start(at: float, begins: str) -> float:
    """Unix time of the midnight at which the week of a moment began."""
    day = math.floor(at / DAY)
    return (day - (day + _EPOCH_WEEKDAY - WEEKDAYS.index(begins)) % 7) * DAY


def used_in_week(found: Sequence[Session], at: float, begins: str) -> float:
    """Seconds of training in the week of a moment; of a session that began in the week before, its last part."""
    start = week_start(at, begins)
    return sum(min(session.seconds, max(0.0, session.ended - start)) for session in found)


def latest(found: Sequence[Session], now: float) -> float:
    """Now, or the last time that the ledger has where a clock was set back: no week begins twice."""
    return max([now, *(session.ended for session in found)])


def left(budget: Budget, found: Sequence[Session], now: float) -> Left:
    """What week and budget leave for a session that begins now; the session's own hours are not looked at.

    Args:
        budget: of the recipe.
        found: sessions so far.
        now: Unix time.
    """
    bounds = [Left(HOUR * budget.budget_hours - sum(session.seconds for session in found), _of_run(budget))]
    if budget.weekly_hours is not None:
        now = latest(found, now)
        this_week = max(0.0, HOUR * budget.weekly_hours - used_in_week(found, now, budget.week_begins))
        until_next = week_start(now, budget.week_begins) + WEEK - now
        if 0 < until_next <= this_week:
            # The session reaches the next week, and its hours.
            this_week = until_next + HOUR * budget.weekly_hours
        bounds.append(Left(this_week, f"budget.weekly_hours = {budget.weekly_hours:g}"))
    smallest = min(bounds, key=lambda bound: bound.seconds)
    return Left(max(0.0, smallest.seconds), smallest.bound)


def has_grown(budget: Budget, placed_by: float | None) -> bool:
    """Whether the run's hours are more than those that its schedule was to end with.

    Args:
        budget: of the recipe.
        placed_by: hours that a checkpoint's horizon was placed by; None where the curriculum ends it.
    """
    return placed_by is not None and budget.budget_hours > placed_by


def end_step(state: dict[str, Any], num_steps: int, budget: Budget) -> int:
    """Steps after which a training is over: its curriculum's, or fewer where hours end it and none were added.

    Args:
        state: of its newest checkpoint.
        num_steps: of the curriculum.
        budget: of the recipe.
    """
    horizon, end = state.get("horizon"), state.get("num_steps")
    placed_by = horizon.get("budget_hours") if isinstance(horizon, dict) else None
    if not isinstance(end, int) or end < 1 or (isinstance(placed_by, int | float) and has_grown(budget, placed_by)):
        return num_steps
    return end


def _of_run(budget: Budget) -> str:
    return f"budget.budget_hours = {budget.budget_hours:g}"


@dataclass(frozen=True)
class Calendar:
    """The sessions to come.

    Attributes:
        hours_needed: of training, to the end of the curriculum.
        hours_left: of the budget.
        sessions: until the end or the budget is reached; None where a session has no bound.
        weeks: that those take, the current one included; None where a week has no bound.
        done: Unix time, at the earliest: session after session; None where that is more than 1,000 weeks off.
        fraction: of the curriculum that will have been trained.
    """

    hours_needed: float
    hours_left: float
    sessions: int | None
    weeks: int | None
    done: float | None
    fraction: float


def calendar(
    budget: Budget, found: Sequence[Session], now: float, seconds_needed: float, fraction_trained: float
) -> Calendar:
    """When a run will be done.

    Args:
        budget: of the recipe.
        found: sessions so far.
        now: Unix time.
        seconds_needed: of training, to the end of the curriculum.
        fraction_trained: of the curriculum so far.
    """
    used = sum(session.seconds for session in found)
    seconds_left = max(0.0, HOUR * budget.budget_hours - used)
    to_do = min(seconds_needed, seconds_left)
    fit = to_do / seconds_needed if seconds_needed > 0 else 1.0
    session_most = HOUR * budget.session_hours if budget.session_hours is not None else math.inf
    at, remaining, num_sessions, num_weeks = latest(found, now), to_do, 0, 0
    done = None if budget.weekly_hours is not None else at + remaining
    if budget.weekly_hours is None:
        num_sessions = math.ceil(remaining / session_most)
    else:
        week_left = max(0.0, HOUR * budget.weekly_hours - used_in_week(found, at, budget.week_begins))
        for _ in range(MOST_WEEKS):
            num_weeks += 1
            week_end = week_start(at, budget.week_begins) + WEEK
            takes = min(remaining, week_left, week_end - at)
            num_sessions += math.ceil(takes / session_most)
            remaining -= takes
            if remaining <= 0:
                done = at + takes
                break
            at, week_left = week_end, HOUR * budget.weekly_hours
    return Calendar(
        hours_needed=seconds_needed / HOUR,
        hours_left=seconds_left / HOUR,
        sessions=num_sessions if budget.session_hours is not None and done is not None else None,
        weeks=num_weeks if budget.weekly_hours is not None and done is not None else None,
        done=done,
        fraction=fraction_trained + (1 - fraction_trained) * fit,
    )


def describe(found: Calendar, budget: Budget) -> str:
    """A calendar in one line."""
    parts = [f"{found.hours_needed:,.1f} hours of training to go, of {found.hours_left:,.1f} that the budget has left"]
    if found.sessions is not None:
        parts.append(f"{_number(found.sessions, 'session')} of {budget.session_hours:g} h")
    if found.weeks is not None:
        parts.append(f"{_number(found.weeks, 'week')} of {budget.weekly_hours:g} h")
    if found.done is not None:
        day = datetime.fromtimestamp(found.done).strftime("%Y-%m-%d %H:%M")
        parts.append(f"until {day} at the earliest")
    share = "all" if found.fraction >= 1 else f"{found.fraction:.0%}"
    return f"calendar: {'; '.join(parts)}; {share} of the curriculum fits"


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'s' * (count != 1)}"
