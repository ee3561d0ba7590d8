"""SIGKILL at random moments of chosen phases of a training, and whether what goes on afterwards is what was there.

The phase is seen from outside, by looking at the run directory again and again. A moment is aimed at: the sign of the
phase wanted is waited for, then a random part of the time that it usually lasts; counted is the phase of the last look.
"""

from __future__ import annotations

import contextlib
import os
import random
import signal
import statistics
import subprocess
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import progress
from benchmarks.faults_run import COMPARED, States, Tiny, tail
from daramgpt.checkpoint import REMOVING, WRITING
from daramgpt.errors import UserError
from daramgpt.ledger import entries
from daramgpt.run_directory import RunDirectory

# `start`: before the process took the run directory; `load`: from there until its first new step.
PHASES = ("start", "load", "step", "save", "prune")
# Kills in each phase, at least this part of all.
LEAST_SHARE = 0.1
LOOK_SECONDS = 0.0003
# Of a phase that none has been seen whole of yet.
FIRST_GUESS_SECONDS = {"start": 1.0, "load": 3.0, "step": 0.1, "save": 0.2, "prune": 0.004}
# A save, a step or a removal of a session is hit in one of its first so many.
MOST_PASSED = 4
# What a rank leaves behind by dying has so long to end.
MOST_SECONDS_TO_END = 60.0
# Of the log of a run that failed.
LOG_CHARACTERS = 6000
# By this a session's processes are found, whoever is their parent by then.
MARK = "DARAMGPT_FAULTS_SESSION"


class Watch:
    """Tells the phase of a session from its run directory; made before the session starts."""

    def __init__(self, run: RunDirectory) -> None:
        self._run = run
        self._stale = set(self._signs())
        self._lock = _changed(run.path / ".lock")
        self._metrics = _changed(run.metrics)
        self._first_step = max((int(path.name[5:]) for path in run.checkpoints.glob("step-*")), default=0)
        self._has_stepped = False

    def phase(self) -> str:
        """One of `PHASES`, now."""
        if not self._has_stepped:
            if _changed(self._run.path / ".lock") == self._lock:
                return "start"
            changed = _changed(self._run.metrics)
            if changed == self._metrics:
                return "load"
            # A session first writes anew the lines up to its checkpoint.
            self._metrics = changed
            steps = [entry.get("step", 0) for entry in entries(self._run.metrics)]
            if not steps or steps[-1] <= self._first_step:
                return "load"
            self._has_stepped = True
        signs = {name for name, changed in self._signs() if (name, changed) not in self._stale}
        if any(name.startswith(REMOVING) for name in signs):
            return "prune"
        return "save" if signs else "step"

    def _signs(self) -> list[tuple[str, int]]:
        """Names of what is being written and removed, with the time of their last change."""
        found = []
        try:
            with os.scandir(self._run.checkpoints) as paths:
                for path in paths:
                    if path.name.startswith((WRITING, REMOVING)):
                        # What a kill left keeps its time until somebody touches it.
                        found.append((path.name, path.stat().st_ctime_ns))
        except FileNotFoundError:
            pass
        return found


