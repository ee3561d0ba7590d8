"""Elementwise functions of torch have been called once, by one thread, before anything is computed with several."""

from __future__ import annotations

import subprocess
import sys

import pytest

# Of a process that imports a module: which functions it has called by then, and with how many numbers.
CALLED = """
import sys, torch
called = {}
def recorded(name, function):
    def call(tensor, *arguments, **options):
        called.setdefault(name, tensor.numel())
        return function(tensor, *arguments, **options)
    return call
for name in ("exp", "log", "sqrt", "tanh"):
    setattr(torch, name, recorded(name, getattr(torch, name)))
__import__(sys.argv[1])
print(sorted(called.items()))
"""


@pytest.mark.parametrize("module", ["daramgpt.losses", "daramgpt.teacher", "daramgpt.evaluation.held_out"])
def test_what_computes_has_called_each_function_alone_before(module: str) -> None:
    line = [sys.executable, "-c", CALLED, module]
    printed = subprocess.run(line, capture_output=True, text=True, check=True).stdout.strip()
    assert printed == str([("exp", 1), ("log", 1), ("sqrt", 1), ("tanh", 1)])
