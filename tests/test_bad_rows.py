"""Steps that cannot be trained: what is not finite stops a run with all kept, rows too large for fp16 are left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_training import Training, make_texts

from daramgpt import ledger
from daramgpt.checkpoint import newest
from daramgpt.engine import Distiller, LossScaleFloorError, StepResult
from daramgpt.errors import UserError
from daramgpt.shards import Feed


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


@pytest.fixture
def training(texts: Path, tmp_path: Path) -> Training:
    return Training(texts, tmp_path, "cpu", every_minutes=1e-9)


def at_steps(
    training: Training, monkeypatch: pytest.MonkeyPatch, steps: set[int], answer: Callable[[StepResult], StepResult]
) -> None:
    """Let `answer` be what the engine makes of the rows of some steps, without moving; it may raise."""
    plan = training.plan
    feed = Feed(training.shards, plan["batch_rows"], plan["micro_batch_rows"], 0, 1, 1, 0)
    bad = [feed.batch(step, 0)[0] for step in steps]
    original = Distiller.step

    def step(self: Distiller, batches: Any, num_targets: int, rate: float, flags: Any) -> StepResult:
        rows = list(batches)
        if any(torch.equal(rows[0][0], ids) for ids in bad):
            return answer(StepResult(1.0, 1.0, 0.0, 1.0, True, True, tuple(flags())))
        return original(self, iter(rows), num_targets, rate, flags)

    monkeypatch.setattr(Distiller, "step", step)


def floor(_: StepResult) -> StepResult:
    raise LossScaleFloorError(1.0, is_fixed=False)


def test_what_is_not_finite_stops_with_the_step_before_saved(
    training: Training, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_steps(training, monkeypatch, {4}, lambda found: replace(found, applied=False, is_finite=False, kd=float("nan")))
    with pytest.raises(UserError, match=r"step 5: loss nan.*nothing moved"):
        training(training.plan)
    saved = newest(training.run.checkpoints)
    assert saved is not None and saved.state["step"] == 4
    assert ledger.sessions(training.run.ledger)[-1].reason == "failed"
    # Whatever it was is gone, and the run is the one that never met it.
    monkeypatch.undo()
    assert training(training.plan) == "done"
    other = Training(texts, tmp_path / "other", "cpu")
    assert other(other.plan) == "done"
    assert all(torch.equal(value, training.weights()[name]) for name, value in other.weights().items())


def test_rows_that_fp16_cannot_hold_are_left_out_from_the_newest_checkpoint_on(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_steps(training, monkeypatch, {3, 6}, floor)
    assert training(training.plan) == "done"
    steps = [json.loads(line)["step"] for line in training.run.metrics.read_text().splitlines()]
    assert steps == [step for step in range(1, training.plan["num_steps"] + 1) if step not in (4, 7)]
    saved = newest(training.run.checkpoints)
    assert saved is not None and saved.state["passed_over"] == [3, 6]
    assert saved.state["step"] == training.plan["num_steps"]
    assert [note["step"] for note in ledger.notes(training.run.ledger)] == [4, 7]
    assert [one.reason for one in ledger.sessions(training.run.ledger)] == ["went back", "went back", "done"]
    said = (training.run.path / "said.txt").read_text()
    assert "step 4: the gradient overflowed fp16" in said and "passes over its rows" in said


def test_too_many_of_them_are_not_the_fault_of_their_rows(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    at_steps(training, monkeypatch, {1, 2, 4, 5}, floor)
    with pytest.raises(UserError, match=r"step 6: the gradient.*steps 2, 3, 5 were passed over"):
        training(training.plan)


def test_a_fixed_loss_scale_has_no_rows_to_blame(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    def fixed(_: StepResult) -> StepResult:
        raise LossScaleFloorError(128.0, is_fixed=True)

    at_steps(training, monkeypatch, {2}, fixed)
    with pytest.raises(UserError, match=r"step 3: .*set fp16.loss_scale to 0"):
        training(training.plan)
