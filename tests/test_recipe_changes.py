"""A run goes on with its settings: others are refused by name, some pass where that is asked for, places are free."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from daramgpt import commands, planner, recipe, status
from daramgpt.checkpoint import newest
from daramgpt.errors import UserError
from daramgpt.ledger import entries, sessions
from daramgpt.progress import Console
from daramgpt.recipe_changes import differences, refuse
from daramgpt.run_directory import RunDirectory
from daramgpt.teacher import fingerprint

RECIPE = """
[curriculum]
context_tokens = 48
heldout_fraction = 0.05
[[curriculum.stages]]
name = "web"
corpus = "web"
take = "6KB"
unit = "sentence"
[teacher]
precision = "int8"
{teacher}
[student]
n_embd = 16
n_head = 2
n_layer = 1
[optimizer]
batch_tokens = 192
[schedule]
warmup_fraction = 0
decay_fraction = 0.01
[engine]
ds_config = "cpu"
micro_batch_rows = 2
[evaluation]
heldout_tokens = 500
baseline = false
"""
TRAINED = "[teacher.train]\nn_embd = 32\nn_head = 2\nn_layer = 1\nvocab_size = 400"
# A session of one step.
ONE_STEP = 1e-6


def test_differences_name_what_decides_the_result_and_nothing_else() -> None:
    old = recipe.load("quickstart", ["seed=0"])
    (change,) = differences(old, recipe.load("quickstart", ["seed=5"]))
    assert (str(change), change.is_allowed) == ("seed: 0 → 5", False)
    # It no longer trains its own.
    assert "teacher.train.n_embd" in [c.key for c in differences(old, recipe.load("quickstart", ["teacher.model=./a"]))]
    stages = list(old.curriculum.stages)
    curriculum = old.curriculum.model_copy(update={"stages": tuple(stages[::-1])})
    assert differences(old, old.model_copy(update={"curriculum": curriculum}))
    free = ["budget.budget_hours=1", "checkpoint.every_minutes=1", "evaluation.baseline=false", "name=other"]
    assert differences(old, recipe.load("quickstart", [*free, "corpus.workers=1", "corpus.dir=/elsewhere"])) == []
    one, other = (recipe.load("daramgpt", [f"teacher.model=/{place}"]) for place in "ab")
    assert differences(one, other) == []


@pytest.mark.parametrize(
    ("setting", "is_allowed"),
    [
        ("loss.temperature=3.0", True),
        ("optimizer.learning_rate=0.001", True),
        ("schedule.horizon=hours", True),
        ("teacher.precision=bf16", True),
        ("optimizer.batch_tokens=65536", False),
        ("curriculum.order=shuffled", False),
        ("student.n_layer=5", False),
        ("seed=5", False),
    ],
)
def test_what_may_change_where_it_is_asked_for(setting: str, is_allowed: bool) -> None:
    found = differences(recipe.load("daramgpt"), recipe.load("daramgpt", [setting]))
    key = setting.partition("=")[0]
    with pytest.raises(UserError, match=rf"begun with other settings: {key}: .* → ") as refused:
        refuse(found, "begun with", allows_changes=False)
    assert ("--allow-changes" in refused.value.mend) is is_allowed
    if is_allowed:
        refuse(found, "begun with", allows_changes=True)
    else:
        with pytest.raises(UserError, match=key):
            refuse(found, "begun with", allows_changes=True)
    # What cannot pass is named alone.
    both = differences(recipe.load("daramgpt"), recipe.load("daramgpt", [setting, "seed=7", "loss.ce_weight=0.5"]))
    with pytest.raises(UserError, match="seed") as refused:
        refuse(both, "begun with", allows_changes=True)
    assert "loss" not in refused.value.fault and "--allow-changes" not in refused.value.mend


class Run:
    """A tiny run, its commands in this process."""

    def __init__(self, folder: Path, corpora: Path) -> None:
        self.file, self.directory = folder / "tiny.toml", RunDirectory(folder / "run")
        self.corpora = corpora

    def __call__(self, *settings: str, hours: float | None = None, allows_changes: bool = False) -> str:
        """Go through a session; why it ended."""
        console = Console(silent=True)
        made, run = commands.resolve(
            str(self.file), self.corpora, None, self.directory.path, list(settings), allows_changes
        )
        commands.prepare(made, run, console, allows_changes=allows_changes)
        commands.plan(made, run, console)
        return commands.train(made, run, console, hours, allows_changes=allows_changes)

    def weights(self) -> dict[str, torch.Tensor]:
        saved = newest(self.directory.checkpoints)
        assert saved is not None
        return saved.weights()

    def rates(self) -> list[float]:
        return [entry["lr"] for entry in entries(self.directory.metrics)]

    def copy(self, folder: Path) -> Run:
        shutil.copytree(self.directory.path, folder / "run")
        shutil.copy(self.file, folder)
        return Run(folder, self.corpora)


@pytest.fixture(scope="module")
def _signals() -> Iterator[None]:
    """A run in this process listens to signals; afterwards listens what did before."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory, _signals: None) -> tuple[Run, Path]:
    """A run of which a step is trained, by a teacher of another run; and that teacher."""
    from daramgpt.quickstart import write_corpus

    folder = tmp_path_factory.mktemp("begun")
    write_corpus(folder / "corpora", 0.1, seed=0)
    first = Run(folder / "first", folder / "corpora")
    first.file.parent.mkdir()
    first.file.write_text(RECIPE.format(teacher=TRAINED), encoding="utf-8")
    first(hours=ONE_STEP)
    assert first() == "done"
    teacher = folder / "teacher"
    shutil.copytree(first.directory.part("teacher").export, teacher)
    run = Run(folder / "second", folder / "corpora")
    run.file.parent.mkdir()
    run.file.write_text(RECIPE.format(teacher=f"model = {json.dumps(str(teacher))}"), encoding="utf-8")
    assert run(hours=ONE_STEP) == "deadline"
    return run, teacher


