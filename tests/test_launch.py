"""launch.sh in a copy of the checkout, with stand-ins for nvidia-smi, python3, pip and the commands it runs."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from daramgpt import hardware

ROOT = Path(__file__).parents[1]
GPUS = {
    "P100": "Tesla P100-PCIE-16GB, 16280 MiB, 6.0",
    "T4 x 2": "Tesla T4, 15360 MiB, 7.5\nTesla T4, 15360 MiB, 7.5",
    "A100": "NVIDIA A100-SXM4-40GB, 40960 MiB, 8.0",
    "H100": "NVIDIA H100 80GB HBM3, 81559 MiB, 9.0",
    "none": "",
}
STEPS = ["doctor", "prepare", "plan", "train", "evaluate", "export", "report"]

# Without site-packages (-S), so that no torch is found unless a test puts one beside the package.
PYTHON3 = """\
#!/bin/sh
for last; do :; done
case "$*" in
*"-m venv"*)
    echo "venv $*" >>"$CALLS"
    mkdir -p "$last/bin" && cp "$CHECKOUT/venv-python" "$last/bin/python" && : >"$last/pyvenv.cfg" ;;
*) exec {python} -S "$@" ;;
esac
"""
VENV_PYTHON = """\
#!/bin/sh
case "$*" in
*"-m pip"*)
    echo "pip $*" >>"$CALLS"
    echo "Collecting torch>=2 (from daramgpt)"
    echo "  Downloading torch-2.13.0+cpu-cp311-cp311-manylinux_2_28_x86_64.whl (180 MB)"
    sleep "${PIP_SECONDS:-0}"
    echo "ERROR: pip says so"; exit "${PIP_CODE:-0}" ;;
*"-m pytest"*) echo "pytest in $PWD: $*" >>"$CALLS"; exit "${PYTEST_CODE:-0}" ;;
esac
PYTHONPATH=$CHECKOUT exec {python} -S "$@"
"""
COMMANDS = """\
import os, signal, sys, time
def note(text):
    with open(os.environ["CALLS"], "a") as calls:
        calls.write(text + "\\n")
command = sys.argv[1]
note(" ".join(sys.argv[1:]))
note("environment " + " ".join(f"{name}={os.environ.get(name)}" for name in
     ("DS_ACCELERATOR", "MALLOC_MMAP_THRESHOLD_", "TOKENIZERS_PARALLELISM", "HF_HUB_DISABLE_TELEMETRY")))
assert abs(int(os.environ["DARAMGPT_SESSION_START"]) - time.time()) < 60
if command == "status":
    code = int(os.environ.get("STATUS_CODE", "3"))
    if code == 0:
        print("All done: quickstart")
    sys.exit(code)
if command == os.environ.get("SLOW"):
    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a group's signal comes again from launch.sh
        note(f"signal {number}")
        sys.exit(0)
    signal.signal(signal.SIGTERM, stop)
    note("ready")
    time.sleep(60)
