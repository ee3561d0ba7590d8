"""The schedule of the learning rate, and what asks a session to stop."""

from __future__ import annotations

import itertools
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from daramgpt.recipe import Schedule
from daramgpt.train import Clock, Horizon, StopRequest, learning_rate

PEAK = 6e-4


def rates(num_steps: int, **schedule: float) -> list[float]:
    return [learning_rate(PEAK, Schedule(**schedule), step, Horizon(num_steps)) for step in range(num_steps)]


def test_warm_up_plateau_decay() -> None:
    found = rates(1000, warmup_fraction=0.1, decay_fraction=0.2, final_ratio=0.0)
    assert found[0] == pytest.approx(PEAK / 100)
    assert found[49] == pytest.approx(PEAK / 2)
    assert found[99:800] == pytest.approx([PEAK] * 701)
    assert found[900] == pytest.approx(PEAK / 2)
    assert found[999] == pytest.approx(PEAK / 200)
    rises = [later - earlier for earlier, later in itertools.pairwise(found)]
    assert min(rises[:99]) > 0 and max(rises[800:]) < 0
    # No jump anywhere: the steepest change is that of the warm-up.
    assert max(map(abs, rises)) == pytest.approx(PEAK / 100)


def test_the_rate_ends_at_its_final_ratio() -> None:
    found = rates(1000, warmup_fraction=0.0, decay_fraction=0.5, final_ratio=0.25)
    assert found[0] == PEAK
    assert found[-1] == pytest.approx(PEAK * 0.25, rel=0.01)
    assert found[750] == pytest.approx(PEAK * 0.625)
    assert min(found) >= PEAK * 0.25


def test_a_constant_rate() -> None:
    assert rates(50, warmup_fraction=0.0, decay_fraction=0.0) == [PEAK] * 50


@pytest.mark.parametrize("num_steps", [1, 2, 3, 17])
@pytest.mark.parametrize(("warmup", "decay"), [(0.01, 0.2), (1.0, 1.0), (0.0, 1.0), (1.0, 0.0)])
def test_no_step_is_without_effect(num_steps: int, warmup: float, decay: float) -> None:
    assert all(0 < rate <= PEAK for rate in rates(num_steps, warmup_fraction=warmup, decay_fraction=decay))


@pytest.fixture
def _signals() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_nothing_asks_to_stop(tmp_path: Path) -> None:
    assert StopRequest(None).reason(1e9) is None
    assert StopRequest(time.time() + 100, tmp_path / ".stop").reason(1.0) is None


def test_the_deadline_leaves_room_for_a_step_and_a_save() -> None:
    stop = StopRequest(time.time() + 100)
    assert stop.reason(90.0) is None
    assert stop.reason(101.0) == "deadline"
    assert StopRequest(time.time() - 1).reason(0.0) == "deadline"


def test_a_file_asks_to_stop(tmp_path: Path) -> None:
    stop = StopRequest(None, tmp_path / ".stop")
    (tmp_path / ".stop").touch()
    assert stop.reason(0.0) == "interrupted"


@pytest.mark.usefixtures("_signals")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_asks_to_stop_and_comes_before_the_deadline(number: signal.Signals) -> None:
    stop = StopRequest(time.time() - 1)
    stop.listen()
    assert stop.reason(0.0) == "deadline"
    os.kill(os.getpid(), number)
    assert stop.reason(0.0) == "interrupted"
    # A second Ctrl-C is not held back.
    assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL


def test_the_clock_averages_seconds_a_token_over_the_newest_steps() -> None:
    clock = Clock(time.monotonic(), 0.0, 0)
    clock.stepped(2.0, 100)
    assert clock.token_seconds == pytest.approx(0.02)
    for _ in range(200):
        clock.stepped(1.0, 100)
    assert clock.token_seconds == pytest.approx(0.01, rel=1e-3)


def test_a_last_step_of_few_tokens_does_not_change_the_speed() -> None:
    clock = Clock(time.monotonic(), 0.0)
    for _ in range(3):
        clock.stepped(1.0, 2048)
    clock.stepped(0.5, 35)
    assert clock.token_seconds == pytest.approx(1 / 2048, rel=0.05)


def test_another_step_takes_what_is_left_of_this_one_and_one_more(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 50.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    clock = Clock(0.0, 0.0)
    clock.step_starts()
    now = 60.0
    # Nothing is known but that the first step has taken this long.
    assert clock.seconds_for_another_step(100) == 10.0
    clock.stepped(8.0, 100)
    clock.step_starts()
    now = 62.0
    assert clock.seconds_for_another_step(100) == 6.0 + 8.0
    now = 70.0
    assert clock.seconds_for_another_step(100) == 10.0
