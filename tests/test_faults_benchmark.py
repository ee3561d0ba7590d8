"""The benchmark of faults, without a training: which phase is seen, what damage does, how an outcome is judged."""

from __future__ import annotations

import json
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from benchmarks import faults, faults_cases
from benchmarks.faults_kills import LEAST_SHARE, PHASES, Aim, Watch, fault_after_kill
from benchmarks.faults_run import COMPARED, Tiny
from daramgpt import checkpoint
from daramgpt.checkpoint import REMOVING, WRITING
from daramgpt.run_directory import RunDirectory, write_atomically


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A run whose last session saved step 4 and was killed while it saved step 5."""
    run = RunDirectory(tmp_path / "run")
    for name in ("step-00000003", "step-00000004", f"{WRITING}step-00000005"):
        (run.checkpoints / name).mkdir(parents=True)
        for file in faults_cases.FILES:
            (run.checkpoints / name / file).write_bytes(bytes(range(100)))
    (run.checkpoints / checkpoint.LATEST).write_text("step-00000004\n")
    (run.path / ".lock").write_text("1")
    run.metrics.write_text("".join(json.dumps({"step": step}) + "\n" for step in range(1, 6)))
    return run


def _metrics_until(run: RunDirectory, step: int) -> None:
    write_atomically(run.metrics, "".join(json.dumps({"step": number}) + "\n" for number in range(1, step + 1)))


def test_phases_are_those_of_this_session(run: RunDirectory) -> None:
    (run.checkpoints / f"{REMOVING}step-00000002").mkdir()
    watch = Watch(run)
    # What the session before has left behind is no sign of this one.
    assert watch.phase() == "start"
    (run.path / ".lock").write_text("23")
    assert watch.phase() == "load"
    _metrics_until(run, 4)
    assert watch.phase() == "load"
    _metrics_until(run, 5)
    assert watch.phase() == "step"
    shutil.rmtree(run.checkpoints / f"{WRITING}step-00000005")
    shutil.rmtree(run.checkpoints / f"{REMOVING}step-00000002")
    writing = run.checkpoints / f"{WRITING}step-00000005"
    writing.mkdir()
    assert watch.phase() == "save"
    writing.rename(run.checkpoints / "step-00000005")
    assert watch.phase() == "step"
    (run.checkpoints / "step-00000003").rename(run.checkpoints / f"{REMOVING}step-00000003")
    assert watch.phase() == "prune"


def test_a_first_session_has_phases_too(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    watch = Watch(run)
    assert watch.phase() == "start"
    (run.path / ".lock").write_text("1")
    assert watch.phase() == "load"
    _metrics_until(run, 1)
    assert watch.phase() == "step"


def test_every_phase_gets_its_share() -> None:
    aim, counts, kills = Aim(random.Random(1)), Counter[str](), 20
    for _ in range(kills):
        counts[aim.wanted(counts, kills)] += 1
    assert counts.total() == kills
    assert all(counts[phase] >= LEAST_SHARE * kills for phase in PHASES)


@pytest.mark.parametrize("how", faults_cases.DAMAGES)
def test_damage_is_done_to_the_newest_and_to_one_file(how: str, run: RunDirectory) -> None:
    before = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    case = next(case for case in faults_cases.damages() if case.name == f"weights.safetensors {how}")
    case.apply(run)
    after = {path: path.read_bytes() for path in run.path.rglob("*") if path.is_file()}
    damaged = run.checkpoints / "step-00000004" / "weights.safetensors"
    assert {path for path in before if after.get(path) != before[path]} == {damaged}
    bits = sum((a ^ b).bit_count() for a, b in zip(after.get(damaged, b""), before[damaged], strict=False))
    sizes = {"truncated": 50, "emptied": 0, "removed": None, "one bit flipped": 100}
    assert (len(after[damaged]) if damaged in after else None) == sizes[how]
    assert bits == (how == "one bit flipped")


def test_every_file_of_a_checkpoint_is_damaged() -> None:
    written = {f"{name}.safetensors" for name in checkpoint.TENSOR_FILES} | {"state.json", checkpoint.MANIFEST}
    assert set(faults_cases.FILES) == written
    assert {name.removesuffix(".safetensors") for name in written} < set(faults_cases.WRITES)
    names = [case.name for case in faults_cases.damages()]
    assert len(names) == len(set(names))


def test_times_in_the_ledger_lie_in_the_future(run: RunDirectory) -> None:
    run.ledger.write_text('{"event": "note", "session": "a", "time": 5.0}\n{"cut')
    faults_cases.set_clock_back(run)
    assert json.loads(run.ledger.read_text())["time"] == 5.0 + faults_cases.CLOCK_SECONDS


@pytest.mark.parametrize(
    ("code", "output", "has_changed", "fault", "outcome"),
    [
        (0, "", True, None, "recovered"),
        (0, "", True, "weights differ", "lost"),
        (2, "error: plan.json is no plan; plan again\n", False, None, "detected"),
        (2, "error: plan.json is no plan; plan again\n", True, None, "lost"),
        (2, "error: something; mend it\n", False, None, "lost"),
        (2, "Traceback\nerror: plan.json\n", False, None, "lost"),
        (1, "error: plan.json is no plan; plan again\n", False, None, "lost"),
    ],
)
def test_an_outcome_is_judged(code: int, output: str, has_changed: bool, fault: str | None, outcome: str) -> None:
    assert faults_cases.judged(code, output, "plan.json", has_changed, fault) == outcome


def test_a_checkpoint_after_a_kill_is_compared(tmp_path: Path) -> None:
    run = Tiny(tmp_path / "recipe.toml", RunDirectory(tmp_path / "run"))
    expected = {4: dict.fromkeys(COMPARED, "other")}
    assert fault_after_kill(run, expected, 0) is None
    assert fault_after_kill(run, expected, 3) == "went back from step 3 to 0"
    path = run.directory.checkpoints / "step-00000004"
    path.mkdir(parents=True)
    assert "verifies" in (fault_after_kill(run, expected, 0) or "")
    for file in faults_cases.FILES:
        (path / file).write_text('{"step": 4}')
    files = {file.name: checkpoint._describe(file) for file in path.iterdir() if file.name != checkpoint.MANIFEST}
    manifest = {"files": files}
    (path / checkpoint.MANIFEST).write_text(json.dumps({**manifest, "sha256": checkpoint._sha256_of(manifest)}))
    assert fault_after_kill(run, expected, 4) == f"step 4: {', '.join(COMPARED)} differ"
    expected[4] = {name: files[f"{name}.safetensors"]["sha256"] for name in COMPARED}
    assert fault_after_kill(run, expected, 4) is None


def test_all_that_is_lost_is_counted() -> None:
    killed = {"kills": 10, "resumed_identical": 8, "runs_finished": 3, "runs_identical": 2}
    cases = [{"name": name, "outcome": name, "said": ""} for name in ("lost", "recovered", "detected")]
    assert faults.summarised(killed, cases)["lost"] == 4