sys.exit(int(os.environ.get("CODE", "0")) if command == os.environ.get("FAILING") else 0)
"""


@dataclass
class Checkout:
    """A copy of what launch.sh needs, and the record of what it called."""

    path: Path
    environment: dict[str, str] = field(default_factory=dict)

    def launch(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.path / "launch.sh"), *arguments],
            capture_output=True,
            text=True,
            cwd=self.path.parent,
            env={**self.environment, **environment},
        )

    def start(self, **environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            ["bash", str(self.path / "launch.sh")],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # A test suite in the background of a shell ignores Ctrl-C, and bash cannot change what it began with.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            cwd=self.path.parent,
            env={**self.environment, **environment},
        )

    def calls(self, word: str = "") -> list[str]:
        record = self.path.parent / "calls"
        lines = record.read_text().splitlines() if record.exists() else []
        return [line for line in lines if line.startswith(word)]

    def steps(self) -> list[str]:
        return [line for line in self.calls() if line.split()[0] in STEPS]

    def forget(self) -> None:
        (self.path.parent / "calls").unlink(missing_ok=True)

    def files(self) -> set[str]:
        return {str(path) for path in self.path.parent.rglob("*")}

    def put_gpus(self, gpus: str) -> None:
        smi = self.path.parent / "bin" / "nvidia-smi"
        lines = "".join(f"echo '{line}'\n" for line in gpus.splitlines()) or "exit 9\n"
        smi.write_text(f"#!/bin/sh\n{lines}")
        smi.chmod(0o755)

    def put_torch(self, version: str, cuda: str | None, arch_list: list[str]) -> None:
        (self.path / "torch").mkdir()
        (self.path / "torch" / "__init__.py").write_text(
            "import types\nprint('noise')\n"
            f"__version__ = {version!r}\nversion = types.SimpleNamespace(cuda={cuda!r})\n"
            f"cuda = types.SimpleNamespace(get_arch_list=lambda: {arch_list!r}, is_available=lambda: True)\n"
        )
        info = self.path / f"torch-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: torch\nVersion: {version}\n")


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    path = tmp_path / "check out"  # a space, because users have them
    (path / "daramgpt").mkdir(parents=True)
    for name in ("launch.sh", "pyproject.toml"):
        shutil.copy(ROOT / name, path / name)
    for name in ("__init__.py", "bootstrap.py", "gpu_table.py"):
        shutil.copy(ROOT / "daramgpt" / name, path / "daramgpt" / name)
    for name in ("hardware", "recipes", "ds_configs"):
        shutil.copytree(ROOT / "daramgpt" / name, path / "daramgpt" / name)
    (path / "daramgpt" / "__main__.py").write_text(COMMANDS)
    binaries = tmp_path / "bin"
    binaries.mkdir()
    for target, text in ((binaries / "python3", PYTHON3), (path / "venv-python", VENV_PYTHON)):
        target.write_text(text.replace("{python}", f"'{sys.executable}'"))
        target.chmod(0o755)
    copy = Checkout(path)
    copy.environment = {
        "PATH": f"{binaries}:/usr/bin:/bin",
        "HOME": str(tmp_path),
        "CALLS": str(tmp_path / "calls"),
        "CHECKOUT": str(path),
        "PYTHONDONTWRITEBYTECODE": "1",
    }
    copy.put_gpus("")
    return copy


@pytest.mark.parametrize(
    ("gpus", "dtype", "config", "pin"),
    [
        ("P100", "fp16", "p100-16gb", "2.7.1"),
        ("T4 x 2", "fp16", "t4x2-16gb", "2.13.0"),
        ("A100", "bf16", "a100-40gb", "2.13.0"),
        ("H100", "bf16", "h100-80gb", "2.13.0"),
        ("none", *(("bf16", "cpu-bf16") if hardware.detect().cpu_has_bf16 else ("fp32", "cpu")), "2.13.0"),
    ],
)
def test_dry_run_tells_what_and_why_and_creates_nothing(
    checkout: Checkout, gpus: str, dtype: str, config: str, pin: str
) -> None:
    checkout.put_gpus(GPUS[gpus])
    before = checkout.files()
    done = checkout.launch("daramgpt", "--corpus", "my corpora", "--num-gpus", "2", "--dry-run")
    assert done.returncode == 0, done.stderr
    assert checkout.files() == before
    rows = {line.split()[0]: line.split(None, 1)[1] for line in done.stdout.splitlines() if line.startswith("  ")}
    for row, choice in (("dtype", dtype), ("teacher", "int8"), ("ds_config", config), ("torch", pin)):
        value, _, reason = rows[row].partition(": ")
        assert value == choice
        assert reason
    measured = {"P100": "int8, fp16, fp32", "none": f"int8, {dtype}"}.get(gpus, f"int8, llm-int8, {dtype}")
    assert f"; plan measures {measured} here and takes the smallest" in rows["teacher"]
    assert rows["machine"].startswith({"T4 x 2": "2 x Tesla T4", "none": "no GPU"}.get(gpus, GPUS[gpus].split(",")[0]))
    commands = [line.split()[3:] for line in done.stdout.splitlines() if line.startswith("  python -m daramgpt")]
    assert [command[0] for command in commands] == STEPS
    assert [command[0] for command in commands if "--num-gpus" in command] == ["plan", "train"]


def test_other_settings_are_allowed_to_those_that_refuse_them(checkout: Checkout) -> None:
    lines = checkout.launch("--dry-run", "--allow-changes", "--set", "loss.ce_weight=0.2").stdout.splitlines()
    steps = {
        line.split(" -m daramgpt ")[1].split()[0]: "--allow-changes" in line for line in lines if "-m daramgpt" in line
    }
    assert [step for step, is_allowed in steps.items() if is_allowed] == ["doctor", "prepare", "plan", "train"]


def test_dry_run_says_what_the_recipe_and_the_command_line_decide(checkout: Checkout) -> None:
    checkout.put_gpus(GPUS["H100"])
    done = checkout.launch("--dry-run", "--set", "teacher.precision=bf16")
    assert "ds_config    cpu: the recipe or the command line says so; this machine would have h100-80gb" in done.stdout
    assert "dtype        fp32: the ds_config says so; this machine would have bf16" in done.stdout
    assert "teacher      bf16: the recipe" in done.stdout
    assert "ds_config    p100-16gb: the recipe" in checkout.launch("--dry-run", "--ds-config=p100-16gb").stdout


def test_installs_once_and_runs_every_step_with_the_same_options(checkout: Checkout) -> None:
    common = ["--corpus", "a b", "--set", "x.y=1", "--set", "z=2", "--run", "r"]
    done = checkout.launch("daramgpt", *common, "--hours", "3", "--num-gpus", "2", "--hostfile", "h")
    assert done.returncode == 0, done.stderr
    [pip] = checkout.calls("pip")
    assert pip.endswith(f"--editable {checkout.path}[report]")
    assert (checkout.path / ".venv" / "torch.txt").read_text() == "torch==2.13.0\n"
    assert "--system-site-packages" not in checkout.calls("venv")[0]
    options = " ".join(common)
    ranks = " --num-gpus 2 --hostfile h"
    extra = {"plan": ranks, "train": f"{ranks} --hours 3"}
    assert checkout.calls("status") == [f"status daramgpt {options} --quiet"]
    assert checkout.steps() == [f"{step} daramgpt {options}{extra.get(step, '')}" for step in STEPS]
    checkout.forget()
    assert checkout.launch().returncode == 0
    assert checkout.calls("pip") == checkout.calls("venv") == []
    assert [line.split()[1] for line in checkout.steps()] == ["quickstart"] * len(STEPS)


def test_one_command_a_machine_of_which_only_the_first_does_more_than_train(checkout: Checkout) -> None:
    node = ["--hostfile", "h", "--master-addr", "a", "--master-port", "5"]
    assert checkout.launch("daramgpt", *node, "--node-rank", "1").returncode == 0
    options = "--hostfile h --master-addr a --master-port 5 --node-rank"
    assert checkout.steps() == [f"train daramgpt {options} 1"]
    checkout.forget()
    assert checkout.launch("daramgpt", *node, "--node-rank", "0").returncode == 0
    extra = {"plan": " --hostfile h", "train": f" {options} 0"}
    assert checkout.steps() == [f"{step} daramgpt{extra.get(step, '')}" for step in STEPS]


def test_a_change_of_the_requirements_or_the_torch_pin_installs_again(checkout: Checkout) -> None:
    checkout.launch(STATUS_CODE="0")
    checkout.put_gpus(GPUS["P100"])
    checkout.launch(STATUS_CODE="0")
    assert (checkout.path / ".venv" / "torch.txt").read_text() == "torch==2.7.1\n"
    with (checkout.path / "pyproject.toml").open("a") as file:
        file.write("# changed\n")
    checkout.launch(STATUS_CODE="0")
    assert len(checkout.calls("pip")) == len(checkout.calls("venv")) == 3


@pytest.mark.parametrize(
    ("gpus", "version", "cuda", "arch_list", "kept"),
    [
        ("T4 x 2", "2.10.0+cu128", "12.8", ["sm_70", "sm_75", "sm_90"], True),
        ("P100", "2.10.0+cu128", "12.8", ["sm_70", "sm_75", "sm_90"], False),
        ("P100", "2.7.1+cu126", "12.6", ["sm_50", "sm_60", "sm_90"], True),
        ("H100", "2.10.0+cpu", None, [], False),
        ("none", "2.10.0+cpu", None, [], True),
        ("none", "2.5.0", None, [], False),
    ],
)
def test_the_machines_own_torch_is_kept_where_it_serves(
    checkout: Checkout, gpus: str, version: str, cuda: str | None, arch_list: list[str], kept: bool
) -> None:
    checkout.put_gpus(GPUS[gpus])
    checkout.put_torch(version, cuda, arch_list)
    assert checkout.launch(STATUS_CODE="0").returncode == 0
    assert ("--system-site-packages" in checkout.calls("venv")[0]) is kept
    constraint = (checkout.path / ".venv" / "torch.txt").read_text()
    assert constraint == f"torch=={version if kept else '2.7.1' if gpus == 'P100' else '2.13.0'}\n"


def test_a_failed_installation_says_why_and_is_redone(checkout: Checkout) -> None:
    failed = checkout.launch(PIP_CODE="1")
    assert failed.returncode == 2
    assert "ERROR: pip says so" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("launch.sh: the installation failed")
    assert checkout.steps() == []
    assert checkout.launch(STATUS_CODE="0").returncode == 0
    assert len(checkout.calls("pip")) == 2


def test_a_terminal_shows_what_pip_does(checkout: Checkout) -> None:
    ours, its = pty.openpty()
    line = ["bash", str(checkout.path / "launch.sh")]
    environment = {**checkout.environment, "PIP_SECONDS": "2.5"}
    process = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=its, stderr=its, env=environment)
    os.close(its)
    text = b""
    with contextlib.suppress(OSError):  # a terminal's end
        while data := os.read(ours, 4096):
            text += data
    os.close(ours)
    assert process.wait(60) == 0, text
    said = text.decode()
    assert re.search(r"\r\x1b\[K  packages +1 s  fetching torch\r\x1b\[K  packages +2 s  fetching torch\r", said)
    # What is left of it is one line.
    assert re.search(r"fetching torch\r\x1b\[K  packages +\d s\r\n", said) and "Terminated" not in said


def test_wheels_are_used_without_an_index(checkout: Checkout) -> None:
    (checkout.path.parent / "wheels").mkdir()
    assert checkout.launch("--wheels", "wheels", STATUS_CODE="0").returncode == 0
    assert f"--no-index --find-links {checkout.path.parent / 'wheels'}" in checkout.calls("pip")[0]


@pytest.mark.parametrize(
    ("gpus", "accelerator", "threshold"), [("none", "cpu", "34359738368"), ("H100", "None", "None")]
)
def test_environment_of_the_commands(checkout: Checkout, gpus: str, accelerator: str, threshold: str) -> None:
    checkout.put_gpus(GPUS[gpus])
    checkout.launch(FAILING="doctor", CODE="2")
    assert set(checkout.calls("environment")) == {
        f"environment DS_ACCELERATOR={accelerator} MALLOC_MMAP_THRESHOLD_={threshold} "
        "TOKENIZERS_PARALLELISM=true HF_HUB_DISABLE_TELEMETRY=1"
    }


@pytest.mark.parametrize("code", ["1", "2"])
def test_a_failing_command_ends_the_run_with_its_code(checkout: Checkout, code: str) -> None:
    assert checkout.launch(FAILING="plan", CODE=code).returncode == int(code)
    assert checkout.steps()[-1] == "plan quickstart"


def test_all_done_runs_nothing(checkout: Checkout) -> None:
    done = checkout.launch(STATUS_CODE="0")
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == "All done: quickstart"
    assert checkout.steps() == []
    assert checkout.launch(STATUS_CODE="2").returncode == 2


def wait_until_ready(checkout: Checkout) -> None:
    deadline = time.monotonic() + 30
    while "ready" not in checkout.calls():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.mark.parametrize(
    ("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)]
)
def test_a_signal_reaches_the_command_which_stops_by_itself(
    checkout: Checkout, number: signal.Signals, whole_group: bool
) -> None:
    process = checkout.start(SLOW="train")
    wait_until_ready(checkout)
    (os.killpg if whole_group else os.kill)(process.pid, number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 0, errors
    assert f"signal {int(signal.SIGTERM)}" in checkout.calls()
    assert checkout.steps()[-1] == "train quickstart"
    assert "the same command goes on from here" in errors


def test_a_second_interrupt_exits_at_once_and_leaves_nothing_running(checkout: Checkout) -> None:
    # The stand-in for a command that does not stop: it is stopped (SIGSTOP) and so cannot answer.
    process = checkout.start(SLOW="train")
    wait_until_ready(checkout)
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children")
    if not children.exists():
        pytest.skip("this kernel does not list the children of a process")
    [child] = (int(pid) for pid in children.read_text().split())
    os.kill(child, signal.SIGSTOP)
    os.kill(process.pid, signal.SIGINT)
    assert process.stderr is not None
    assert "once more" in process.stderr.readline()
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=30) == 130
    # A killed process takes a moment to be gone.
    end = time.monotonic() + 10
    while _runs(child) and time.monotonic() < end:
        time.sleep(0.05)
    assert not _runs(child)


def _runs(pid: int) -> bool:
    """Whether a process is there and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_test_installs_the_dev_extra_and_passes_arguments_and_code_on(checkout: Checkout) -> None:
    done = checkout.launch("test", "-k", "some thing", PYTEST_CODE="5")
    assert done.returncode == 5, done.stderr
    assert checkout.calls("pip")[0].endswith("[report,dev]")
    assert checkout.calls("pytest") == [f"pytest in {checkout.path}: -m pytest -n auto --maxprocesses 4 -k some thing"]
    checkout.forget()
    assert checkout.launch("test").returncode == 0
    assert checkout.launch(STATUS_CODE="0").returncode == 0
    assert checkout.calls("pip") == []


