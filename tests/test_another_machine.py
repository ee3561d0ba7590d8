"""A run that goes on with other ranks, another ZeRO stage, other offload and another micro-batch is the same run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_run import RECIPE, Run, metrics

from daramgpt import export, ledger, student
from daramgpt.checkpoint import newest
from daramgpt.recipe import Shape
from daramgpt.shards import Shards

BATCH_ROWS, CONTEXT = 240, 16
CONFIGS = {
    "zero2-offload": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "zero1": {"stage": 1},
    "zero3": {"stage": 3},
}
ONE_STEP = ("--hours", "0.000001")


def options(run: Run, config: str, rows: int) -> tuple[str, ...]:
    file = run.folder / f"{config}.json"
    settings = {"zero_optimization": CONFIGS[config], "zero_force_ds_cpu_optimizer": False}
    file.write_text(json.dumps(settings), encoding="utf-8")
    return "--ds-config", str(file), "--set", f"engine.micro_batch_rows={rows}"


def prepared(folder: Path, teacher: Path | None = None) -> Run:
    """A run with shards, with a teacher that is there or with one of its own."""
    run = Run(folder)
    folder.mkdir(exist_ok=True)
    text = RECIPE.replace("context_tokens = 32", f"context_tokens = {CONTEXT}\nscale = 1.6")
    text = text.replace("batch_tokens = 256", f"batch_tokens = {BATCH_ROWS * CONTEXT}")
    text = text.replace("baseline = true", "baseline = false").replace('precision = "int8"', 'precision = "fp32"')
    if teacher is not None:
        begin, end = text.index("[teacher.train]"), text.index("[student]")
        text = text[:begin] + f'model = "{teacher}"\n' + text[end:]
    (folder / "tiny.toml").write_text(text, encoding="utf-8")
    run("prepare")
    return run


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of random weights, sharper than a random model's nearly uniform distribution."""
    run = prepared(tmp_path_factory.mktemp("teacher"))
    shards = Shards(run.directory.shards)
    shape = Shape(n_embd=32, n_head=2, n_layer=1)
    model = student.build(shape, shards.vocab_size, CONTEXT, shards.eos_token_id, seed=2).requires_grad_(False)
    model.lm_head.weight.mul_(8)
    export.save_model(model, shards.tokenizer_dir, run.folder / "teacher")
    return run.folder / "teacher"


@pytest.fixture(scope="module")
def undisturbed(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """By one rank: two have to train the same, and start in ten times the time."""
    run = prepared(tmp_path_factory.mktemp("undisturbed"), teacher)
    given = options(run, "zero2-offload", 8)
    run("plan", *given)
    run("train", *given)
    return run


@pytest.mark.slow
def test_two_ranks_then_one_then_two_of_other_stages_and_micro_batches(
    teacher: Path, undisturbed: Run, tmp_path: Path
) -> None:
    run = prepared(tmp_path / "moved", teacher)
    for ranks, config, rows in ((2, "zero2-offload", 8), (1, "zero1", 3), (2, "zero3", 5)):
        given = options(run, config, rows)
        said = run("plan", "--num-gpus", str(ranks), *given)
        plan = json.loads(run.directory.plan.read_text())
        found = (plan["world_size"], plan["micro_batch_rows"], plan["batch_rows"])
        assert found == (ranks, rows, BATCH_ROWS)
        before = len(ledger.sessions(run.directory.ledger))
        if before:
            assert "planning anew" in said and "ranks: " in said
        run("train", *given, *(() if config == "zero3" else ONE_STEP))
    assert [len(plan["replaced"]), len(ledger.notes(run.directory.ledger))] == [2, 2]
    assert [one.first_step for one in ledger.sessions(run.directory.ledger)] == [0, 1, 2]
    expected, found = metrics(undisturbed), metrics(run)
    assert [(one["step"], one["tokens"], one["stage"]) for one in found] == [
        (one["step"], one["tokens"], one["stage"]) for one in expected
    ]
    assert len(found) >= 5
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5), one["step"]
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=2e-4), one["step"]
    saved = newest(run.directory.checkpoints)
    assert saved is not None and saved.state["step"] == plan["num_steps"]
    frozen = run.directory.plan.read_bytes()
    run("plan")
    assert run.directory.plan.read_bytes() == frozen


@pytest.mark.slow
def test_a_run_whose_disk_is_lost_goes_on_from_its_copy(teacher: Path, undisturbed: Run, tmp_path: Path) -> None:
    run, drive, seen = prepared(tmp_path / "first", teacher), tmp_path / "drive", tmp_path / "seen.txt"
    drive.mkdir()
    given = (*options(run, "zero1", 3), "--set", f"persistence.directory={drive}")
    run("prepare", *given)
    run("plan", *given)
    run("train", *given, *ONE_STEP, "--after-save", f"printf '%s\\n' >> {seen}")
    assert seen.read_text().splitlines() == [str(run.directory.checkpoints / "step-00000001")]
    shutil.rmtree(run.directory.path)
    said = run("prepare", *given)
    assert str(drive) in said and "step-00000001" in said
    run("plan", *given)
    run("train", *given)
    found, expected = metrics(run), metrics(undisturbed)
    assert [one["step"] for one in found] == [one["step"] for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5), one["step"]
    assert [(one.first_step, one.reason) for one in ledger.sessions(run.directory.ledger)] == [
        (0, "deadline"),
        (1, "done"),
    ]


def test_a_checkpoint_of_other_settings_is_refused_with_the_difference(undisturbed: Run, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.folder, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path)
    recipe = run.directory.recipe
    text = recipe.read_text(encoding="utf-8")
    assert "ce_weight = 0.1" in text
    recipe.write_text(text.replace("ce_weight = 0.1", "ce_weight = 0.2"), encoding="utf-8")
    shutil.rmtree(sorted(run.directory.checkpoints.glob("step-*"))[-1])
    output = run("train", code=2)
    assert "loss.ce_weight: 0.1 → 0.2" in output and "Traceback" not in output


def test_a_checkpoint_of_other_shards_is_refused(undisturbed: Run, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.folder, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path)
    shutil.rmtree(sorted(run.directory.checkpoints.glob("step-*"))[-1])
    index = json.loads((run.directory.shards / "index.json").read_text())
    file = next(name for name in index["files"] if name.endswith(".bin"))
    index["files"][file]["sha256"] = "0" * 64
    (run.directory.shards / "index.json").write_text(json.dumps(index))
    output = run("train", code=2)
    assert "trained on other shards" in output and "Traceback" not in output


def test_a_plan_without_a_change_stays(undisturbed: Run) -> None:
    before = undisturbed.directory.plan.read_bytes()
    undisturbed("plan")
    assert undisturbed.directory.plan.read_bytes() == before


def test_ranks_that_cannot_share_the_batch_are_refused(undisturbed: Run, tmp_path: Path) -> None:
    shutil.copytree(undisturbed.folder, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path)
    # One that has trained all needs no other plan.
    shutil.rmtree(run.directory.checkpoints)
    given = options(run, "zero1", 4)
    before = run.directory.plan.read_bytes()
    output = run("plan", "--num-gpus", "7", *given, code=2)
    assert "Traceback" not in output and f"its batch of {BATCH_ROWS} rows" in output and "--num-gpus" in output
    assert run.directory.plan.read_bytes() == before
