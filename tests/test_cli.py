"""The command line as users meet it: exit codes, and one line that names the thing and the mend."""

from __future__ import annotations

import errno
import logging
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from daramgpt import cli, commands, launcher, planner, recipe
from daramgpt.cli import exit_codes
from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory, locked, write_atomically, write_json

COMMANDS = ("doctor", "prepare", "plan", "train", "status", "evaluate", "generate", "export", "report")


@pytest.fixture(autouse=True)
def _as_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """In a folder of its own, and with logging as the commands found it."""
    monkeypatch.chdir(tmp_path)
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    with warnings.catch_warnings():
        yield
    logging.captureWarnings(False)
    root.handlers[:] = handlers
    root.setLevel(level)


def call(*arguments: str) -> int:
    """A command in this process, as `cli.main` runs it."""
    return exit_codes.guarded(lambda: cli.app(list(arguments), standalone_mode=False))


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line on stderr of a command that exits with 2."""
    capsys.readouterr()
    assert call(*arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and error.endswith("\n")
    assert "Traceback" not in error
    return error


def program(*arguments: str, code: str = "from daramgpt.cli import main; main()") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(Path(cli.__file__).parents[2])}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments], capture_output=True, text=True, env=environment, check=False
    )


def test_help_names_every_command_and_imports_nothing_heavy() -> None:
    code = """
import sys
from daramgpt.cli import main
try:
    main()
finally:
    heavy = {"torch", "transformers", "deepspeed", "bitsandbytes", "datasets", "numpy"}
    print("HEAVY", sorted(heavy & set(sys.modules)))
