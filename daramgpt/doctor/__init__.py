"""Whether this machine can do what a recipe asks, before hours are spent: one line a check, with what mends it.

A fault that would stop the run is ``blocked``; one that makes it slow, or may stop it later, is a ``warn``. What can
only be known by trying is tried: a product on every device, a small layer in every precision of the teacher, the
import of DeepSpeed. Nothing is imported for it that a check does not need: of what is left, importing torch takes most.
"""

from __future__ import annotations

import platform
import sys

from daramgpt.doctor import libraries, needs, precisions
from daramgpt.doctor.finding import Check
from daramgpt.hardware import GIB, Machine
from daramgpt.recipe import Recipe
from daramgpt.run_directory import RunDirectory

__all__ = ["Check", "check"]

PYTHON_FLOOR = (3, 11)
MEMORY_FLOOR_BYTES = 4 * GIB


def check(recipe: Recipe, run: RunDirectory, machine: Machine) -> list[Check]:
    """Everything a run of `recipe` in `run` needs, in the order in which it would be missed."""
    checks = [_python(), _memory(machine), *libraries.packages(), libraries.versions()]
    torch_check = libraries.torch(machine)
    checks.append(torch_check)
    if not torch_check.blocks:
        checks.append(precisions.kernel(machine))
        alternatives = needs.alternatives(recipe, run, machine)
        checks.extend(precisions.precisions(machine, needs.dtype(recipe, machine), alternatives))
        checks.append(libraries.deepspeed(machine))
    checks.append(needs.ds_config(recipe, machine))
    checks.extend(needs.teacher(recipe, run, machine))
    # A model that is not there is named once.
    if not any(check.name == "teacher" and check.blocks for check in checks):
        checks.extend(needs.initialisation(recipe))
    checks.extend(needs.corpora(recipe))
    checks.extend(needs.reporting(recipe))
    checks.append(needs.disk(recipe, run))
    return checks


def _python() -> Check:
    version = platform.python_version()
    if sys.version_info < PYTHON_FLOOR:
        floor = ".".join(map(str, PYTHON_FLOOR))
        return Check("python", "blocked", f"{version}; install Python {floor} or newer")
    return Check("python", "ok", version)


def _memory(machine: Machine) -> Check:
    if machine.memory_bytes < MEMORY_FLOOR_BYTES:
        floor = MEMORY_FLOOR_BYTES // GIB
        return Check("machine", "warn", f"{machine.describe()}; less than {floor} GiB may not do, close other programs")
    return Check("machine", "ok", machine.describe())
