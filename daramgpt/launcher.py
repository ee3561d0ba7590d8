"""Ranks on several GPUs and machines, started by DeepSpeed's own launcher, and what they must agree on.

Machines are the lines of a hostfile. There are two ways to start their ranks: one command, from which the launcher
reaches every machine by pdsh and ssh, or one command a node, without ssh, each with the number of its line. The nodes
share one run directory, or each has a copy of it; the first rank alone writes checkpoints, metrics and the ledger, so
before each training the ranks compare what they are about to read, and refuse to go on with different things.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from daramgpt.checkpoint import START_AGAIN
from daramgpt.errors import UserError
from daramgpt.run_directory import RunDirectory

# How a command's line for the user begins; pdsh puts "host: " before every line.
REFUSAL = "error: "
_REFUSED = re.compile(rf"(?:\S+: )?{REFUSAL}(.*)")
# As DeepSpeed's launcher has it.
MASTER_PORT = 29500
# In what a rank says where a port that was free a moment ago is not any more.
PORT_TAKEN = "EADDRINUSE"
# netdevice(7): the IPv4 address of an interface.
_SIOCGIFADDR = 0x8915


class RankError(Exception):
    """The launcher ended with a fault that no rank explained in a line; the message says where its traceback is."""


@dataclass(frozen=True, slots=True)
class Nodes:
    """Machines that train together.

    Attributes:
        hostfile: DeepSpeed's, which names them.
        slots: ranks by host, in its order.
        node_rank: line of this machine, from 0, where one command a node is given; None where one starts all.
        master_addr: of the first machine, as the others reach it.
        master_port: free on the first machine.
    """

    hostfile: Path
    slots: dict[str, int]
    node_rank: int | None = None
    master_addr: str | None = None
    master_port: int | None = None

    @property
    def num_ranks(self) -> int:
        return sum(self.slots.values())

    @property
    def port(self) -> int:
        return self.master_port or MASTER_PORT

    @property
    def address(self) -> str:
        """Of the first machine; without another its name."""
        return self.master_addr or next(iter(self.slots))

    def arguments(self) -> list[str]:
        """Of DeepSpeed's launcher."""
        arguments = ["--hostfile", str(self.hostfile), "--master_port", str(self.port)]
        if self.node_rank is not None:
            return [*arguments, "--master_addr", self.address, "--no_ssh", "--node_rank", str(self.node_rank)]
        # With ssh the launcher asks the first machine for its address.
        return [*arguments, *(["--master_addr", self.master_addr] if self.master_addr else [])]


def read_nodes(
    hostfile: Path | None,
    node_rank: int | None = None,
    master_addr: str | None = None,
    master_port: int | None = None,
) -> Nodes | None:
    """The machines that a command line names; None where it names none.

    Raises:
        UserError: the hostfile cannot be read, the node rank is not one of its lines, or an option stands without it.
    """
    if hostfile is None:
        for option, value in (("node-rank", node_rank), ("master-addr", master_addr), ("master-port", master_port)):
            if value is not None:
                raise UserError(f"--{option} needs the list of machines", "add --hostfile FILE")
        return None
    slots = _read_slots(hostfile)
    if node_rank is not None and node_rank >= len(slots):
        raise UserError(
            f"--node-rank {node_rank}: {hostfile} names nodes 0 to {len(slots) - 1}",
            "give the number of this machine's line",
        )
    if len(slots) == 1:
        node_rank = 0  # no other machine is to be reached
    return Nodes(hostfile.absolute(), slots, node_rank, master_addr, master_port)


def _read_slots(hostfile: Path) -> dict[str, int]:
    mend = 'write a line "HOST slots=N" a machine'
    try:
        lines = hostfile.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"--hostfile {hostfile} cannot be read: {error}", mend) from None
    slots: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        text = line.split("#")[0].strip()
        if not text:
            continue
        match = re.fullmatch(r"(\S+)\s+slots=([1-9]\d*)", text)
        if not match:
            raise UserError(f'--hostfile {hostfile}, line {number}: "{text}"', mend)
        if match[1] in slots:
            raise UserError(f"--hostfile {hostfile}, line {number}: {match[1]} is there twice", mend)
        slots[match[1]] = int(match[2])
    if not slots:
        raise UserError(f"--hostfile {hostfile} names no machine", mend)
    return slots


def _print(line: str) -> None:
    print(line, flush=True)


def start_ranks(
    arguments: list[str], num_ranks: int, nodes: Nodes | None, run: RunDirectory, say: Callable[[str], None] = _print
) -> None:
    """Start ``python -m daramgpt`` with `arguments` as ranks and wait for them.

    A rank that ran out of memory where others may wait for it has lowered the plan's micro-batch and ended: then all
    are started again, and go on from the newest checkpoint. That ends, at the latest with a micro-batch of one row.

    A signal to this process becomes a stop request that the ranks agree on; the launcher itself would answer it by
    killing them, so it has a session of its own. A second Ctrl-C ends the launcher.

    Args:
        arguments: of each rank.
        num_ranks: on this machine, where `nodes` is None.
        nodes: several machines.
        run: whose log takes what the launcher and the ranks print on stderr; of a later node a log of its own, because
            two machines cannot append to one file.
        say: takes lines for people.

    Raises:
        UserError: a rank refused to go on, or the launcher cannot work here.
        RankError: a rank failed.
    """
    if nodes is not None:
        _check(nodes)
    try:
        while fault := _run_ranks(arguments, num_ranks, nodes, run):
            say(f"{fault}; starting all ranks again from the newest checkpoint")
    finally:
        # Served by now; the next session must not find it.
        run.stop_request.unlink(missing_ok=True)


