"""The fastest micro-batch that fits, measured: one subprocess a candidate trains a few steps on the run's own rows.

The arithmetic says which candidates fit; memory and speed of those are then facts. A candidate that runs out of memory,
or that the system kills for it, does not fit; one that hangs is ended after a time that follows from the arithmetic.
Each candidate trains the same number of tokens a step, so that all have the same share of the optimizer, and has a
process of its own, so that none inherits another's memory. The result goes into ``plan.json``: a run probes once.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from daramgpt.planner.making import CPU_MICRO_BATCH_TOKENS
from daramgpt.text_table import counted

# Of the arithmetic's hours: a shorter run would win less than the probe takes.
PROBE_FROM_HOURS = 0.5
MOST_CANDIDATES = 3
# Speeds that differ by less are equal, and the smaller micro-batch leaves more memory free.
NOISE = 0.03
# Steps after the first end when this has passed.
STEP_SECONDS, MOST_STEPS = 10.0, 10
OUT_OF_MEMORY = "out of memory"
# Of a candidate: to import, to load and convert its teacher from a slow disk, to compile.
START_SECONDS = 300.0
# A step that takes this many times what its matrix products alone would is not worth waiting for.
SLOWEST_OF_PRODUCTS = 30


@dataclass(frozen=True)
class Trial:
    """One candidate.

    Attributes:
        micro_batch_rows: rows a forward pass.
        micro_batch_tokens: tokens of those.
        tokens_per_second: None where it did not get through.
        peak_memory_bytes: of the device; resident where that is a CPU.
        fault: why it did not get through; None where it did.
    """

    micro_batch_rows: int
    micro_batch_tokens: int
    tokens_per_second: float | None
    peak_memory_bytes: int | None
    fault: str | None


def reason_not_to(setting: str, hours: float, is_chosen: bool, has_teacher_to_train: bool) -> str | None:
    """Why a run is not probed, or None where it is.

    Args:
        setting: ``engine.probe`` of the recipe.
        hours: that the arithmetic predicts.
        is_chosen: the recipe says what the micro-batch is.
        has_teacher_to_train: its teacher does not exist yet.
    """
    if setting == "off":
        return "engine.probe is off"
    if is_chosen:
        return "engine.micro_batch_rows is given"
    if has_teacher_to_train:
        return "its teacher is not trained yet"
    if hours < PROBE_FROM_HOURS:
        return f"a run of less than {PROBE_FROM_HOURS} h would win less than a probe takes"
    return None


def candidates(fitting: Sequence[int], context_tokens: int, device: str) -> list[int]:
    """Rows a forward pass to try, falling: the largest of `fitting`, and about halves of it.

    On a CPU no more than twice the micro-batch beyond which nothing is gained.
    """
    most = max(1, 2 * CPU_MICRO_BATCH_TOKENS // context_tokens) if device == "cpu" else max(fitting)
    chosen = [max(rows for rows in fitting if rows <= most)]
    while len(chosen) < MOST_CANDIDATES:
        smaller = [rows for rows in fitting if rows <= chosen[-1] // 2]
        if not smaller:
            break
        chosen.append(max(smaller))
    return chosen


def probe(rows: Sequence[int], try_rows: Callable[[int], Trial], say: Callable[[str], None]) -> dict[str, Any]:
    """Try each candidate and choose: ``fastest_rows`` and ``largest_rows``, None where none got through; ``trials``."""
    trials = []
    for candidate in rows:
        trial = try_rows(candidate)
        trials.append(trial)
        say(describe(trial))
    return {**decide(trials), "trials": [asdict(trial) for trial in trials]}


def decide(trials: Sequence[Trial]) -> dict[str, int | None]:
    """The fastest that fits, of equals the smallest; and the largest that fits."""
    speeds = {trial.micro_batch_rows: trial.tokens_per_second for trial in trials if trial.tokens_per_second}
    if not speeds:
        return {"fastest_rows": None, "largest_rows": None}
    enough = (1 - NOISE) * max(speeds.values())
    return {
        "fastest_rows": min(rows for rows, speed in speeds.items() if speed >= enough),
        "largest_rows": max(speeds),
    }


def describe(trial: Trial) -> str:
    """One line for people."""
    what = f"  probe: {counted(trial.micro_batch_rows, 'rows')} ({trial.micro_batch_tokens:,} tokens)"
    if trial.fault is not None:
        return f"{what}: {trial.fault}"
    assert trial.tokens_per_second is not None and trial.peak_memory_bytes is not None
    return f"{what}: {trial.tokens_per_second:,.1f} tokens/s, {trial.peak_memory_bytes / 1e9:.2f} GB"


def time_limit_seconds(plan: dict[str, Any]) -> float:
    """After which a candidate hangs, or is so slow that none is slower.

    Args:
        plan: with the candidate's micro-batch and batch, for one rank.
    """
    tokens, predicted = plan["batch_rows"] * plan["context_tokens"], plan["predicted"]
    step_seconds = tokens * predicted["model_flops_per_token"] / predicted["gemm_flops_per_second"]
    # One step warms up; the last one begins before `STEP_SECONDS` are over.
    return START_SECONDS + STEP_SECONDS + 2 * SLOWEST_OF_PRODUCTS * step_seconds


def try_in_subprocess(command: Sequence[str], plan: dict[str, Any], environment: dict[str, str], log: Path) -> Trial:
    """Run one candidate's process, and end it and all that it has started.

    Args:
        command: arguments of ``python -m daramgpt``; its last line of output is ``{"tokens_per_second": ...,
            "peak_memory_bytes": ...}`` or ``{"fault": ...}``.
        plan: with the candidate's micro-batch.
        environment: of the process.
        log: takes what it prints beside that.
    """
    rows, limit = plan["micro_batch_rows"], time_limit_seconds(plan)
    # Not a pipe: whoever inherits it could keep it open.
    with log.open("ab") as stream, tempfile.TemporaryFile() as output, _ended_by_sigterm():
        # A group of its own, to be ended as a whole.
        process = subprocess.Popen(
            [sys.executable, "-m", "daramgpt", *command],
            env=environment,
            stdout=output,
            stderr=stream,
            start_new_session=True,
        )
        code: int | None = None
        try:
            with contextlib.suppress(subprocess.TimeoutExpired):
                code = process.wait(limit)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        output.seek(0)
        lines = output.read().decode("utf-8", "replace").splitlines()
    answer: dict[str, Any] = {}
    if code is None:
        answer = {"fault": f"gave no answer in {limit:,.0f} s and was ended; see {log}"}
    elif code == 0 and lines:
        answer = json.loads(lines[-1])
    elif code < 0 or code == 128 + 9:
        # As the kernel's out-of-memory killer does, and a container's.
        answer = {"fault": f"killed by signal {abs(code) % 128}, as for too much memory"}
    else:
        answer = {"fault": f"failed with exit code {code}; see {log}"}
    return Trial(
        rows,
        rows * plan["context_tokens"],
        answer.get("tokens_per_second"),
        answer.get("peak_memory_bytes"),
        answer.get("fault"),
    )


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    """SIGTERM ends this process by an exception, so that it does not leave behind what it has started."""

    def leave(number: int, _: Any) -> None:
        sys.exit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
