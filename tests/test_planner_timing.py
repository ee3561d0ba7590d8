"""Timed parts of a step: what is timed is what trains, and their sum is that of the whole step's parts."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from daramgpt import losses, planner, recipe, student, teacher
from daramgpt.planner import ModelShape, Step, Timings, timing

STUDENT = ModelShape(n_embd=32, n_layer=3, vocab_size=640, num_positions=16, n_head=4)
TEACHER = ModelShape(n_embd=64, n_layer=5, vocab_size=640, num_positions=16, n_head=2)
STEP = Step(STUDENT, TEACHER, "int8", "fp32", 16, micro_batch_rows=4, micro_batches=2, chunk_tokens=16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "FEWEST_SECONDS", 0.0)
    monkeypatch.setattr(timing, "FEWEST_REPETITIONS", 1)
    for function in (timing._student_seconds, timing._teacher_seconds, timing._parameter_seconds):
        function.cache_clear()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"teacher": None},
        {"teacher_precision": "fp32", "is_by_document": True},
        {"recomputes": True, "chunk_tokens": 1000},
        {"dtype": "bf16", "teacher_precision": "bf16", "micro_batch_rows": 1},
    ],
    ids=["int8", "no-teacher", "documents", "recomputed", "bf16"],
)
def test_every_part_has_seconds(changes: dict[str, Any]) -> None:
    step = replace(STEP, **changes)
    found = planner.measure(step, recipe.load("daramgpt"), CPU)
    assert found.tokens == step.tokens
    figures = {name: value for name, value in vars(found).items() if name != "source"}
    absent = {name for name, value in figures.items() if value == 0}
    of_teacher = {"teacher_block_seconds", "teacher_ends_seconds"} if step.teacher is None else set()
    assert of_teacher <= absent
    # A block's is the difference of two times, which another program at the wrong moment may make nothing.
    assert not {name for name in absent - of_teacher if "block" not in name}
    assert all(math.isfinite(value) and value >= 0 for value in figures.values())


def test_what_is_timed_is_what_trains(monkeypatch: pytest.MonkeyPatch) -> None:
    """The teacher as it is loaded, the student as it is built, each with a block and without; the loss on the run's
    vocabulary, in the precisions of the run."""
    passes: list[tuple[str, int, torch.Size]] = []
    computed: list[dict[str, Any]] = []
    build, load = student.build, teacher.load

    def built(shape: recipe.Shape, vocab_size: int, *arguments: Any) -> Any:
        model = build(shape, vocab_size, *arguments)
        model.transformer.register_forward_pre_hook(
            lambda body, inputs: passes.append(("student", len(body.h), inputs[0].shape))
        )
        assert shape.n_layer == 1 and (shape.n_embd, shape.n_head, vocab_size) in ((32, 4, 640), (64, 2, 64))
        return model

    def loaded(*arguments: Any, **named: Any) -> teacher.Teacher:
        found = load(*arguments, **named)
        assert found.precision == "int8" and found.head_weight.dtype == torch.bfloat16
        found.model.base_model.register_forward_pre_hook(
            lambda body, inputs: passes.append(("teacher", len(body.h), inputs[0].shape))
        )
        return found

    class Head(losses.DistillationHead):
        def forward(self, hidden: torch.Tensor, labels: torch.Tensor, *teacher: Any) -> Any:
            computed.append({"hidden": hidden, "weight": self.weight, "teacher": teacher, "objective": self.objective})
            return super().forward(hidden, labels, *teacher)

    monkeypatch.setattr(student, "build", built)
    monkeypatch.setattr(teacher, "load", loaded)
    monkeypatch.setattr(losses, "DistillationHead", Head)
    wanted = recipe.load("daramgpt", ["loss.divergence=reverse-kl", "loss.temperature=3"])
    planner.measure(replace(STEP, dtype="bf16"), wanted, CPU)
    assert set(passes) == {(name, blocks, torch.Size([4, 16])) for name in ("student", "teacher") for blocks in (0, 1)}
    last = computed[-1]
    assert last["hidden"].shape == (timing.CHUNKS * STEP.chunk_tokens, 32) and last["hidden"].requires_grad
    assert last["weight"].shape == (640, 32) and last["weight"].requires_grad
    assert [part.shape for part in last["teacher"]] == [(timing.CHUNKS * STEP.chunk_tokens, 64), (640, 64)]
    assert {part.dtype for part in (last["hidden"], last["weight"], *last["teacher"])} == {torch.bfloat16}
    assert (last["objective"].divergence, last["objective"].temperature) == ("reverse-kl", 3)


def test_trainings_of_a_run_share_what_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = recipe.load("daramgpt")
    first = planner.measure(STEP, wanted, CPU)
    alone = planner.measure(replace(STEP, teacher=None), wanted, CPU)
    assert alone.student_block_seconds == first.student_block_seconds
    assert alone.bytes_per_second == first.bytes_per_second


def test_more_tokens_than_are_timed_take_as_many_times_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(timing.MOST_TOKENS, "cpu", 40)
    found = planner.measure(STEP, recipe.load("daramgpt"), CPU)
    assert found.tokens == 32
    whole, half = (planner.step_seconds(replace(STEP, micro_batch_rows=rows), found) for rows in (4, 2))
    for name in ("student blocks", "student embedding", "teacher blocks", "teacher embedding"):
        assert whole[name] == pytest.approx(2 * half[name])


def test_a_step_is_the_sum_of_its_blocks() -> None:
    timings = Timings(
        tokens=64,
        student_block_seconds=1.0,
        student_ends_seconds=0.1,
        teacher_block_seconds=2.0,
        teacher_ends_seconds=0.2,
        loss_seconds=4.0,
        loss_backward_seconds=0.5,
        gradient_seconds=1e-6,
        optimizer_seconds=1e-6,
        bytes_per_second=1e9,
        source="here",
    )
    seconds = planner.step_seconds(STEP, timings)
    assert seconds["student blocks"] == 2 * 3 * 1.0 and seconds["teacher blocks"] == 2 * 5 * 2.0
    assert seconds["student embedding"] == 2 * 0.1 and seconds["teacher embedding"] == 2 * 0.2
    assert seconds["loss"] == 2 * 4.5
    assert planner.tokens_per_second(STEP, timings) == pytest.approx(2 * 64 / sum(seconds.values()))
    alone = planner.step_seconds(replace(STEP, teacher=None), timings)
    assert seconds.keys() - alone.keys() == {"teacher blocks", "teacher embedding"}
    once = planner.step_seconds(replace(STEP, micro_batches=1), timings)
    assert {name for name in once if seconds[name] != pytest.approx(2 * once[name])} == {"optimizer"}


def test_a_median_counts_and_long_work_is_done_once(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = {"now": 0.0}
    monkeypatch.setattr(timing.time, "perf_counter", lambda: clock["now"])
    monkeypatch.setattr(timing, "FEWEST_REPETITIONS", 3)
    took = iter([0.1, 9.0, 0.2])

    def run() -> str:
        clock["now"] += next(took)
        return "result"

    def then(result: str) -> None:
        assert result == "result"
        clock["now"] += 0.01

    monkeypatch.setattr(timing, "MOST_SECONDS", 100.0)
    first, second = timing.typical_seconds(CPU, run, then)
    assert (first, second) == (pytest.approx(0.2), pytest.approx(0.01))
    monkeypatch.setattr(timing, "MOST_SECONDS", 1.0)
    took = iter([5.0])
    assert timing.typical_seconds(CPU, run)[0] == pytest.approx(5.0)