"""
    for arguments in (["--help"], ["train", "--help"], []):
        done = program(*arguments, code=code)
        assert done.returncode == 0 and done.stderr == ""
        assert done.stdout.endswith("HEAVY []\n")
        if arguments != ["train", "--help"]:
            assert all(f"\n  {command}" in done.stdout for command in COMMANDS)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["nonsense"], "nonsense"),
        (["train", "quickstart", "--bogus"], "--bogus"),
        (["train"], "RECIPE"),
        (["plan", "quickstart", "--num-gpus", "0"], "--num-gpus"),
        (["train", "quickstart", "--hours", "soon"], "--hours"),
        (["train", "quickstart", "--hours", "-1"], "--hours"),
        (["generate", "--temperature", "-1"], "--temperature"),
    ],
)
def test_usage_errors(capsys: pytest.CaptureFixture[str], arguments: list[str], named: str) -> None:
    text = refused(capsys, *arguments)
    assert named in text and "--help" in text


def test_the_program_itself_exits_with_2_and_one_line(tmp_path: Path) -> None:
    done = program("train", "quickstart", "--set", "student.n_embed=64")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and 'did you mean "n_embd"' in done.stderr
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "generate"])
def test_a_misspelt_key_is_refused_by_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    text = refused(capsys, command, "quickstart", "--set", "student.n_embed=64")
    assert 'unknown key "student.n_embed"; did you mean "n_embd"?' in text


@pytest.mark.parametrize("command", COMMANDS)
def test_an_unknown_recipe_is_refused_by_every_command(capsys: pytest.CaptureFixture[str], command: str) -> None:
    assert 'no recipe "quickstrat"; use one of daramgpt, quickstart' in refused(capsys, command, "quickstrat")


def test_a_missing_corpus_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    text = refused(capsys, "prepare", "quickstart", "--corpus", str(tmp_path / "nowhere"))
    assert str(tmp_path / "nowhere") in text and "--corpus" in text
    assert "--corpus DIR" in refused(capsys, "prepare", "daramgpt")


def test_a_teacher_that_is_not_there(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    settings = ["--corpus", str(tmp_path), "--set", "teacher.model=./missing"]
    assert 'no folder "./missing"' in refused(capsys, "prepare", "quickstart", *settings)


def test_a_ds_config_that_sets_the_batch(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shards = SimpleNamespace(vocab_size=500, context_tokens=64, num_rows=9)
    monkeypatch.setattr(commands, "open_shards", lambda _: shards)
    file = tmp_path / "mine.json"
    write_json(file, {"train_batch_size": 8})
    text = refused(capsys, "plan", "quickstart", "--ds-config", str(file))
    assert str(file) in text and "train_batch_size" in text and "optimizer.batch_tokens" in text
    assert not Path("runs/quickstart/plan.json").exists()


@pytest.mark.parametrize(
    ("command", "before"), [("plan", "prepare"), ("train", "plan"), ("evaluate", "train"), ("export", "train")]
)
def test_a_command_before_its_time_names_the_one_before(
    capsys: pytest.CaptureFixture[str], command: str, before: str
) -> None:
    text = refused(capsys, command, "quickstart")
    assert f"python -m daramgpt {before}" in text and str(Path("runs/quickstart").resolve()) in text


def test_changed_settings_of_a_run_are_refused_by_key(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    text = recipe.dump(recipe.load("quickstart", ["seed=3"]))
    write_atomically(run.recipe, text)
    # A first command with a mistake in it, before anything was computed, binds nobody.
    assert commands.resolve("quickstart", settings=["seed=4"])[0].seed == 4
    write_atomically(run.shards / "index.json", "{}")
    for command in ("prepare", "plan", "train"):
        refusal = refused(capsys, command, "quickstart", "--set", "seed=4")
        assert "seed: 3 → 4" in refusal and str(run.recipe) in refusal and "another --run" in refusal
    assert run.recipe.read_text() == text
    # Without settings of its own a command takes those of the run.
    assert commands.resolve("quickstart")[0].seed == 3
    assert commands.resolve("quickstart", settings=["seed=3", "checkpoint.keep=5"])[0].checkpoint.keep == 5


def test_another_process_at_work_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    run = RunDirectory(tmp_path / "runs" / "quickstart")
    with locked(run):
        assert f"in use by process {os.getpid()}" in refused(capsys, "plan", "quickstart")


@pytest.mark.parametrize("command", ["prepare", "plan", "train", "evaluate", "export", "report"])
@pytest.mark.parametrize("below", ["", "/below"])
def test_a_run_directory_that_cannot_be_made(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, command: str, below: str
) -> None:
    (tmp_path / "file").touch()
    text = refused(capsys, command, "quickstart", "--run", f"{tmp_path / 'file'}{below}")
    assert "--run" in text and str(tmp_path / "file") in text


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_run_directory_that_may_not_be_written(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "closed").mkdir(mode=0o500)
    assert "closed" in refused(capsys, "prepare", "quickstart", "--run", str(tmp_path / "closed" / "run"))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EROFS])
def test_a_disk_that_takes_no_more_is_the_users_to_mend(capsys: pytest.CaptureFixture[str], number: int) -> None:
    def fails() -> None:
        raise OSError(number, os.strerror(number), "/some/file")

    assert exit_codes.guarded(fails) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "/some/file" in error and os.strerror(number) in error and "make room" in error


def test_a_full_disk_in_the_middle_of_a_command(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, _: str) -> None:
        raise OSError(errno.ENOSPC, "No space left on device", str(path))

    monkeypatch.setattr(commands, "write_atomically", full)
    text = refused(capsys, "prepare", "quickstart")
    assert "recipe.toml" in text and "No space left on device" in text


def test_an_interruption_is_said_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def interrupted(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    assert exit_codes.guarded(interrupted) == 130
    # typer has an answer of its own to Ctrl-C.
    monkeypatch.setattr(commands, "prepare", interrupted)
    line = ["prepare", "quickstart", "--run", str(tmp_path / "run")]
    assert exit_codes.guarded(lambda: cli.app(line, standalone_mode=False)) == 130
    assert [line.count("goes on from there") for line in capsys.readouterr().err.splitlines()] == [1, 1]


def test_a_rank_that_failed_is_a_fault_of_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert exit_codes.guarded(lambda: launcher._explain("Traceback ...", 7, Path("log.txt"))) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "code 7" in line and "log.txt" in line


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("noise\nerror: shards are missing; mend\nmore\n", "a rank stopped: shards are missing; mend"),
        ("gpu1: noise\ngpu1: error: shards are missing; mend\n", "a rank stopped: shards are missing; mend"),
        ("RuntimeError: Using hostfile at /h but host=gpu0 was not reachable via ssh. If", "gpu0 cannot be reached"),
    ],
)
def test_what_the_user_can_mend_is_found_in_what_a_launcher_printed(text: str, fault: str) -> None:
    with pytest.raises(UserError, match=fault):
        launcher._explain(text, 1, Path("log.txt"))


@pytest.mark.parametrize("fault", ["ZeroDivisionError('ours')", "OSError(5, 'Input/output error')", "AssertionError()"])
def test_a_fault_of_the_program_exits_with_1_and_a_traceback(fault: str) -> None:
    code = f"""
