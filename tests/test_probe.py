"""The probe: which micro-batches are tried, what a dying candidate means, what is chosen and kept."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tiny_training import Training, make_texts

from daramgpt import commands, hardware, planner, planning, recipe
from daramgpt import student as students
from daramgpt.errors import UserError
from daramgpt.hardware import GIB, Machine
from daramgpt.planner import Trial, probe
from daramgpt.recipe import Shape

PLAN = {
    "micro_batch_rows": 4,
    "batch_rows": 8,
    "context_tokens": 16,
    "predicted": {"model_flops_per_token": 1e6, "gemm_flops_per_second": 1e9},
}


def trial(rows: int, speed: float | None) -> Trial:
    return Trial(rows, 16 * rows, speed, None if speed is None else 10**9, "out of memory" if speed is None else None)


@pytest.mark.parametrize(
    ("speeds", "fastest", "largest"),
    [
        ({8: None, 4: 100.0, 2: 90.0}, 4, 4),
        ({8: 100.0, 4: 120.0, 2: 90.0}, 4, 8),
        # Within noise the smaller one.
        ({8: 100.0, 4: 99.0, 2: 90.0}, 4, 8),
        ({8: None, 4: None}, None, None),
    ],
)
def test_the_fastest_that_fits(speeds: dict[int, float | None], fastest: int | None, largest: int | None) -> None:
    said: list[str] = []
    found = probe.probe(list(speeds), lambda rows: trial(rows, speeds[rows]), said.append)
    assert (found["fastest_rows"], found["largest_rows"]) == (fastest, largest)
    assert [one["micro_batch_rows"] for one in found["trials"]] == list(speeds) and len(said) == len(speeds)


def test_candidates_are_halves_of_the_largest_that_fits() -> None:
    divisors = [1, 2, 3, 4, 6, 8, 12, 24]
    assert probe.candidates(divisors, 1024, "cuda") == [24, 12, 6]
    assert probe.candidates(divisors[:3], 1024, "cuda") == [3, 1]
    assert probe.candidates([1], 1024, "cuda") == [1]
    # Twice what a CPU gains from.
    assert probe.candidates(divisors, 1024, "cpu") == [8, 4, 2]
    assert probe.candidates(divisors, 65536, "cpu") == [1]


def test_when_there_is_no_probe() -> None:
    assert probe.reason_not_to("auto", 3.0, False, False) is None
    for arguments in (("off", 3.0, False, False), ("auto", 0.1, False, False), ("auto", 3.0, True, False)):
        assert probe.reason_not_to(*arguments)
    assert "teacher" in str(probe.reason_not_to("auto", 3.0, False, True))


@pytest.mark.parametrize(
    ("script", "expected"),
    [
        ('echo noise; echo \'{"tokens_per_second": 5.0, "peak_memory_bytes": 7}\'', Trial(4, 64, 5.0, 7, None)),
        ('echo \'{"fault": "out of memory"}\'', Trial(4, 64, None, None, "out of memory")),
        ("kill -9 $$", Trial(4, 64, None, None, "killed by signal 9, as for too much memory")),
        ("exit 137", Trial(4, 64, None, None, "killed by signal 9, as for too much memory")),
    ],
)
def test_a_candidates_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, expected: Trial) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\n{script}\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    assert probe.try_in_subprocess(["probe-candidate", "x"], PLAN, {}, tmp_path / "log") == expected


def test_a_candidate_that_fails_otherwise_names_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho broken >&2; exit 1\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    found = probe.try_in_subprocess([], PLAN, {}, tmp_path / "log")
    assert found.fault is not None and "exit code 1" in found.fault and str(tmp_path / "log") in found.fault
    assert (tmp_path / "log").read_text() == "broken\n"


def test_the_time_limit_follows_from_the_arithmetic() -> None:
    limit = probe.time_limit_seconds(PLAN)
    # Whatever else: a start, and two steps of 128 tokens at a tenth of what the products alone would allow.
    assert limit > 300 + 2 * 10 * 0.128
    slower = {**PLAN, "predicted": {**PLAN["predicted"], "gemm_flops_per_second": 1e6}}  # type: ignore[dict-item]
    assert probe.time_limit_seconds(slower) > limit + 2 * 10 * (128 - 1)


def is_alive(file: Path) -> bool:
    """Whether the process whose number a file holds is there, and no zombie."""
    try:
        return Path(f"/proc/{file.read_text().strip()}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def ends(file: Path) -> bool:
    """A killed process is there for a moment longer."""
    deadline = time.monotonic() + 30
    while is_alive(file) and time.monotonic() < deadline:
        time.sleep(0.02)
    return not is_alive(file)


def test_a_candidate_that_hangs_is_ended_with_all_it_has_started(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ntrap '' TERM\nsleep 600 &\necho $! >{tmp_path}/child\nwait\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(probe, "time_limit_seconds", lambda plan: 0.5)
    found = probe.try_in_subprocess([], PLAN, {"PATH": "/bin:/usr/bin"}, tmp_path / "log")
    assert found.tokens_per_second is None and "no answer" in str(found.fault) and str(tmp_path / "log") in found.fault
    assert ends(tmp_path / "child")


def test_what_a_candidate_leaves_running_delays_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    python = tmp_path / "python"
    answer = '{"tokens_per_second": 5.0, "peak_memory_bytes": 7}'
    python.write_text(f"#!/bin/sh\nsleep 600 &\necho $! >{tmp_path}/child\necho '{answer}'\n")
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    monkeypatch.setattr(probe, "time_limit_seconds", lambda plan: 60.0)
    found = probe.try_in_subprocess([], PLAN, {"PATH": "/bin:/usr/bin"}, tmp_path / "log")
    assert found == Trial(4, 64, 5.0, 7, None)
    assert ends(tmp_path / "child")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_planner_that_is_ended_leaves_no_candidate_behind(tmp_path: Path, number: signal.Signals) -> None:
    python, code = tmp_path / "python", "import sys; from pathlib import Path; from daramgpt.planner import probe"
    python.write_text(
        f"#!/bin/sh\necho $$ >{tmp_path}/child.new; mv {tmp_path}/child.new {tmp_path}/child; exec sleep 600\n"
    )
    python.chmod(0o755)
    code += f"; sys.executable = {str(python)!r}; probe.try_in_subprocess([], {PLAN!r}, {{'PATH': '/bin:/usr/bin'}}"
    code += f", Path({str(tmp_path / 'log')!r}))"
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    planner_process = subprocess.Popen(
        [sys.executable, "-c", code],
        env=environment,
        stderr=subprocess.PIPE,
        # A suite in the background of a shell ignores Ctrl-C, and Python then leaves it at that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while not (tmp_path / "child").exists():
        assert planner_process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    assert is_alive(tmp_path / "child")
    planner_process.send_signal(number)
    planner_process.communicate(timeout=60)
    assert planner_process.returncode == (143 if number == signal.SIGTERM else -signal.SIGINT)
    assert ends(tmp_path / "child")


@pytest.fixture
def training(tmp_path: Path) -> Training:
    make_texts(tmp_path)
    made = Training(tmp_path, tmp_path, "cpu")
    # As a plan would come upon it: shards and a teacher, and nothing chosen.
    made.run.plan.unlink()
    teacher = Shape(n_embd=24, n_head=2, n_layer=1)
    students.build(teacher, made.shards.vocab_size, 16, made.shards.eos_token_id, 2).save_pretrained(
        tmp_path / "teacher"
    )
    return made


def test_a_run_is_probed_once(training: Training, monkeypatch: pytest.MonkeyPatch) -> None:
    """The real thing: two candidates, each a process that trains the run's own rows."""
    monkeypatch.setattr(probe, "PROBE_FROM_HOURS", 0.0)
    monkeypatch.setattr(probe, "MOST_CANDIDATES", 2)
    monkeypatch.setattr(hardware, "detect", lambda: Machine((), 1, 8 * GIB))
    folder = training.run.path.parent
    wanted = recipe.validate(
        {
            **training.recipe.model_dump(),
            "teacher": {"model": str(folder / "teacher"), "precision": "fp32"},
            "engine": {"ds_config": "cpu"},
        },
        "test",
    )
    said: list[str] = []
    commands.plan(wanted, training.run, said.append)  # type: ignore[arg-type]
    plan = planner.read_plan(training.run)
    assert plan is not None
    trials = {one["micro_batch_rows"]: one for one in plan["probe"]["trials"]}
    assert list(trials) == [12, 6] and all(one["fault"] is None for one in trials.values()), said
    assert all(one["tokens_per_second"] > 0 and one["peak_memory_bytes"] > 10**8 for one in trials.values())
    assert plan["micro_batch_rows"] == plan["probe"]["fastest_rows"] in trials
    assert plan["probe"]["largest_rows"] == 12
    assert any("fastest" in line and "largest that fits 12" in line for line in said)

    def again(*_: object) -> None:
        raise AssertionError("probed again")

    monkeypatch.setattr(probe, "probe", again)
    commands.plan(wanted, training.run, said.append)  # type: ignore[arg-type]
    assert planner.read_plan(training.run) == plan


