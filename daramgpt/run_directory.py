"""Where a run keeps each of its files, how a small file is read and replaced in one step, who holds the directory.

What is read may be damaged, or not what it was: opening a pipe would wait for its other end, a device never ends.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from daramgpt.errors import UserError

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """``runs/<recipe>/``, or the folder that ``--run`` names."""

    path: Path

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.toml"

    @property
    def plan(self) -> Path:
        return self.path / "plan.json"

    @property
    def corpora(self) -> Path:
        """The corpus that the package makes itself, in the formats of the real ones."""
        return self.path / "corpora"

    @property
    def shards(self) -> Path:
        """Token shards, their index, and ``tokenizer/`` that they were made with."""
        return self.path / "shards"

    @property
    def teacher_weights(self) -> Path:
        """A teacher that came pickled, converted."""
        return self.path / "teacher-weights"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def initial_weights(self) -> Path:
        """What the student begins with, where that is not random."""
        return self.path / "initial.safetensors"

    @property
    def ledger(self) -> Path:
        return self.path / "ledger.jsonl"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def tasks(self) -> Path:
        """Scores on KoBEST and NSMC."""
        return self.path / "tasks.json"

    @property
    def export(self) -> Path:
        """The student as a Hugging Face directory."""
        return self.path / "export"

    @property
    def report(self) -> Path:
        return self.path / "report.html"

    @property
    def pictures(self) -> Path:
        """The report's curves as PNG files."""
        return self.path / "pictures"

    @property
    def log(self) -> Path:
        return self.path / "log.txt"

    def node_log(self, node_rank: int | None) -> Path:
        """Log of what is started on one machine of several; that of the first is the run's."""
        return self.path / f"log-node{node_rank}.txt" if node_rank else self.log

    def session_recipe(self, node_rank: int | None) -> Path:
        """The recipe with the settings of this session, for the ranks that a machine starts."""
        return self.path / f".session-node{node_rank or 0}.toml"

    @property
    def stop_request(self) -> Path:
        """Its existence asks the ranks of a training to save and stop."""
        return self.path / ".stop"

    def part(self, name: str) -> RunDirectory:
        """The sub-run ``parts/<name>``."""
        return RunDirectory(self.path / "parts" / name)


def open_regular(path: str, flags: int) -> int:
    """Opener for `open`: of a regular file, or of a link to one.

    Raises:
        OSError: it is none, or cannot be opened.
    """
    descriptor = os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC, 0o666)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "is no regular file", path)
    return descriptor


def open_to_append(path: Path) -> int:
    """Descriptor of a regular file to read and to append to, made where it is missing; what a link leads to is not the
    run's.

    Raises:
        UserError: something else stands in its place.
    """
    try:
        return open_regular(str(path), os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise
        raise UserError(f"{path} is no regular file", "remove it and run the same command again") from None


def read_text(path: Path) -> str:
    """Text of a regular file.

    Raises:
        OSError: there is none, or it cannot be read.
        ValueError: it is not UTF-8.
    """
    with open(path, encoding="utf-8", opener=open_regular) as file:
        return file.read()


def parse_json(text: str | bytes) -> Any:
    """What a JSON text says.

    Raises:
        ValueError: it is none, is nested too deeply, or holds half of a surrogate pair, which nothing can print.
    """
    try:
        data = json.loads(text)
        if _SURROGATE.search(text if isinstance(text, str) else text.decode()):
            json.dumps(data, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    return data


def write_atomically(path: Path, content: str | bytes) -> None:
    """Replace a file in one step: a reader sees the old content or the new, never a part.

    Raises:
        UserError: a folder stands in its place.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except IsADirectoryError:
        raise UserError(f"{path} is a folder", "remove it and run the same command again") from None
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, data: Any) -> None:
    """Write `data` as JSON by `write_atomically`."""
    write_atomically(path, json.dumps(data, ensure_ascii=False, indent=2) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or an empty one where there is none that can be read: of a run at any point of its way."""
    try:
        data = parse_json(read_text(path))
    except (OSError, ValueError):
        return {}
    return data if isinstance(data, dict) else {}


@contextmanager
def locked(run: RunDirectory, node_rank: int | None = None) -> Iterator[None]:
    """Hold the run directory for this process; the lock ends with the process, however that ends.

    Args:
        run: whose directory.
        node_rank: of several machines that share it; each has a lock of its own, the first one the run's.

    Raises:
        UserError: another process holds it, or its lock is no file.
    """
    run.path.mkdir(parents=True, exist_ok=True)
    lock = run.path / (f".lock-node{node_rank}" if node_rank else ".lock")
    with os.fdopen(open_to_append(lock), "a+", encoding="utf-8", errors="replace") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise UserError(
                f"{run.path} is in use by process {file.read().strip() or '?'}", "wait for it, or give another --run"
            ) from None
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield


def is_locked(run: RunDirectory) -> bool:
    """Whether a process holds the run directory now."""
    try:
        with open(run.path / ".lock", "rb", opener=open_regular) as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            return False
    except BlockingIOError:
        return True
    except OSError:
        # There is none, or nothing that could be locked.
        return False