from daramgpt import cli, commands
def resolve(*_):
    raise {fault}
commands.resolve = resolve
cli.main()
"""
    done = program("status", "quickstart", code=code)
    assert done.returncode == 1
    assert done.stderr.startswith("Traceback") and fault.split("(")[0] in done.stderr


def test_status_of_a_run_that_has_not_begun(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert call("status") == 0
    assert "quickstart: new" in capsys.readouterr().out
    assert call("status", "--json") == 0
    assert '"state": "new"' in capsys.readouterr().out
    assert call("status", "--quiet") == 3
    assert capsys.readouterr().out == ""
    assert list(tmp_path.iterdir()) == []


def test_doctor_blocks_what_cannot_run(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"train_batch_size": 8}')
    assert call("doctor", "daramgpt", "--corpus", "/nowhere", "--ds-config", "mine.json") == 2
    captured = capsys.readouterr()
    blocked = [line for line in captured.out.splitlines() if line.startswith("blocked")]
    assert any("/nowhere" in line for line in blocked)
    assert any("train_batch_size" in line for line in blocked)
    (refusal,) = captured.err.splitlines()
    assert "/nowhere" in refusal and "train_batch_size" in refusal


def test_the_ranks_of_a_hostfile_are_counted(tmp_path: Path) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=2  # here\n\n# two slots=8\nthree slots=4\n")
    nodes = launcher.read_nodes(hostfile, node_rank=1)
    assert nodes is not None and nodes.slots == {"one": 2, "three": 4} and nodes.num_ranks == 6
    assert nodes.arguments()[2:] == ["--master_port", "29500", "--master_addr", "one", "--no_ssh", "--node_rank", "1"]
    nodes = launcher.read_nodes(hostfile, master_addr="10.0.0.1", master_port=5)
    assert nodes is not None and nodes.arguments()[2:] == ["--master_port", "5", "--master_addr", "10.0.0.1"]
    assert launcher.read_nodes(None) is None


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("one\n", 'line 1: "one"'),
        ("one slots=2\n\ntwo slot=2\n", 'line 3: "two slot=2"'),
        ("one slots=0\n", "line 1"),
        ("one slots=1\none slots=1\n", "line 2: one is there twice"),
        ("# nobody\n", "names no machine"),
    ],
)
def test_a_wrong_hostfile_is_refused_by_its_line(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, fault: str
) -> None:
    hostfile = tmp_path / "hosts"
    hostfile.write_text(text)
    for command in ("plan", "train"):
        error = refused(capsys, command, "quickstart", "--hostfile", str(hostfile))
        assert str(hostfile) in error and fault in error and "slots=N" in error


def test_nodes_that_cannot_be_started_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert "nowhere" in refused(capsys, "train", "quickstart", "--hostfile", "nowhere")
    assert "--hostfile" in refused(capsys, "train", "quickstart", "--node-rank", "0")
    assert "--hostfile" in refused(capsys, "train", "quickstart", "--master-port", "29501")
    hostfile = tmp_path / "hosts"
    hostfile.write_text("one slots=1\ntwo slots=1\n")
    machines = ["train", "quickstart", "--hostfile", str(hostfile)]
    assert "0 to 1" in refused(capsys, *machines, "--node-rank", "2")
    assert "--num-gpus" in refused(capsys, *machines, "--num-gpus", "2")
    assert "on the first node" in refused(capsys, *machines, "--node-rank", "1")
    monkeypatch.setattr(planner, "read_plan", lambda _: {"world_size": 4})
    assert "4 ranks, --hostfile: 2" in refused(capsys, *machines)
    assert "4 ranks, --num-gpus: 2" in refused(capsys, "train", "quickstart", "--num-gpus", "2")
    monkeypatch.setattr(planner, "read_plan", lambda _: {"world_size": 2})
    error = refused(capsys, *machines, "--node-rank", "1")
    assert "shards" in error and "on the first node" in error
    write_json(RunDirectory(tmp_path / "runs" / "quickstart").shards / "index.json", {})
    monkeypatch.setenv("PATH", "")
    assert "pdsh" in refused(capsys, *machines)
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = str(other.getsockname()[1])
        assert f"--master-port {port}" in refused(capsys, *machines, "--node-rank", "0", "--master-port", port)
