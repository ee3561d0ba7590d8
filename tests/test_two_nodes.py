"""Several machines: two nodes train one run, and what a command of one node refuses.

Each node is a command of its own with its own launcher, in a network namespace of its own where the system allows
them, else on loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from forked_commands import run_forked
from rank_processes import run_on_ranks
from test_run import ENVIRONMENT, RECIPE

from daramgpt.checkpoint import newest
from daramgpt.run_directory import RunDirectory

# The teacher is trained by the nodes too: in 8 bits, a last digit of its weights could round to another row.
SETTINGS = (
    ("precision", '"int8"', '"fp32"'),
    ("baseline", "true", "false"),
    ("every_minutes", "0.0001", "10"),
    ("take", '"8KB"', '"3KB"'),
    ("take", '"10KB"', '"3KB"'),
    ("take", '"6KB"', '"3KB"'),
    # Few steps: most of the time goes to starting ranks.
    ("batch_tokens", "256", "512"),
)
TIMEOUT_SECONDS = 120


@dataclass
class Network:
    """Two addresses at which nodes reach each other, and what starts a command at each."""

    addresses: tuple[str, str]
    prefixes: tuple[list[str], list[str]]

    def write_hostfile(self, folder: Path) -> Path:
        path = folder / "hosts"
        path.write_text("".join(f"{address} slots=1\n" for address in self.addresses), encoding="utf-8")
        return path


@pytest.fixture(scope="module")
def network() -> Iterator[Network]:
    """Two network namespaces with a cable between them; loopback where they cannot be made."""
    names = [f"daram{os.getpid()}n{node}" for node in range(2)]
    addresses = ("192.0.2.1", "192.0.2.2")
    setup = [["ip", "netns", "add", name] for name in names]
    setup.append(["ip", "link", "add", "veth0", "netns", names[0], "type", "veth"])
    setup[-1] += ["peer", "name", "veth1", "netns", names[1]]
    for node, name in enumerate(names):
        inside = ["ip", "-netns", name]
        setup.append([*inside, "addr", "add", f"{addresses[node]}/24", "dev", f"veth{node}"])
        setup += [[*inside, "link", "set", device, "up"] for device in ("lo", f"veth{node}")]
    try:
        for line in setup:
            subprocess.run(line, check=True, capture_output=True)
        prefixes = [["nsenter", f"--net=/run/netns/{name}"] for name in names]
        for prefix in prefixes:
            subprocess.run([*prefix, "true"], check=True, capture_output=True)
        yield Network(addresses, (prefixes[0], prefixes[1]))
    except (OSError, subprocess.CalledProcessError) as error:
        print(f"no network namespaces here, so both nodes are on loopback: {error}")
        yield Network(("127.0.0.1", "localhost"), ([], []))
    finally:
        if shutil.which("ip"):
            for name in names:
                subprocess.run(["ip", "netns", "del", name], capture_output=True)


def line_of(run: RunDirectory, command: str, *arguments: str) -> list[str]:
    return [command, str(run.path.parent / "tiny.toml"), "--run", str(run.path), *arguments]


def do(run: RunDirectory, command: str, *arguments: str) -> None:
    """A command of one machine."""
    output = run.path.parent / f"{command}.txt"
    assert run_forked(line_of(run, command, *arguments), output) == 0, output.read_text(encoding="utf-8")


class Node:
    """``python -m daramgpt train`` of one node, its output in a file."""

    def __init__(self, run: RunDirectory, node: int, prefix: list[str], *arguments: str) -> None:
        self.output_path = run.path.parent / f"train-{node}.txt"
        line = [*prefix, sys.executable, "-m", "daramgpt"]
        line += line_of(run, "train", "--node-rank", str(node), *arguments)
        # Two processes share few cores: threads that wait in a loop would keep each other from working.
        environment = {**ENVIRONMENT, "OMP_WAIT_POLICY": "passive"}
        with self.output_path.open("w") as output:
            self.process = subprocess.Popen(
                line, stdout=output, stderr=subprocess.STDOUT, start_new_session=True, env=environment
            )

    def wait(self) -> str:
        code = self.process.wait(TIMEOUT_SECONDS)
        text = self.output_path.read_text(encoding="utf-8")
        assert code == 0, text
        return text


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    folder = tmp_path_factory.mktemp("nodes")
    recipe = RECIPE
    for key, old, new in SETTINGS:
        assert f"{key} = {old}" in recipe
        recipe = recipe.replace(f"{key} = {old}", f"{key} = {new}")
    (folder / "tiny.toml").write_text(recipe, encoding="utf-8")
    run = RunDirectory(folder / "run")
    do(run, "prepare")
    return run


@pytest.fixture(scope="module")
def single(prepared: RunDirectory, tmp_path_factory: pytest.TempPathFactory) -> RunDirectory:
    """The run, trained by one process."""
    run = copy(prepared, tmp_path_factory.mktemp("single"))
    do(run, "plan")
    do(run, "train")
    return run


def copy(run: RunDirectory, folder: Path) -> RunDirectory:
    shutil.copytree(run.path.parent, folder, dirs_exist_ok=True)
    return RunDirectory(folder / run.path.name)


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def weights(run: RunDirectory) -> dict[str, Any]:
    saved = newest(run.checkpoints)
    assert saved is not None
    return saved.weights()


def losses(run: RunDirectory) -> list[float]:
    return [json.loads(line)["loss"] for line in run.metrics.read_text(encoding="utf-8").splitlines()]


@pytest.mark.slow
def test_two_nodes_train_the_run_of_one_process(
    prepared: RunDirectory, single: RunDirectory, network: Network, tmp_path: Path
) -> None:
    run = copy(prepared, tmp_path)
    hostfile = network.write_hostfile(tmp_path)
    do(run, "plan", "--hostfile", str(hostfile))
    port = free_port()
    # The second one first: the order in which they are started must not matter.
    second, first = (
        Node(run, node, network.prefixes[node], "--hostfile", str(hostfile), "--master-port", port) for node in (1, 0)
    )
    first.wait()
    assert f"joining {network.addresses[0]}:{port}" in second.wait()
    for mine, other in ((run, single), (run.part("teacher"), single.part("teacher"))):
        assert len(losses(mine)) == len(losses(other)) > 5
        assert losses(mine) == pytest.approx(losses(other), rel=1e-5)
        expected = weights(other)
        for name, value in weights(mine).items():
            assert value.allclose(expected[name], rtol=1e-3, atol=1e-5), name


CHECK = """
import os, sys
from pathlib import Path
from daramgpt.engine import leave_ranks
from daramgpt.errors import UserError
from daramgpt.launcher import check_agreement
rank, log = os.environ["RANK"], Path(sys.argv[1])
same, different = {"shards": "1"}, {"shards": "1", "plan.json": rank, "checkpoints": rank}
check_agreement(same, log)
try:
    check_agreement(different, log)
except UserError as error:
    print(error.fault)
leave_ranks()
"""


def test_nodes_that_would_read_different_things_are_refused_on_every_rank(tmp_path: Path) -> None:
    program = tmp_path / "check.py"
    program.write_text(CHECK, encoding="utf-8")
    for output in run_on_ranks(str(program), 2, tmp_path, tmp_path / "log.txt"):
        assert output.splitlines()[-1] == "not the same on every node: plan.json, checkpoints"