def test_a_run_whose_candidates_all_die_keeps_the_arithmetic(
    training: Training, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = training.run.path.parent
    part = planning.Part("student", training.recipe, training.run, folder / "teacher")
    auto = training.recipe.model_copy(update={"engine": recipe.Engine(ds_config="cpu")})
    part = planning.Part("student", auto, training.run, folder / "teacher")
    predicted = {"hours": 9.0, "tokens_per_second": 10.0, "largest_micro_batch_rows": 12}
    plan = {**training.plan, "predicted": predicted}
    monkeypatch.setattr(probe, "try_in_subprocess", lambda command, plan, *_: trial(plan["micro_batch_rows"], None))
    found = planning._probed(plan, part, auto, training.run, "cpu", lambda line: None)
    assert found["micro_batch_rows"] == plan["micro_batch_rows"]
    assert found["probe"]["fastest_rows"] is None and "arithmetic" in found["probe"]["reason"]
    fast = {12: None, 6: 9.0, 3: 20.0}
    monkeypatch.setattr(
        probe,
        "try_in_subprocess",
        lambda command, plan, *_: trial(plan["micro_batch_rows"], fast[plan["micro_batch_rows"]]),
    )
    found = planning._probed(plan, part, auto, training.run, "cpu", lambda line: None)
    assert found["micro_batch_rows"] == 3 and found["batch_rows"] == plan["batch_rows"]
    assert found["loss_chunk_tokens"] <= 3 * plan["context_tokens"]
    assert found["probe"]["largest_rows"] == 6 and found["probe"]["trials"][2]["hours"] == pytest.approx(9 / 2)
    json.dumps(found)


def test_a_micro_batch_that_is_given_is_not_probed(training: Training) -> None:
    part = planning.Part("student", training.recipe, training.run, None)
    plan = {**training.plan, "predicted": {"hours": 9.0}}
    found = planning._probed(plan, part, training.recipe, training.run, "cpu", lambda line: None)
    assert found == {**plan, "probe": {"reason": "engine.micro_batch_rows is given"}}


def test_vocabulary_of_a_teacher_too_small_for_its_tokenizer(training: Training, tmp_path: Path) -> None:
    assert planning.vocab_size(None, training.shards) == training.shards.vocab_size
    assert planning.vocab_size(tmp_path / "teacher", training.shards) == training.shards.vocab_size
    students.build(Shape(n_embd=24, n_head=2, n_layer=1), 8, 16, 0, 2).save_pretrained(tmp_path / "small")
    with pytest.raises(UserError, match=r"embedding 8 rows"):
        planning.vocab_size(tmp_path / "small", training.shards)
