"""Hours that session, week and budget leave, and the calendar that follows from them."""

from __future__ import annotations

import math
from datetime import UTC, datetime

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daramgpt.budget import HOUR, WEEK, WEEKDAYS, calendar, describe, left, used_in_week, week_start
from daramgpt.ledger import Session
from daramgpt.recipe import Budget

# A Tuesday.
NOW = datetime(2026, 11, 24, 12, tzinfo=UTC).timestamp()
SATURDAY = datetime(2026, 11, 21, tzinfo=UTC).timestamp()


def session(started: float, hours: float) -> Session:
    ended = started + hours * HOUR
    return Session(1, "student", started, ended, "here", 0, 1, 0, 1, hours * HOUR, 0.0, "deadline", True)


@pytest.mark.parametrize("day", WEEKDAYS)
def test_a_week_begins_at_midnight_of_its_day(day: str) -> None:
    start = week_start(NOW, day)
    moment = datetime.fromtimestamp(start, UTC)
    assert moment.strftime("%A").lower() == day and (moment.hour, moment.minute) == (0, 0)
    assert 0 <= NOW - start < WEEK
    assert week_start(start, day) == start and week_start(start - 1, day) == start - WEEK


def test_of_a_session_over_midnight_the_week_has_the_last_part() -> None:
    found = [session(SATURDAY - 3 * HOUR, 5), session(SATURDAY - 9 * HOUR, 4), session(NOW - 2 * HOUR, 1)]
    assert used_in_week(found, NOW, "saturday") == pytest.approx(3 * HOUR)


def test_what_is_left_is_the_least_of_week_and_budget() -> None:
    found = [session(NOW - 10 * HOUR, 8)]
    budget = Budget(budget_hours=100, weekly_hours=30)
    assert left(budget, found, NOW).seconds == pytest.approx(22 * HOUR)
    assert "weekly_hours = 30" in left(budget, found, NOW).bound
    budget = Budget(budget_hours=12, weekly_hours=30)
    assert left(budget, found, NOW).seconds == pytest.approx(4 * HOUR)
    assert "budget_hours = 12" in left(budget, found, NOW).bound
    assert left(Budget(budget_hours=8), found, NOW).seconds == 0
    assert left(Budget(budget_hours=8), [], NOW).seconds == 8 * HOUR


def test_a_session_that_reaches_the_next_week_has_its_hours_too() -> None:
    friday_night = SATURDAY + WEEK - 2 * HOUR
    found = [session(friday_night - 25 * HOUR, 25)]
    budget = Budget(budget_hours=284, weekly_hours=30)
    assert left(budget, found, friday_night).seconds == pytest.approx((2 + 30) * HOUR)


def test_a_clock_set_back_gives_no_week_twice() -> None:
    found = [session(NOW, 20)]
    budget = Budget(budget_hours=284, weekly_hours=30)
    assert left(budget, found, NOW - 3 * WEEK).seconds == pytest.approx(10 * HOUR)


def test_the_calendar_of_a_run_that_fits() -> None:
    budget = Budget(session_hours=9, weekly_hours=30, budget_hours=284)
    found = calendar(budget, [], SATURDAY, 65 * HOUR, 0.0)
    # 9 + 9 + 9 + 3 a week.
    assert (found.sessions, found.weeks, found.fraction) == (9, 3, 1.0)
    assert found.done == pytest.approx(SATURDAY + 2 * WEEK + 5 * HOUR)
    assert found.hours_left == 284 and found.hours_needed == 65


def test_the_calendar_of_a_run_that_does_not_fit() -> None:
    budget = Budget(session_hours=10, budget_hours=100)
    found = calendar(budget, [session(NOW - 50 * HOUR, 50)], NOW, 100 * HOUR, 0.4)
    assert (found.sessions, found.weeks) == (5, None)
    assert found.fraction == pytest.approx(0.4 + 0.6 / 2)
    assert found.done == pytest.approx(NOW + 50 * HOUR)


def test_a_calendar_in_words() -> None:
    budget = Budget(session_hours=9, weekly_hours=30, budget_hours=284)
    line = describe(calendar(budget, [], SATURDAY, 65 * HOUR, 0.0), budget)
    for part in (
        "65.0 hours",
        "of 284.0",
        "9 sessions of 9 h",
        "3 weeks of 30 h",
        "2026-12-05",
        "all of the curriculum",
    ):
        assert part in line, (part, line)
    budget = Budget(budget_hours=100)
    line = describe(calendar(budget, [session(NOW - 50 * HOUR, 50)], NOW, 100 * HOUR, 0.4), budget)
    assert "70% of the curriculum" in line and "session" not in line and "week" not in line


def test_a_week_that_is_used_up_waits_for_the_next() -> None:
    budget = Budget(weekly_hours=30, budget_hours=284)
    found = calendar(budget, [session(SATURDAY, 30)], SATURDAY + 31 * HOUR, 10 * HOUR, 0.0)
    assert found.sessions is None and found.weeks == 2
    assert found.done == pytest.approx(SATURDAY + WEEK + 10 * HOUR)


@settings(max_examples=200, deadline=None)
@given(
    needed=st.floats(0, 1e6),
    session_hours=st.none() | st.floats(1e-3, 50),
    weekly=st.none() | st.floats(1e-3, 300),
    total=st.floats(1e-3, 1e4),
    used=st.lists(st.tuples(st.floats(0, 500), st.floats(0, 20)), max_size=4),
)
def test_a_calendar_always_ends(
    needed: float, session_hours: float | None, weekly: float | None, total: float, used: list[tuple[float, float]]
) -> None:
    budget = Budget(session_hours=session_hours, weekly_hours=weekly, budget_hours=total)
    found = [session(NOW - ago * HOUR, hours) for ago, hours in used]
    result = calendar(budget, found, NOW, needed * HOUR, 0.25)
    assert 0.25 <= result.fraction <= 1.0
    assert result.done is None or (math.isfinite(result.done) and result.done >= NOW)