def _run_ranks(arguments: list[str], num_ranks: int, nodes: Nodes | None, run: RunDirectory) -> str | None:
    """Run the ranks to their end; why all of them have to start again, or None where they are done."""
    # The launcher's own default port would let only one run train on a machine.
    where = ["--num_accelerators", str(num_ranks), "--master_port", str(_free_port())]
    if nodes is not None:
        where = nodes.arguments()
    launcher = [str(Path(sys.executable).with_name("deepspeed")), *where, "--quiet", "--no_local_rank", "--module"]
    node_rank = nodes.node_rank if nodes else None
    log_file = run.node_log(node_rank)
    # Where the nodes share the run directory, what one rank says is for all of their commands.
    others = [run.node_log(node) for node in range(len(nodes.slots))] if nodes and node_rank is not None else []
    logs = {path: path.stat().st_size if path.is_file() else 0 for path in [log_file, *others]}
    with log_file.open("a", encoding="utf-8") as log:
        process = subprocess.Popen([*launcher, "daramgpt", *arguments], stderr=log, start_new_session=True)

        def end(number: int, _: Any) -> None:
            if nodes is not None and nodes.node_rank is None:
                process.terminate()  # to which it answers by ending the ranks on the other machines
            else:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)

        def on_signal(number: int, _: Any) -> None:
            run.stop_request.touch()
            signal.signal(signal.SIGINT, end)

        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, on_signal)
        code = process.wait()
    if not code:
        return None
    said = {path: _text_from(path, begin) for path, begin in logs.items()}
    for text in said.values():
        for line in _refusals(text):
            if line.startswith(START_AGAIN):
                return line.removeprefix(START_AGAIN)
            if nodes is None and PORT_TAKEN in line:
                return "another program has taken the port of the ranks"
    _explain(said[log_file], code, log_file)


def _text_from(log: Path, begin: int) -> str:
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(begin)
        return file.read().decode("utf-8", errors="replace")


def _refusals(text: str) -> list[str]:
    """What ranks refuse they say as a command does."""
    return [match[1] for line in text.splitlines() if (match := _REFUSED.fullmatch(line))]


def _check(nodes: Nodes) -> None:
    """Raise what would otherwise be a traceback of the launcher, or minutes of waiting."""
    if nodes.node_rank is None:
        for program in ("pdsh", "ssh"):
            if shutil.which(program) is None:
                raise UserError(
                    f"--hostfile {nodes.hostfile}: {program}, by which one command starts several machines, is missing",
                    f"install {program}, or give one command a node with --node-rank",
                )
    elif nodes.node_rank == 0:
        with socket.socket() as probe:
            # As the server of the ranks does: a port that has just been left counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", nodes.port))
            except OSError as error:
                raise UserError(
                    f"--master-port {nodes.port} cannot be used on this machine: {error.strerror}",
                    "give every node another one",
                ) from None


def _explain(text: str, code: int, log: Path) -> NoReturn:
    if refusals := _refusals(text):
        # Every rank says the same.
        raise UserError(f"a rank stopped: {refusals[0]}", "then run the same command again")
    if match := re.search(r"host=(\S+) was not reachable via ssh", text):
        raise UserError(
            f"--hostfile: {match[1]} cannot be reached by ssh without a password",
            "set up its key, or give one command a node with --node-rank",
        )
    raise RankError(f"a rank failed (the launcher ended with code {code}); its traceback is in {log}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def check_agreement(facts: dict[str, str], log: Path) -> None:
    """Compare facts over the ranks; every rank calls it with the same keys. Nothing to do for a single one.

    Args:
        facts: text by what it is of, in words for the user.
        log: takes what DeepSpeed prints.

    Raises:
        UserError: on every rank, where a fact is not the same on all; or the other nodes cannot be reached.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return
    import torch

    from daramgpt.engine import join_ranks

    _choose_interface()
    join_ranks(log)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    digests = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:7]) for text in facts.values()]
    own = torch.tensor(digests, device=device)
    first = own.clone()
    torch.distributed.broadcast(first, 0)
    differs = (own != first).int()
    torch.distributed.all_reduce(differs)
    if names := [name for name, count in zip(facts, differs.tolist(), strict=True) if count]:
        raise UserError(
            f"not the same on every node: {', '.join(names)}",
            "share one run directory between the nodes, or copy the first node's to the others, and give all of them "
            "the same settings",
        )


@contextlib.contextmanager
def waiting_for_all() -> Iterator[None]:
    """Leave the block when every rank of a training has, however long; to be used after `check_agreement`."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield
        return
    from daramgpt.engine import ranks

    with ranks.waiting_for_all():
        yield


def _choose_interface() -> None:
    """Let Gloo, which connects the ranks without GPUs, use the network on which the first node is reached.

    By itself it takes the address of the machine's own name, which many systems set to loopback.
    """
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((os.environ["MASTER_ADDR"], 1))  # sends nothing; finds the route
        address = probe.getsockname()[0]
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):
                found = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
                if socket.inet_ntoa(found[20:24]) == address:
                    os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
