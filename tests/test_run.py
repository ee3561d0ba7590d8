"""Whole runs through the command line: to the end, killed, stopped, on two ranks. Everything is tiny but real."""

from __future__ import annotations

import json
import os
import pty
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from forked_commands import run_forked

from daramgpt.checkpoint import newest
from daramgpt.engine import without_rank
from daramgpt.ledger import sessions
from daramgpt.run_directory import RunDirectory

RECIPE = """
[corpus]
made_megabytes = 0.3
[curriculum]
context_tokens = 32
heldout_fraction = 0.05
[[curriculum.stages]]
name = "web-1"
corpus = "web"
take = "8KB"
unit = "sentence"
[[curriculum.stages]]
name = "unpublished"
corpus = "unpublished"
take = "4KB"
unit = "sentence"
[[curriculum.stages]]
name = "web-2"
corpus = "web"
take = "8KB"
unit = "sentence"
[[curriculum.stages]]
name = "wiki"
corpus = "wiki"
take = "6KB"
unit = "sentence"
[[curriculum.stages]]
name = "written"
corpus = "written"
take = "10KB"
unit = "paragraph"
[teacher]
precision = "int8"
[teacher.train]
n_embd = 32
n_head = 2
n_layer = 1
vocab_size = 600
[student]
n_embd = 16
n_head = 2
n_layer = 1
[optimizer]
batch_tokens = 256
[engine]
ds_config = "cpu"
micro_batch_rows = 2
[checkpoint]
every_minutes = 0.0001
[evaluation]
baseline = true
# At the ends of stages alone, and little: with the usual fifty points a tiny run does nothing else.
points = 1
point_tokens = 256
heldout_tokens = 2000
prompts = ["오늘 아침에"]
sample_tokens = 8
"""
STEPS_TO_SEE = 5
DEADLINE_SECONDS = 120
# An engine that another test began in this process has left a rank and a port behind, which are not for others.
ENVIRONMENT = {
    **without_rank(os.environ),
    "CUDA_VISIBLE_DEVICES": "",
}


class Run:
    """One run directory and the commands on it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.directory = folder, RunDirectory(folder / "run")

    def arguments(self, command: str, *options: str) -> list[str]:
        return [command, str(self.folder / "tiny.toml"), "--run", str(self.directory.path), *options]

    def start(self, command: str, *options: str) -> subprocess.Popen[str]:
        """A process of its own."""
        line = [sys.executable, "-m", "daramgpt", *self.arguments(command, *options)]
        # Output to a file: a full pipe would stop the program.
        with (self.folder / "output.txt").open("w") as output:
            return subprocess.Popen(
                line,
                stdout=output,
                stderr=subprocess.STDOUT,
                text=True,
                start_new_session=True,
                env=ENVIRONMENT,
            )

    def __call__(self, command: str, *options: str, code: int = 0) -> str:
        """What it says, in a fork of the program."""
        found = run_forked(self.arguments(command, *options), self.folder / "output.txt")
        return self._said(found, code)

    def train_alone(self) -> str:
        """What the training says, in a process of its own, as those are that get killed."""
        return self._said(self.start("train").wait(300), 0)

    def _said(self, found: int, code: int) -> str:
        output = (self.folder / "output.txt").read_text(encoding="utf-8")
        assert found == code, output
        return output

    def weights(self) -> dict[str, Any]:
        saved = newest(self.directory.checkpoints)
        assert saved is not None
        return saved.weights()

    def status(self) -> dict[str, Any]:
        return json.loads(self("status", "--json"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run whose teacher and whose student are trained, without interruption."""
    run = Run(tmp_path_factory.mktemp("whole"))
    (run.folder / "tiny.toml").write_text(RECIPE, encoding="utf-8")
    run("prepare")
    run("plan")
    run.train_alone()
    return run