def test_a_changed_learning_rate_is_refused_and_passes_where_it_is_asked_for(
    begun: tuple[Run, Path], tmp_path: Path
) -> None:
    run = begun[0].copy(tmp_path)
    changed = ("optimizer.learning_rate=0.01", "loss.temperature=4.0")
    with pytest.raises(UserError, match=r"optimizer\.learning_rate: 0\.0006 → 0\.01") as refused:
        run(*changed)
    assert "--allow-changes" in refused.value.mend
    with pytest.raises(UserError, match=r"curriculum\.order"):
        run("curriculum.order=shuffled", allows_changes=True)
    assert run(*changed, allows_changes=True) == "done"
    before, *after = run.rates()
    assert before == 0.0006 and set(after[:-1]) == {0.01}
    plan = planner.read_plan(run.directory)
    assert plan is not None and plan["learning_rate"] == 0.01
    assert recipe.load(str(run.directory.recipe)).loss.temperature == 4.0
    (note,) = [entry for entry in entries(run.directory.ledger) if "other settings" in str(entry.get("what"))]
    assert len(note["changes"]) == 2 and note["step"] == 1
    saved = newest(run.directory.checkpoints)
    assert saved is not None and saved.state["settings"]["optimizer.learning_rate"] == 0.01


def test_a_killed_session_with_new_settings_is_not_gone_on_from_in_silence(
    begun: tuple[Run, Path], tmp_path: Path
) -> None:
    run, changed = begun[0].copy(tmp_path), "loss.ce_weight=0.7"
    made, _ = commands.resolve(str(run.file), run.corpora, None, run.directory.path, [changed], True)
    # As far as it came: the recipe is the run's, the checkpoint is from before.
    commands.prepare(made, run.directory, Console(silent=True), allows_changes=True)
    with pytest.raises(UserError, match=r"step-00000001: trained with other settings: loss\.ce_weight: 0\.1 → 0\.7"):
        run(changed)


def test_corpora_and_teacher_may_lie_elsewhere(begun: tuple[Run, Path], tmp_path: Path) -> None:
    run, teacher = begun
    stays, moves = run.copy(tmp_path / "stays"), run.copy(tmp_path / "moves")
    assert stays() == "done"
    shutil.copytree(run.corpora, tmp_path / "corpora")
    shutil.copytree(teacher, tmp_path / "teacher")
    moves.corpora = tmp_path / "corpora"
    assert moves(f"teacher.model={tmp_path / 'teacher'}") == "done"
    expected = stays.weights()
    assert all(value.equal(expected[name]) for name, value in moves.weights().items())
    assert recipe.load(str(moves.directory.recipe)).corpus.dir == str(tmp_path / "corpora")


def test_another_teacher_is_refused(begun: tuple[Run, Path], tmp_path: Path) -> None:
    run, teacher = begun[0].copy(tmp_path), tmp_path / "teacher"
    shutil.copytree(begun[1], teacher)
    config = json.loads((teacher / "config.json").read_text())
    (teacher / "config.json").write_text(json.dumps({**config, "transformers_version": "0", "use_cache": False}))
    assert fingerprint(teacher) == fingerprint(begun[1])
    tensors = load_file(teacher / "model.safetensors")
    name = next(name for name in tensors if "mlp" in name)
    tensors[name] = tensors[name] + 0.01
    save_file(tensors, teacher / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"another teacher than the one in teacher\.model"):
        run(f"teacher.model={teacher}", allows_changes=True)


def test_without_hours_nothing_is_loaded(
    begun: tuple[Run, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = begun[0].copy(tmp_path)
    monkeypatch.setattr("daramgpt.commands.training.load_teacher", lambda *_: pytest.fail("the teacher was loaded"))
    num_sessions = len(sessions(run.directory.ledger))
    assert run("budget.budget_hours=0.000001") == "deadline"
    assert len(sessions(run.directory.ledger)) == num_sessions


def test_added_hours_are_trained_on_after_the_end_by_hours(begun: tuple[Run, Path], tmp_path: Path) -> None:
    run = begun[0].copy(tmp_path)
    shutil.rmtree(run.directory.checkpoints)
    run.directory.ledger.unlink()
    plan: dict[str, Any] = planner.read_plan(run.directory) or {}
    # As planned, the hours are enough for a part of the steps.
    hours = plan["predicted"]["hours"] * 0.5
    settings = ("schedule.horizon=hours", "schedule.decay_fraction=0.3", "checkpoint.every_minutes=0.0001")
    run(*settings, f"budget.budget_hours={hours}", allows_changes=True)
    saved = newest(run.directory.checkpoints)
    assert saved is not None and saved.state["step"] < plan["num_steps"]
    more = (*settings, "budget.budget_hours=100")
    made, _ = commands.resolve(str(run.file), run.corpora, None, run.directory.path, list(more))
    assert status.read(run.directory, made.budget).num_steps == plan["num_steps"]
    assert run(*more) == "done"
    saved = newest(run.directory.checkpoints)
    assert saved is not None and saved.state["step"] == plan["num_steps"]
    # Once more there is nothing to add.
    assert status.read(run.directory, made.budget).num_steps == plan["num_steps"]
    assert run(*more) == "done" and run.rates()[-1] < 0.0006
