"""The account of the start: every second once, and what it watches is there."""

from __future__ import annotations

import functools
import importlib
import time

import pytest

from benchmarks import startup
from benchmarks.startup_trace import FIRST_STEP, INTERPRETER, OWN, WATCHED, Trace, library


def test_seconds_belong_to_the_innermost_and_sum_up(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "time", lambda: now)
    trace = Trace(90.0)
    with trace(OWN):
        now += 1
        with trace("outer"):
            now += 2
            with trace("inner"):
                now += 4
            now += 8
        with trace(FIRST_STEP):
            now += 16
        with trace(FIRST_STEP):
            now += 32
    assert trace.seconds == {INTERPRETER: 10, OWN: 1, "outer": 10, "inner": 4, FIRST_STEP: 48}
    assert trace.first_step == 115


@pytest.mark.parametrize("module_name", WATCHED)
def test_what_is_watched_exists(module_name: str) -> None:
    module = importlib.import_module(module_name)
    for path in WATCHED[module_name]:
        assert callable(functools.reduce(getattr, path.split("."), module))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("torch.nn", "torch"),
        ("torch._inductor.config", "torch's compiler"),
        ("torchvision", "other libraries"),
        ("daramgpt", "daramgpt"),
    ],
)
def test_an_import_belongs_to_its_library(module: str, expected: str) -> None:
    assert library(module) == expected


def test_the_table_has_every_command_and_the_sum() -> None:
    result = {
        "seconds_to_first_step": 12.5,
        "first_step_seconds": 3.0,
        "first_step_tokens": 2048,
        "teacher_file_bytes": 4_650_000_000,
        "rows": [
            {"name": "plan", "seconds": 4.0, "cpu_seconds": 5.0, "parts": {"import torch": 3.95, "own code": 0.05}},
            {"name": "train", "seconds": 8.5, "cpu_seconds": 9.0, "parts": {"student built": 8.5}},
        ],
    }
    text = startup.format_result(result)
    assert [line.split()[0] for line in text.splitlines()[1:5]] == ["plan", "import", "train", "student"]
    assert text.splitlines()[-1].startswith("12.5 s to the first training step, whose first 2,048 tokens took 3.0 s")
