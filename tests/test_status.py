"""Status tells where a run stands from its files, whatever state those are in."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from daramgpt import recipe, status
from daramgpt.errors import UserError
from daramgpt.ledger import Ledger
from daramgpt.run_directory import RunDirectory, locked, write_atomically, write_json


@pytest.fixture
def run(tmp_path: Path) -> RunDirectory:
    """A prepared and planned run of 10 steps over two stages, with neither teacher training nor baseline."""
    run = RunDirectory(tmp_path / "run")
    wanted = recipe.load("quickstart", ["teacher.model=./mine", "evaluation.baseline=false", "budget.budget_hours=7"])
    write_atomically(run.recipe, recipe.dump(wanted))
    stages = [
        {"name": "web", "rows": 30, "text_bytes": 600_000, "tokens": 100_000},
        {"name": "wiki", "rows": 10, "text_bytes": 200_000, "tokens": 30_000},
    ]
    write_json(run.shards / "index.json", {"stages": stages})
    write_json(run.plan, {"num_steps": 10, "batch_rows": 4})
    return run


def reach(run: RunDirectory, step: int) -> None:
    write_json(
        run.checkpoints / f"step-{step:08d}" / "state.json",
        {"step": step, "tokens": 1000 * step, "num_steps": 10, "skipped_steps": 2},
    )


def session(run: RunDirectory, first_step: int, step: int, reason: str | None, training: str = "student") -> None:
    ledger = Ledger(run.ledger)
    ledger.start(training, "a machine", first_step, 1000 * first_step)
    ledger.beat(step, 1000 * step, 1800.0)
    if reason:
        ledger.end(step, 1000 * step, 1800.0, reason)


def finish(run: RunDirectory) -> None:
    reach(run, 10)
    session(run, 0, 10, "done")
    write_json(run.evaluation, {"state": "done", "step": 10})
    write_atomically(run.export / "model.safetensors", "weights")
    write_json(run.export / "export.json", {"step": 10})
    write_atomically(run.report, "a page")


def test_a_directory_without_a_run_is_new(tmp_path: Path) -> None:
    found = status.read(RunDirectory(tmp_path / "none"))
    assert (found.state, found.step, found.missing) == ("new", 0, ["prepare"])
    assert status.lines(found, RunDirectory(tmp_path / "none"))
    assert not (tmp_path / "none").exists()
    below_a_file = tmp_path / "file"
    below_a_file.touch()
    assert status.read(RunDirectory(below_a_file / "run")).state == "new"


def test_a_planned_run_is_new(run: RunDirectory) -> None:
    found = status.read(run)
    assert found.state == "new" and found.num_steps == 10
    assert found.missing == ["train", "evaluate", "export", "report"]


@pytest.mark.parametrize(
    ("reason", "state"),
    [
        ("deadline", "deadline"),
        ("interrupted", "interrupted"),
        (None, "dead"),
        ("failed", "dead"),
        ("done", "interrupted"),
    ],
)
def test_the_last_session_gives_the_state(run: RunDirectory, reason: str | None, state: str) -> None:
    session(run, 0, 2, "deadline")
    session(run, 2, 5, reason)
    reach(run, 5)
    found = status.read(run)
    assert (found.state, found.step, found.tokens, found.skipped_steps) == (state, 5, 5000, 2)
    assert found.hours_used == 1.0 and found.budget_hours == 7
    assert len(found.sessions) == 2
    text = "\n".join(status.lines(found, run))
    assert "step 5 of 10 (50.0%)" in text and "1.00 of 7 hours" in text and (reason or "died") in text


def test_stages_by_the_steps_of_the_plan(run: RunDirectory) -> None:
    reach(run, 8)
    web, wiki = status.read(run).stages
    # Rows 0 to 29 are steps 1 to 8 of four rows, and step 8 begins the next stage.
    assert (web.name, web.first_step, web.last_step, web.trained_fraction) == ("web", 1, 8, 1.0)
    assert (wiki.name, wiki.first_step, wiki.last_step, wiki.trained_fraction) == ("wiki", 8, 10, 0.2)


def test_done_needs_everything(run: RunDirectory) -> None:
    finish(run)
    assert status.read(run).state == "done" and status.read(run).missing == []
    run.report.unlink()
    assert (status.read(run).state, status.read(run).missing) == ("interrupted", ["report"])
    write_atomically(run.report, "a page")
    write_json(run.evaluation, {"state": "done", "step": 5})
    assert status.read(run).missing == ["evaluate"]


def test_a_teacher_to_be_trained_and_a_baseline_are_missing_until_trained(run: RunDirectory) -> None:
    finish(run)
    write_atomically(run.recipe, recipe.dump(recipe.load("quickstart")))
    assert status.read(run).missing == ["train (teacher)", "train (baseline)"]
    for name in ("teacher", "baseline"):
        write_json(run.part(name).plan, {"num_steps": 10})
        reach(run.part(name), 10)
    assert status.read(run).state == "done"


@pytest.mark.parametrize(("reason", "state"), [("deadline", "deadline"), (None, "dead")])
def test_a_session_of_a_part_is_shown_and_gives_the_state(run: RunDirectory, reason: str | None, state: str) -> None:
    session(run, 0, 2, reason, training="teacher")
    found = status.read(run)
    assert found.state == state
    assert any("teacher" in line for line in status.lines(found, run))
    session(run, 0, 5, "interrupted")
    assert status.read(run).state == "interrupted"


def test_a_run_that_a_process_holds_is_running(run: RunDirectory) -> None:
    session(run, 0, 5, None)
    with locked(run):
        found = status.read(run)
        assert found.state == "running"
        assert any(line.endswith("now") for line in status.lines(found, run))
        with pytest.raises(UserError, match="in use by process"), locked(run):
            pass
    assert status.read(run).state == "dead"


def test_a_broken_recipe_is_refused_by_name(run: RunDirectory) -> None:
    run.recipe.write_text("nothing = ", encoding="utf-8")
    with pytest.raises(UserError, match=r"recipe\.toml"):
        status.read(run)


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2)
        | st.dictionaries(st.sampled_from(["step", "num_steps", "batch_rows", "tokens", "state"]), inner, max_size=3)
    ),
    max_leaves=4,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(plan=JSON, state=JSON, evaluation=JSON)
def test_rubbish_in_its_files_is_never_a_traceback(run: RunDirectory, plan: Any, state: Any, evaluation: Any) -> None:
    write_json(run.plan, plan)
    write_json(run.evaluation, evaluation)
    write_json(run.checkpoints / "step-00000001" / "state.json", state)
    found = status.read(run)
    assert status.lines(found, run)
    assert found.state == "new"


def test_text_cut_short_counts_as_absent(run: RunDirectory) -> None:
    finish(run)
    for file in (run.plan, run.evaluation):
        file.write_text(file.read_text()[:-5])
    found = status.read(run)
    assert found.num_steps == 0 and {"train", "evaluate"} <= set(found.missing)


def test_session_times_are_shown_in_local_time(run: RunDirectory) -> None:
    session(run, 0, 5, "deadline")
    assert time.strftime("%Y-%m-%d") in "\n".join(status.lines(status.read(run), run))


def test_a_prepare_that_is_not_finished_shows_what_it_has(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "run")
    assert not any("prepare has" in line for line in status.lines(status.read(run), run))
    write_json(
        tmp_path / "run" / "shards.partial" / "progress.json",
        {
            "stages": [{"name": "web-1", "text_bytes": 3_210_000}],
            "stage": {"training": {"counts": {"text_bytes": 1_500_000}}},
            "corpora": {},
        },
    )
    assert "prepare has written web-1 (3.2 MB), 1.5 MB of the next stage" in status.lines(status.read(run), run)
