"""A rank that runs out of memory where another waits for it: the same command starts all of them again."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from forked_commands import run_forked
from test_run import ENVIRONMENT, RECIPE

from daramgpt import launcher, planner
from daramgpt.checkpoint import START_AGAIN, newest
from daramgpt.errors import UserError
from daramgpt.launcher import RankError
from daramgpt.ledger import sessions
from daramgpt.run_directory import RunDirectory, write_json

SETTINGS = (
    # In 8 bits, a last digit of the teacher's weights could round to another row.
    ("precision", '"int8"', '"fp32"'),
    ("baseline", "true", "false"),
    ("take", '"8KB"', '"3KB"'),
    ("take", '"10KB"', '"3KB"'),
    ("take", '"6KB"', '"3KB"'),
    # Few steps: most of the time goes to starting ranks.
    ("batch_tokens", "256", "512"),
)
TIMEOUT_SECONDS = 300
# Read by every Python that starts with its folder in PYTHONPATH: it fails one of the ranks.
SITE = """
import os
import sys

if "RANK" in os.environ:
    sys.path.insert(0, {tests!r})
    from failing_ranks import Fault

    fault = Fault(**{fault!r}).caused()
    fault.__enter__()
    sys.path.remove({tests!r})
"""


def command(run: RunDirectory, name: str, *arguments: str, site: Path | None = None) -> str:
    """What it says; a process of its own where `site` makes it fail."""
    line = [name, str(run.path.parent / "tiny.toml"), "--run", str(run.path), *arguments]
    output = run.path.parent / "output.txt"
    if site is None:
        code = run_forked(line, output)
    else:
        with output.open("w") as file:
            code = subprocess.run(
                [sys.executable, "-m", "daramgpt", *line],
                stdout=file,
                stderr=file,
                timeout=TIMEOUT_SECONDS,
                env={**ENVIRONMENT, "OMP_WAIT_POLICY": "passive", "PYTHONPATH": str(site)},
            ).returncode
    said = output.read_text(encoding="utf-8")
    assert code == 0, said + run.log.read_text(encoding="utf-8")[-6000:]
    return said


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder, recipe = tmp_path_factory.mktemp("planned"), RECIPE
    for key, old, new in SETTINGS:
        assert f"{key} = {old}" in recipe
        recipe = recipe.replace(f"{key} = {old}", f"{key} = {new}")
    (folder / "tiny.toml").write_text(recipe, encoding="utf-8")
    run = RunDirectory(folder / "run")
    command(run, "prepare")
    return run


def copy(run: RunDirectory, folder: Path) -> RunDirectory:
    shutil.copytree(run.path.parent, folder, dirs_exist_ok=True)
    return RunDirectory(folder / run.path.name)


def losses(run: RunDirectory) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]


def weights(run: RunDirectory) -> dict[str, Any]:
    saved = newest(run.checkpoints)
    assert saved is not None
    return saved.weights()


@pytest.mark.slow
def test_the_command_goes_on_with_the_smaller_micro_batch(prepared: RunDirectory, tmp_path: Path) -> None:
    undisturbed, run = copy(prepared, tmp_path / "undisturbed"), copy(prepared, tmp_path / "disturbed")
    # One rank trains the same, and is there at once.
    command(undisturbed, "plan")
    command(run, "plan", "--num-gpus", "2")
    for part in (undisturbed, undisturbed.part("teacher")):
        plan, plan_of_ranks = planner.read_plan(part), planner.read_plan(run)
        assert plan is not None and plan_of_ranks is not None
        assert plan_of_ranks["micro_batch_rows"] == 2 and plan_of_ranks["world_size"] == 2
        assert plan["batch_rows"] == plan_of_ranks["batch_rows"]
        write_json(part.plan, planner.with_micro_batch(plan, 1))
    command(undisturbed, "train")
    teacher_plan = planner.read_plan(run.part("teacher"))
    assert teacher_plan is not None
    # In the student's third step, and, being of this process, not in the teacher's: it has another number of rows.
    passes = teacher_plan["batch_rows"] // (teacher_plan["micro_batch_rows"] * 2)
    fault = {"rank": 1, "place": "backward", "micro_batch": passes * (teacher_plan["num_steps"] + 2) + 1}
    site = tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(
        SITE.format(tests=str(Path(__file__).parent), fault={**fault, "most_rows": 1}), encoding="utf-8"
    )
    said = command(run, "train", site=site)
    (line,) = [line for line in said.splitlines() if "starting all ranks again" in line]
    assert "student: out of memory with 2 rows a forward pass" in line and "newest checkpoint" in line
    assert "student: goes on from step 2 " in said
    assert losses(run) == pytest.approx(losses(undisturbed), rel=1e-5)
    expected = weights(undisturbed)
    for name, value in weights(run).items():
        assert value.allclose(expected[name], rtol=1e-3, atol=1e-5), name
    plan = planner.read_plan(run)
    assert plan is not None and plan["micro_batch_rows"] == 1
    assert [session.reason for session in sessions(run.ledger)][-1] == "done"
    assert not run.stop_request.exists()


@pytest.fixture
def fake_launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Stands in for DeepSpeed's: a shell script that a test writes; what it says is what its ranks say."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    script = tmp_path / "deepspeed"
    script.touch(0o755)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield script
    for number, handler in before.items():
        signal.signal(number, handler)


AGAIN = f"error: {START_AGAIN}student: out of memory with 4 rows a forward pass; from now on with 2"
# The first two times it runs.
TWICE = 'echo run >>{folder}/runs; if [ $(wc -l <{folder}/runs) -lt 3 ]; then echo "{line}" >>{log}; exit 2; fi\n'


def num_runs(folder: Path) -> int:
    return len((folder / "runs").read_text().splitlines())


TAKEN = "error: the ranks of all nodes did not meet at 127.0.0.1:5: failed to listen, name: EADDRINUSE; start again"


def test_ranks_whose_port_was_taken_meet_at_another(tmp_path: Path, fake_launcher: Path) -> None:
    run = RunDirectory(tmp_path)
    fake_launcher.write_text(
        f'#!/bin/sh\necho "$@" >>{tmp_path}/lines\n' + TWICE.format(folder=tmp_path, line=TAKEN, log=run.log)
    )
    said: list[str] = []
    launcher.start_ranks([], 2, None, run, said.append)
    assert num_runs(tmp_path) == 3 and len(said) == 2 and "taken the port" in said[0]
    ports = [line.split("--master_port ")[1].split()[0] for line in (tmp_path / "lines").read_text().splitlines()]
    assert len(set(ports)) > 1
    # The port of several machines is the user's choice.
    fake_launcher.write_text(f'#!/bin/sh\necho "{TAKEN}" >>{run.node_log(1)}; exit 2')
    nodes = launcher.Nodes(tmp_path / "hosts", {"a": 1, "b": 1}, node_rank=1)
    with pytest.raises(UserError, match="EADDRINUSE"):
        launcher.start_ranks([], 2, nodes, run)


@pytest.mark.parametrize("speaker", ["this node", "another node", "a machine that pdsh has reached"])
def test_ranks_are_started_until_none_asks_for_it(tmp_path: Path, fake_launcher: Path, speaker: str) -> None:
    run, nodes, line = RunDirectory(tmp_path), None, AGAIN
    if speaker == "another node":
        # Its ranks are gone, and the ones here have lost them.
        nodes = launcher.Nodes(tmp_path / "hosts", {"a": 1, "b": 1}, node_rank=1)
    if speaker == "a machine that pdsh has reached":
        line = f"b: {AGAIN}"
    # What was said before this session is not for it.
    run.log.write_text(f"{AGAIN}\n")
    fake_launcher.write_text("#!/bin/sh\n" + TWICE.format(folder=tmp_path, line=line, log=run.log))
    said: list[str] = []
    launcher.start_ranks([], 2, nodes, run, said.append)
    assert num_runs(tmp_path) == 3 and len(said) == 2
    assert said[0].startswith("student: out of memory with 4 rows") and "newest checkpoint" in said[0]


def test_ranks_that_end_for_another_reason_are_not_started_again(tmp_path: Path, fake_launcher: Path) -> None:
    run = RunDirectory(tmp_path)
    fake_launcher.write_text(
        f'#!/bin/sh\necho run >>{tmp_path}/runs; echo "error: the disk is full; mend it" >&2; exit 1'
    )
    run.log.write_text(f"{AGAIN}\n")
    run.stop_request.touch()
    with pytest.raises(UserError, match="the disk is full"):
        launcher.start_ranks([], 2, None, run)
    fake_launcher.write_text(f"#!/bin/sh\necho run >>{tmp_path}/runs; exit 3")
    with pytest.raises(RankError, match="code 3"):
        launcher.start_ranks([], 2, None, run)
    assert num_runs(tmp_path) == 2 and not run.stop_request.exists()