def _changed(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_mtime_ns


@dataclass
class Aim:
    """Waits for moments, and learns how long the phases last."""

    chance: random.Random
    seconds: dict[str, list[float]] = field(default_factory=lambda: {phase: [] for phase in PHASES})

    def usual_seconds(self, phase: str) -> float:
        return statistics.median(self.seconds[phase][-20:] or [FIRST_GUESS_SECONDS[phase]])

    def wanted(self, counts: Counter[str], kills: int) -> str:
        """A phase at random, of those that are still to have their share."""
        short = [phase for phase in PHASES if counts[phase] < LEAST_SHARE * kills]
        return self.chance.choice(short or PHASES)

    def hit(self, session: Session, watch: Watch, wanted: str) -> str | None:
        """Wait for a random moment of a phase; the phase of the last look, or None where the session has ended."""
        passed = self.chance.randrange(MOST_PASSED) if wanted in ("step", "save", "prune") else 0
        phase, entered = watch.phase(), time.monotonic()
        moment = entered + self.chance.random() * self.usual_seconds(wanted) if phase == wanted else None
        while session.process.poll() is None:
            now, seen = time.monotonic(), watch.phase()
            if seen != phase:
                self.seconds[phase].append(now - entered)
                phase, entered = seen, now
                if phase not in ("save", "prune"):
                    # Finding them takes longer than a removal.
                    session.find()
                if phase == wanted:
                    passed -= 1
                    if passed < 0 and moment is None:
                        moment = now + self.chance.random() * self.usual_seconds(wanted)
            if moment is not None and now >= moment:
                if wanted in ("start", "load"):
                    session.find()
                return watch.phase()
            time.sleep(LOOK_SECONDS)
        return None


class Session:
    """A training and all its processes."""

    def __init__(self, run: Tiny) -> None:
        self._name = f"{os.getpid()}-{time.monotonic_ns()}"
        self.process: subprocess.Popen[bytes] = run.start("train", marks={MARK: self._name})
        self._found: list[int] = [self.process.pid]
        self._ranks: list[int] = []

    def find(self) -> list[int]:
        """The processes that live now."""
        mark = f"{MARK}={self._name}".encode()
        self._found, self._ranks = [], []
        for path in Path("/proc").iterdir():
            if path.name.isdecimal():
                try:
                    variables = (path / "environ").read_bytes().split(b"\0")
                except OSError:
                    continue
                if mark in variables:
                    self._found.append(int(path.name))
                    if any(variable.startswith(b"RANK=") for variable in variables):
                        self._ranks.append(int(path.name))
        return self._found

    def kill(self, chance: random.Random, is_single: bool) -> bool:
        """Kill all processes, or a rank where there are ranks; whether it was a rank."""
        if is_single and self._ranks:
            _kill(chance.choice(self._ranks))
            return True
        for pid in self._found:
            _kill(pid)
        # What was started since they were looked for.
        while left := self.find():
            for pid in left:
                _kill(pid)
        self.process.wait()
        return False

    def ends(self, seconds: float) -> bool:
        """Wait for all processes; whether they ended by themselves, as those that do not are killed."""
        end = time.monotonic() + seconds
        while self.process.poll() is None or self.find():
            if time.monotonic() > end:
                self.kill(random.Random(0), is_single=False)
                return False
            time.sleep(0.05)
        return True


def _kill(pid: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


def fault_after_kill(run: Tiny, expected: States, before: int) -> str | None:
    """Why the next session would not go on from what was saved; None where it would.

    Args:
        run: none of whose processes lives.
        expected: of the undisturbed run.
        before: step of the newest checkpoint when the killed session began.
    """
    try:
        found = run.state()
    except UserError as error:
        return str(error)
    step, hashes = found or (0, {})
    if step < before:
        return f"went back from step {before} to {step}"
    if differing := [name for name in COMPARED if found and hashes[name] != expected[step][name]]:
        return f"step {step}: {', '.join(differing)} differ"
    return None


def measure(planned: Tiny, expected: States, kills: int, num_ranks: int, path: Path, seed: int) -> dict[str, Any]:
    """Kill `kills` times, in as many copies of a planned run as that takes; each is trained to its end.

    Args:
        planned: the run, without a checkpoint.
        expected: of the undisturbed run.
        kills: in all.
        num_ranks: of the plan; with two, half of the kills are of a single one of them.
        path: of the copy.
        seed: of what is random here.

    Returns:
        the keys of the result that kills give.
    """
    aim = Aim(random.Random(seed))
    phases: Counter[str] = Counter()
    findings: list[str] = []
    singles = identical = finished = finished_identical = 0
    run: Tiny | None = None
    while sum(phases.values()) < kills or run is not None:
        if run is None:
            run = planned.copy(path)
        before = run.state()
        watch, session = Watch(run.directory), Session(run)
        done = sum(phases.values())
        phase: str | None = None
        if done < kills:
            wanted = aim.wanted(phases, kills)
            phase = aim.hit(session, watch, wanted)
        if phase is None:
            code = session.process.wait()
            finished += 1
            fault = f"ended with {code}: {tail(run)}" if code else run.fault_at_the_end(expected)
            if fault is None and run.metrics_steps() != list(range(1, max(expected) + 1)):
                fault = f"metrics hold the steps {run.metrics_steps()}"
            finished_identical += fault is None
            findings += [f"a run at its end: {fault}"] if fault else []
            progress(f"run {finished}: {fault or 'ended like the undisturbed one'}")
            if code:
                # The next run takes its place.
                progress(run.directory.log.read_text(encoding="utf-8", errors="replace")[-LOG_CHARACTERS:])
            run = None
            continue
        is_single = session.kill(aim.chance, num_ranks > 1 and 2 * singles <= done)
        singles += is_single
        who = "one rank" if is_single else "all"
        if is_single and not session.ends(MOST_SECONDS_TO_END):
            findings.append(f"kill {done + 1} ({phase}, one rank): the others did not end within a minute")
        phases[phase] += 1
        fault = fault_after_kill(run, expected, before[0] if before else 0)
        identical += fault is None
        findings += [f"kill {done + 1} ({phase}, {who}): {fault}"] if fault else []
        progress(f"kill {done + 1} of {kills}: {who}, aimed at {wanted}, hit {phase}: {fault or 'intact'}")
    return {
        "kills": sum(phases.values()),
        "resumed_identical": identical,
        "phases": {phase: phases[phase] for phase in PHASES},
        "process_group_kills": sum(phases.values()) - singles,
        "single_rank_kills": singles,
        "runs_finished": finished,
        "runs_identical": finished_identical,
        "usual_seconds": {phase: round(aim.usual_seconds(phase), 4) for phase in PHASES},
        "findings": findings,
    }
