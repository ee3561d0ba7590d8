"""A forward pass that runs out of memory: the run goes on with a smaller micro-batch and is the same run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from failing_ranks import Case, Fault, train_on_ranks
from tiny_training import BATCH_ROWS, MICRO_ROWS, Training, make_texts

from daramgpt import checkpoint, planner
from daramgpt.checkpoint import newest
from daramgpt.engine import DistillationModel, Distiller, StepOutOfMemoryError
from daramgpt.errors import UserError
from daramgpt.ledger import sessions
from daramgpt.progress import Console
from daramgpt.train.out_of_memory import with_less_memory

MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    make_texts(folder)
    return folder


@pytest.fixture(params=["cpu", "zero-3"])
def make_training(request: pytest.FixtureRequest, texts: Path, tmp_path: Path) -> Callable[[str], Training]:
    ds_config = request.param
    if ds_config == "zero-3":
        ds_config = str(tmp_path / "zero-3.json")
        Path(ds_config).write_text(json.dumps(ZERO_3))
    return lambda name: Training(texts, tmp_path / name, ds_config)


def run_out(monkeypatch: pytest.MonkeyPatch, most_rows: int, call: int, kind: type[RuntimeError]) -> None:
    """From that forward pass on, more than so many rows do not fit."""
    forward, calls = DistillationModel.forward, 0

    def failing(self: DistillationModel, input_ids: torch.Tensor, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls >= call and len(input_ids) > most_rows:
            raise kind(MESSAGE if kind is not RuntimeError else "DefaultCPUAllocator: can't allocate memory: 8 bytes")
        return forward(self, input_ids, *arguments, **options)

    monkeypatch.setattr(DistillationModel, "forward", failing)


@pytest.mark.parametrize("kind", [torch.OutOfMemoryError, RuntimeError])
def test_the_losses_are_those_of_a_run_with_the_smaller_micro_batch(
    make_training: Callable[[str], Training], kind: type[RuntimeError], monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = make_training("undisturbed")
    smaller = planner.with_smaller_micro_batch(undisturbed.plan)
    assert smaller is not None and smaller["micro_batch_rows"] == 2
    assert undisturbed(smaller) == "done"
    training = make_training("disturbed")
    passes = training.plan["num_steps"] * BATCH_ROWS // MICRO_ROWS
    # In the middle of a step too, when gradients of its first rows are there already.
    run_out(monkeypatch, 2, random.Random(5).randrange(2, passes), kind)
    assert training(training.plan) == "done"
    assert training.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)
    expected = undisturbed.weights()
    for name, value in training.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    # The sessions to come begin with what fits.
    frozen = planner.read_plan(training.run)
    assert frozen is not None and frozen["micro_batch_rows"] == 2
    assert frozen == {**training.plan, "micro_batch_rows": 2, "loss_chunk_tokens": smaller["loss_chunk_tokens"]}
    assert [session.reason for session in sessions(training.run.ledger)] == ["out of memory", "done"]
    assert "out of memory with 4 rows a forward pass" in (training.run.path / "said.txt").read_text()


def test_one_row_that_does_not_fit_is_refused_and_nothing_is_lost(
    texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training = Training(texts, tmp_path, "cpu")
    # Two steps of three passes are done by then.
    run_out(monkeypatch, 0, 8, torch.OutOfMemoryError)
    with pytest.raises(UserError, match="one row of 16 tokens") as caught:
        training(training.plan)
    assert "context_tokens" in caught.value.mend
    frozen = planner.read_plan(training.run)
    assert frozen is not None and frozen["micro_batch_rows"] == 1
    ended = list(sessions(training.run.ledger))
    assert [session.reason for session in ended] == ["out of memory"] * 3
    saved = newest(training.run.checkpoints)
    assert saved is not None and saved.state["step"] == ended[-1].step == 2
    assert saved.state["tokens"] == json.loads(training.run.metrics.read_text().splitlines()[-1])["tokens"]


@pytest.mark.parametrize("cut", ["while-the-optimizer-moves", "before-its-step-is-counted"])
def test_an_optimizer_cut_short_is_not_gone_on_from(
    cut: str, texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed = Training(texts, tmp_path / "undisturbed", "cpu")
    smaller = planner.with_smaller_micro_batch(undisturbed.plan)
    assert smaller is not None and undisturbed(smaller) == "done"
    training = Training(texts, tmp_path / "disturbed", "cpu", every_minutes=1e-9)
    step, calls = Distiller.step, 0

    def spoiling(self: Distiller, *arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        engine_step = self.engine.step

        def failing_step() -> None:
            if not self.is_intact:
                tensors = self.gather()
                tensors["weights"] = {name: value + 1 for name, value in tensors["weights"].items()}
                self.restore(tensors, 99, {})
                raise torch.OutOfMemoryError(MESSAGE)
            engine_step()

        def failing_result(*arguments: Any) -> Any:
            raise torch.OutOfMemoryError(MESSAGE)

        if calls == 4:
            if cut == "while-the-optimizer-moves":
                self.engine.step = failing_step
            else:
                self._result = failing_result  # type: ignore[method-assign]
        return step(self, *arguments, **options)

    monkeypatch.setattr(Distiller, "step", spoiling)
    assert training(training.plan) == "done"
    assert [session.step for session in sessions(training.run.ledger)] == [3, training.plan["num_steps"]]
    assert training.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)


def test_another_fault_is_not_taken_for_it(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(texts, tmp_path, "cpu")

    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(DistillationModel, "forward", failing)
    with pytest.raises(RuntimeError, match="multiplied"):
        training(training.plan)
    assert [session.reason for session in sessions(training.run.ledger)] == ["failed"]


STAGES: dict[str, dict[str, Any]] = {
    "zero-0": {"zero_optimization": {"stage": 0}},
    "zero-2": {"zero_optimization": {"stage": 2}},
    "zero-3": ZERO_3,
}
# Where no rank waits for another yet. ZeRO-3 gathers parameters from the beginning of the forward pass to the head.
SHARED = [(stage, place) for stage in STAGES for place in ("teacher", "forward", "head")]
SHARED.remove(("zero-3", "forward"))
PASSES = BATCH_ROWS // MICRO_ROWS


@pytest.fixture(scope="module")
def on_two_ranks(texts: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], tuple[Case, Training]]:
    """Runs of which one rank fails, by stage and place; and those that began with the smaller micro-batch."""
    folder, rng = tmp_path_factory.mktemp("ranks"), random.Random(11)
    for stage, config in STAGES.items():
        (folder / f"{stage}.json").write_text(json.dumps(config))
    cases = {}
    for stage, place in SHARED + [(stage, "") for stage in STAGES]:
        fault = (
            Fault(rng.randrange(2), place, rng.randrange(PASSES + 1, 4 * PASSES), MICRO_ROWS // 2) if place else None
        )
        rows = MICRO_ROWS if place else MICRO_ROWS // 2
        cases[stage, place] = Case(str(folder / f"{stage}-{place}"), str(folder / f"{stage}.json"), rows, fault)
    trainings = train_on_ranks(texts, list(cases.values()), folder)
    return {key: (case, training) for (key, case), training in zip(cases.items(), trainings, strict=True)}


@pytest.mark.slow
@pytest.mark.parametrize(("stage", "place"), SHARED)
def test_two_ranks_leave_the_step_together_and_lose_nothing(
    stage: str, place: str, on_two_ranks: dict[tuple[str, str], tuple[Case, Training]]
) -> None:
    case, training = on_two_ranks[stage, place]
    _, undisturbed = on_two_ranks[stage, ""]
    assert training.losses() == pytest.approx(undisturbed.losses(), rel=1e-5)
    expected = undisturbed.weights()
    for name, value in training.weights().items():
        torch.testing.assert_close(value, expected[name], rtol=1e-4, atol=1e-6)
    # No checkpoint was due: the step before the failed one was saved when it failed.
    assert case.fault is not None
    failed_step = (case.fault.micro_batch - 1) // PASSES
    ended = [(session.reason, session.step) for session in sessions(training.run.ledger)]
    assert ended == [("out of memory", failed_step), ("done", training.plan["num_steps"])]
    frozen = planner.read_plan(training.run)
    assert frozen is not None and frozen["micro_batch_rows"] == MICRO_ROWS // 2
    assert frozen["batch_rows"] == training.plan["batch_rows"]
    said = (training.run.path / "said.txt").read_text()
    assert f"out of memory with {MICRO_ROWS} rows a forward pass" in said
    assert f"the batch of a step stays {2 * BATCH_ROWS} rows" in said


def test_a_rank_that_others_wait_for_asks_to_start_again(texts: Path, tmp_path: Path) -> None:
    training = Training(texts, tmp_path, "cpu", world_size=2)
    with pytest.raises(UserError) as caught:
        with_less_memory(training.plan, training.run, Console(), "student", StepOutOfMemoryError(MESSAGE, False))
    assert caught.value.fault.startswith(checkpoint.START_AGAIN)
    assert "4 rows" in caught.value.fault and MESSAGE in caught.value.fault
    frozen = planner.read_plan(training.run)
    assert frozen is not None and frozen["micro_batch_rows"] == 2


@pytest.mark.parametrize(
    ("rows", "rows_a_rank", "expected"), [(8, 8, 4), (6, 12, 3), (5, 15, 1), (4, 12, 2), (7, 14, 2)]
)
def test_the_smaller_micro_batch_divides_the_batch(rows: int, rows_a_rank: int, expected: int) -> None:
    plan = {
        "batch_rows": 3 * rows_a_rank,
        "world_size": 3,
        "micro_batch_rows": rows,
        "loss_chunk_tokens": 1000,
        "context_tokens": 100,
    }
    smaller = planner.with_smaller_micro_batch(plan)
    assert smaller == {**plan, "micro_batch_rows": expected, "loss_chunk_tokens": min(1000, 100 * expected)}
    assert planner.with_smaller_micro_batch({**plan, "micro_batch_rows": 1}) is None
