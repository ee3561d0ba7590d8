"""A forward pass that runs out of memory: the run goes on with a smaller micro-batch and is the same run."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from daramgpt import planner, student, train
from daramgpt.checkpoint import newest
from daramgpt.engine import DistillationModel
from daramgpt.errors import UserError
from daramgpt.ledger import sessions
from daramgpt.planner import ModelShape, make_plan
from daramgpt.progress import Console
from daramgpt.recipe import Recipe, Shape, validate
from daramgpt.run_directory import RunDirectory
from daramgpt.shards import Shards, prepare
from daramgpt.teacher import Teacher
from daramgpt.tokenizer import train_tokenizer

CONTEXT, MICRO_ROWS, BATCH_ROWS = 16, 4, 12
TEACHER_SHAPE = Shape(n_embd=24, n_head=2, n_layer=1)
MESSAGE = "CUDA out of memory. Tried to allocate 2.00 GiB."
ZERO_3 = {"zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0}}


@pytest.fixture(scope="module")
def texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a corpus, and a tokenizer trained on it."""
    folder = tmp_path_factory.mktemp("texts")
    lines = [f"{number}번째 글이다. 오늘은 {number % 7}시에 밥을 먹었다! 내일도 먹을까?" for number in range(200)]
    (folder / "corpora" / "web").mkdir(parents=True)
    (folder / "corpora" / "web" / "texts.jsonl").write_text(
        "\n".join(json.dumps({"text": line}, ensure_ascii=False) for line in lines), encoding="utf-8"
    )
    train_tokenizer(lines, 300, folder / "tokenizer")
    return folder


class Training:
    """One tiny run, in this process."""

    def __init__(self, texts: Path, folder: Path, ds_config: str) -> None:
        self.run, self.said = RunDirectory(folder / "run"), []
        self.recipe: Recipe = validate(
            {
                "name": "test",
                "corpus": {"dir": str(texts / "corpora"), "workers": 1},
                "curriculum": {
                    "context_tokens": CONTEXT,
                    "stages": [{"name": "web", "corpus": "web", "take": "8KB", "unit": "sentence"}],
                },
                "teacher": {"model": "not-read-here"},
                "student": {"n_embd": 16, "n_head": 2, "n_layer": 1},
                "optimizer": {"batch_tokens": BATCH_ROWS * CONTEXT, "learning_rate": 3e-3},
                "engine": {"micro_batch_rows": MICRO_ROWS},
            },
            "test",
        )
        prepare(self.recipe, self.run, texts / "tokenizer", CONTEXT, lambda line: None)
        self.shards = Shards(self.run.shards)
        vocab_size = self.shards.vocab_size
        self.plan = make_plan(
            self.recipe,
            self.run,
            context_tokens=CONTEXT,
            vocab_size=vocab_size,
            num_rows=self.shards.num_rows,
            teacher=ModelShape(TEACHER_SHAPE.n_embd, TEACHER_SHAPE.n_layer, vocab_size, CONTEXT),
            memory_limit_bytes=10**9,
            flops_per_second=1e9,
            num_threads=1,
            world_size=1,
            dtype="fp32",
            teacher_precision="fp32",
            ds_config=ds_config,
            reasons={},
        )
        model = student.build(TEACHER_SHAPE, vocab_size, CONTEXT, self.shards.eos_token_id, seed=2).eval()
        model.requires_grad_(False)
        model.lm_head.weight.mul_(8)
        self.teacher = Teacher(model, model.lm_head.weight, None, "fp32", 0, 0, CONTEXT)

    def __call__(self, plan: dict[str, Any]) -> str:
        console = Console(self.run.log)
        with (self.run.path / "said.txt").open("a") as console.rich.file:
            return train.train(
                self.recipe,
                self.run,
                self.shards,
                plan,
                self.teacher,
                train.StopRequest(None),
                console,
                self.run.ledger,
                "here",
                "student",
            )

    def losses(self) -> list[float]:
        entries = [json.loads(line) for line in self.run.metrics.read_text().splitlines()]
        assert [entry["step"] for entry in entries] == list(range(1, len(entries) + 1))
        return [entry["loss"] for entry in entries]

    def weights(self) -> dict[str, torch.Tensor]:
        saved = newest(self.run.checkpoints)
        assert saved is not None
        return saved.weights()


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


def test_one_row_that_does_not_fit_is_refused(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(texts, tmp_path, "cpu")
    run_out(monkeypatch, 0, 5, torch.OutOfMemoryError)
    with pytest.raises(UserError, match="one row of 16 tokens") as caught:
        training(training.plan)
    assert "context_tokens" in caught.value.mend
    frozen = planner.read_plan(training.run)
    assert frozen is not None and frozen["micro_batch_rows"] == 1
    assert [session.reason for session in sessions(training.run.ledger)] == ["out of memory"] * 3


def test_another_fault_is_not_taken_for_it(texts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    training = Training(texts, tmp_path, "cpu")

    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("shapes cannot be multiplied")

    monkeypatch.setattr(DistillationModel, "forward", failing)
    with pytest.raises(RuntimeError, match="multiplied"):
        training(training.plan)
    assert [session.reason for session in sessions(training.run.ledger)] == ["failed"]


def test_several_ranks_begin_anew_with_the_smaller_one(texts: Path, tmp_path: Path) -> None:
    training = Training(texts, tmp_path, "cpu")
    plan = {**training.plan, "world_size": 2, "batch_rows": 24, "micro_batch_rows": 6}
    with pytest.raises(UserError) as caught:
        train._with_less_memory(plan, training.run, Console(), "student", torch.OutOfMemoryError(MESSAGE))
    assert "6 rows" in caught.value.fault and MESSAGE in caught.value.fault and "same command" in caught.value.mend
    frozen = planner.read_plan(training.run)
    assert frozen is not None and frozen["micro_batch_rows"] == 3


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