@pytest.mark.parametrize(
    ("arguments", "fault"),
    [
        (["--frobnicate"], "unknown option --frobnicate"),
        (["--corpus"], "--corpus needs a value"),
        (["--corpus", "--dry-run"], "--corpus needs a value"),
        (["quickstart", "daramgpt"], "two recipes, quickstart and daramgpt"),
        (["--wheels", "nowhere"], "--wheels nowhere: no such folder"),
        (["--dry-run", "nowhere"], "recipe nowhere"),
    ],
)
def test_a_wrong_command_line_is_one_line(checkout: Checkout, arguments: list[str], fault: str) -> None:
    done = checkout.launch(*arguments)
    assert done.returncode == 2
    [line] = done.stderr.splitlines()
    assert fault in line
    assert checkout.calls() == []


def test_a_python_that_is_too_old_or_missing_is_named(checkout: Checkout) -> None:
    tools = checkout.path.parent / "tools"
    tools.mkdir()
    for name in ("bash", "dirname", "flock", "sed", "cat"):
        if found := shutil.which(name):
            (tools / name).symlink_to(found)
    done = checkout.launch(PATH=str(tools))
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        "launch.sh: python3 is missing or older than 3.11; install Python 3.11 or newer"
    ]


def test_help_is_the_header(checkout: Checkout) -> None:
    done = checkout.launch("--help")
    assert done.returncode == 0
    for option in ("--corpus", "--ds-config", "--hours", "--run", "--set", "--num-gpus", "--hostfile", "--wheels"):
        assert option in done.stdout
    assert "#" not in done.stdout