@pytest.fixture
def untrained(prepared: Run, tmp_path: Path) -> Run:
    """A copy of that run from before its student was trained."""
    shutil.copytree(prepared.folder, tmp_path, dirs_exist_ok=True)
    run = Run(tmp_path)
    for path in (run.directory.checkpoints, run.directory.part("baseline").path):
        shutil.rmtree(path)
    for path in (run.directory.ledger, run.directory.metrics):
        path.unlink()
    # The baseline is not what these tests look at.
    text = run.directory.recipe.read_text(encoding="utf-8")
    run.directory.recipe.write_text(text.replace("baseline = true", "baseline = false"), encoding="utf-8")
    return run


def wait_for_steps(run: Run, process: subprocess.Popen[str], num_steps: int) -> None:
    end = time.monotonic() + DEADLINE_SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, (run.folder / "output.txt").read_text(encoding="utf-8")
        if run.directory.metrics.is_file() and run.directory.metrics.read_text().count("\n") >= num_steps:
            return
        time.sleep(0.02)
    raise AssertionError("no steps were trained in time")


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].equal(value), name


def metrics(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in run.directory.metrics.read_text().splitlines()]


def test_a_run_ends_with_all_that_it_promises(prepared: Run) -> None:
    run, directory = prepared, prepared.directory
    assert "bits/byte" in run("evaluate")
    run("export")
    run("report")
    for path in (directory.recipe, directory.plan, directory.evaluation, directory.report, directory.log):
        assert path.is_file(), path
    for name in ("config.json", "model.safetensors", "tokenizer.json", "README.md"):
        assert (directory.export / name).is_file(), name
    assert directory.part("teacher").export.is_dir()
    assert directory.part("baseline").checkpoints.is_dir()
    rows = json.loads(directory.evaluation.read_text())["rows"]
    assert [row["name"] for row in rows] == ["teacher", "teacher int8", "student", "student without teacher"]
    assert all(row["bits_per_byte"]["all"] > 0 for row in rows)
    assert "All done" in run("status", "--quiet")
    status = run.status()
    assert status["state"] == "done"
    assert [stage["name"] for stage in status["stages"]] == ["web-1", "unpublished", "web-2", "wiki", "written"]
    assert all(stage["trained_fraction"] == 1 for stage in status["stages"])
    assert "오늘" in run("generate", "--prompt", "오늘", "--tokens", "4")


def test_each_typed_line_is_gone_on_with_beside_the_teacher(prepared: Run) -> None:
    prepared("export")
    line = [sys.executable, "-m", "daramgpt", *prepared.arguments("generate", "--tokens", "4", "--compare")]
    piped = subprocess.run(line, input="오늘\n내일\n", capture_output=True, text=True, env=ENVIRONMENT, timeout=120)
    assert piped.returncode == 0, piped.stderr
    said = piped.stdout.splitlines()
    assert [text.split(": ")[0] for text in said] == ["student", "teacher"] * 2
    assert all(word in text for word, text in zip(["오늘", "오늘", "내일", "내일"], said, strict=True))
    assert said[0].removeprefix("student") != said[1].removeprefix("teacher")

    # At a terminal it asks, and Ctrl-D ends it.
    master, terminal = pty.openpty()
    with subprocess.Popen(line, stdin=terminal, stdout=terminal, stderr=terminal, env=ENVIRONMENT) as process:
        os.close(terminal)
        os.write(master, "오늘\n".encode())
        found = b""
        while found.count(b"> ") < 2:
            found += os.read(master, 4096)
        os.write(master, b"\x04")
        assert process.wait(60) == 0
    os.close(master)
    text = found.decode()
    assert "Ctrl-D ends" in text and "student: 오늘" in text and "teacher: 오늘" in text


def test_metrics_hold_every_step_once(prepared: Run) -> None:
    lines = metrics(prepared)
    plan = json.loads(prepared.directory.plan.read_text())
    assert [line["step"] for line in lines] == list(range(1, plan["num_steps"] + 1))
    assert lines[-1]["kd"] < lines[0]["kd"]
    assert {line["stage"] for line in lines} == {"web-1", "unpublished", "web-2", "wiki", "written"}


