"""The ledger survives kills and rubbish, and a session that died is counted to its last beat."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daramgpt.ledger import Ledger, entries, seconds_used, sessions


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run" / "ledger.jsonl"


def session(path: Path, first_step: int, step: int, seconds: float, reason: str | None) -> None:
    ledger = Ledger(path)
    ledger.start("student", "a machine", first_step, 100 * first_step)
    ledger.beat(step, 100 * step, seconds)
    if reason:
        ledger.end(step, 100 * step, seconds, reason)


def test_there_are_no_sessions_before_the_first(path: Path) -> None:
    assert sessions(path) == [] and seconds_used(path) == 0


def test_sessions_add_up_and_one_without_an_end_died_at_its_last_beat(path: Path) -> None:
    session(path, 0, 40, 60.0, "deadline")
    session(path, 40, 70, 30.0, None)
    session(path, 70, 100, 20.5, "done")
    found = sessions(path)
    assert [(one.number, one.first_step, one.step, one.reason) for one in found] == [
        (1, 0, 40, "deadline"),
        (2, 40, 70, "died"),
        (3, 70, 100, "done"),
    ]
    assert found[1].tokens == 7000 and found[1].seconds == 30.0 and found[1].machine == "a machine"
    assert found[0].started <= found[1].started <= found[2].started
    assert seconds_used(path) == 110.5


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_last_line_cut_short_is_passed_over_and_swallows_nothing(path: Path, cut: int) -> None:
    session(path, 0, 40, 60.0, "done")
    path.write_bytes(path.read_bytes()[:-cut])
    whole = cut == 1  # only its line feed is gone
    assert sessions(path)[0].reason == ("done" if whole else "died")
    assert sessions(path)[0].seconds == 60.0
    session(path, 40, 50, 5.0, "interrupted")
    assert [one.reason for one in sessions(path)] == ["done" if whole else "died", "interrupted"]
    # Three lines each, and of the one whose end was lost one written by the other.
    assert len(path.read_text().splitlines()) == (6 if whole else 7)


def test_a_damaged_start_costs_its_session_and_no_other(path: Path) -> None:
    for number in range(3):
        session(path, 10 * number, 10 * number + 10, 1.0, "deadline")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(["}" + lines[0], *lines[1:]]))
    session(path, 30, 40, 1.0, "done")
    assert [(one.first_step, one.reason) for one in sessions(path)] == [
        (10, "deadline"),
        (20, "deadline"),
        (30, "done"),
    ]


VALUE = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=2),
    max_leaves=3,
)
KEYS = ("event", "session", "time", "step", "tokens", "seconds", "reason", "machine")
LINE = st.one_of(
    st.binary(max_size=30),
    st.fixed_dictionaries({}, optional=dict.fromkeys(KEYS, VALUE)).map(lambda entry: json.dumps(entry).encode()),
    st.fixed_dictionaries(
        {"event": st.sampled_from(["start", "beat", "end"]), "session": st.just(1)}
        | dict.fromkeys(KEYS[2:], VALUE | st.just(3))
    ).map(lambda entry: json.dumps(entry).encode()),
    st.sampled_from([b"[" * 100_000, b"1e999", b'{"event": "start"}', b"9" * 5000]),
)


@settings(max_examples=80, deadline=None)
@given(st.lists(LINE, max_size=6), st.lists(LINE, max_size=3))
def test_rubbish_is_never_a_traceback_and_hides_no_good_session(before: list[bytes], after: list[bytes]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "ledger.jsonl"
        path.write_bytes(b"\n".join(before))
        session(path, 0, 40, 60.0, "done")
        assert (sessions(path)[-1].step, sessions(path)[-1].reason) == (40, "done")
        with path.open("ab") as file:
            file.write(b"\n".join(after))
        sessions(path)
        seconds_used(path)
        assert all(isinstance(entry, dict) for entry in entries(path))