def test_the_export_gives_the_logits_of_the_checkpoint(prepared: Run) -> None:
    """Loaded in a process that cannot import the package."""
    prepared("export")
    saved = newest(prepared.directory.checkpoints)
    assert saved is not None
    script = f"""
import sys
sys.modules["daramgpt"] = None
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained({str(prepared.directory.export)!r})
tokenizer = AutoTokenizer.from_pretrained({str(prepared.directory.export)!r})
ids = tokenizer("오늘 아침에 밥을 먹었다.", return_tensors="pt").input_ids
with torch.no_grad():
    exported = model(ids).logits
    model.load_state_dict(load_file({str(saved.path / "weights.safetensors")!r}), strict=False)
    assert torch.equal(model(ids).logits, exported)
assert tokenizer.decode(ids[0]) == "오늘 아침에 밥을 먹었다.", tokenizer.decode(ids[0])
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=prepared.folder)


def test_killed_runs_end_with_the_same_weights(untrained: Run, prepared: Run) -> None:
    for _ in range(2):
        process = untrained.start("train")
        seen = len(metrics(untrained)) if untrained.directory.metrics.is_file() else 0
        wait_for_steps(untrained, process, seen + STEPS_TO_SEE)
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert untrained.status()["state"] == "dead"
    output = untrained.train_alone()
    assert "goes on from step" in output
    assert_same(untrained.weights(), prepared.weights())
    steps = [line["step"] for line in metrics(untrained)]
    assert steps == sorted(set(steps))
    assert [session.reason for session in sessions(untrained.directory.ledger)] == ["died", "died", "done"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_stops(number: signal.Signals, untrained: Run) -> None:
    process = untrained.start("train")
    wait_for_steps(untrained, process, STEPS_TO_SEE)
    if number == signal.SIGTERM:
        assert_a_second_process_is_refused(untrained, process)
    process.send_signal(number)
    assert process.wait(DEADLINE_SECONDS) == 0
    status = untrained.status()
    assert status["state"] == "interrupted"
    saved = newest(untrained.directory.checkpoints)
    assert saved is not None
    assert saved.state["step"] == len(metrics(untrained))


def assert_a_second_process_is_refused(run: Run, process: subprocess.Popen[str]) -> None:
    assert run.status()["state"] == "running"
    output = run.folder / "second.txt"
    assert run_forked(run.arguments("train"), output) == 2
    assert str(process.pid) in output.read_text(encoding="utf-8")


def test_a_deadline_stops_with_everything_saved(untrained: Run) -> None:
    untrained("train", "--hours", "0.000001")
    status = untrained.status()
    assert status["state"] == "deadline"
    # A session gets at least one step further, however short it is.
    assert status["step"] == 1
    untrained("evaluate")
    assert json.loads(untrained.directory.evaluation.read_text())["state"] == "partial"
    # What goes on from a checkpoint, however the session before ended, is what the killed runs show.
    assert newest(untrained.directory.checkpoints) is not None


@pytest.fixture(scope="module")
def plan_of_two_ranks(prepared: Run, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    shutil.copytree(prepared.folder, folder, dirs_exist_ok=True)
    run = Run(folder)
    run.directory.plan.unlink()
    run("plan", "--num-gpus", "2")
    return run.directory.plan


def test_two_ranks_train_the_same_run(untrained: Run, prepared: Run, plan_of_two_ranks: Path) -> None:
    shutil.copy(plan_of_two_ranks, untrained.directory.plan)
    untrained.train_alone()
    expected = prepared.weights()
    for name, value in untrained.weights().items():
        assert value.allclose(expected[name], rtol=1e-3, atol=1e-5), name
    assert untrained.status()["tokens"] == prepared.status()["tokens"]


@pytest.mark.slow
def test_what_a_rank_refuses_reaches_the_user(untrained: Run, plan_of_two_ranks: Path) -> None:
    shutil.copy(plan_of_two_ranks, untrained.directory.plan)
    (untrained.directory.shards / "index.json").unlink()
    process = untrained.start("train")
    assert process.wait(DEADLINE_SECONDS) == 2
    output = (untrained.folder / "output.txt").read_text(encoding="utf-8")
    assert "Traceback" not in output
    assert str(untrained.directory.shards) in output.splitlines()[-1]
