"""What of a run is copied, and how a copy is known to be whole.

A checkpoint and what a part exported are *sealed folders*: beside their files stands ``manifest.json`` with size and
sha256 of each, and they come and go as one. The small files of the run and its parts are replaced one by one; a
``manifest.json`` of the whole copy has their sums. Where they cannot all be replaced in one step it first has the
sums of before and of after, so that a kill between two of them leaves nothing that looks damaged.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import Any

from daramgpt import checkpoint as checkpoints
from daramgpt.run_directory import RunDirectory

MANIFEST = checkpoints.MANIFEST
SMALL_FILES = ("recipe.toml", "plan.json", "ledger.jsonl", "metrics.jsonl")
STEP_PREFIX = "step-"

Description = dict[str, Any]
Sums = dict[str, list[Description]]


@dataclass(frozen=True)
class Folder:
    """A sealed folder.

    Attributes:
        name: where it stands in the run directory.
        files: the files that its manifest names, by plain names.
        manifest: what its ``manifest.json`` holds.
    """

    name: str
    files: dict[str, Path]
    manifest: bytes


@dataclass(frozen=True)
class Contents:
    """What is copied at one time.

    Attributes:
        run: name of the run.
        log: its log file.
        small: small files by their names in the run directory.
        exports: what the parts exported.
        checkpoint: the checkpoint; None where only the files beside it are copied.
        path: its directory.
    """

    run: str
    log: Path
    small: dict[str, bytes]
    exports: list[Folder]
    checkpoint: Folder | None
    path: Path | None

    @property
    def folders(self) -> list[Folder]:
        """All sealed folders, the checkpoint last: whoever has it has all that belongs to it."""
        return [*self.exports, *([self.checkpoint] if self.checkpoint else [])]


def run_name(run: RunDirectory) -> str:
    """Name of a run in every place."""
    return run.path.resolve().name


def gather(run: RunDirectory, path: Path | None) -> Contents:
    """What is to be copied of a run, as it is now.

    Args:
        run: the whole run.
        path: a checkpoint of it or of one of its parts; None = none.

    Raises:
        OSError: something cannot be read; the checkpoint may have been removed.
        ValueError: the checkpoint's manifest cannot be read, or names what is no plain file name.
    """
    small: dict[str, bytes] = {}
    exports: list[Folder] = []
    for part in [run, *(RunDirectory(folder) for folder in sorted(run.path.glob("parts/*")) if folder.is_dir())]:
        for name in SMALL_FILES:
            file = part.path / name
            if file.is_file():
                data = file.read_bytes()
                if file.suffix == ".jsonl":
                    # Without the line that is just being written.
                    data = data[: data.rfind(b"\n") + 1]
                small[file.relative_to(run.path).as_posix()] = data
        if part != run and part.export.is_dir():
            exports.append(_export(run, part.export))
    checkpoint = _checkpoint(run, path) if path is not None else None
    return Contents(run_name(run), run.log, small, exports, checkpoint, path)


def _checkpoint(run: RunDirectory, path: Path) -> Folder:
    manifest = (path / MANIFEST).read_bytes()
    files = {name: path / name for name in manifest_files(manifest)}
    return Folder(path.relative_to(run.path).as_posix(), files, manifest)


def _export(run: RunDirectory, path: Path) -> Folder:
    files = {
        file.name: file
        for file in sorted(path.iterdir())
        if file.is_file() and file.name != MANIFEST and not file.name.startswith(".")
    }
    described = {}
    for name, file in files.items():
        status = file.stat()
        described[name] = _described(file, status.st_mtime_ns, status.st_size)
    manifest = json.dumps({"files": described}, indent=2) + "\n"
    return Folder(path.relative_to(run.path).as_posix(), files, manifest.encode())


@lru_cache(maxsize=256)
def _described(file: Path, _modified: int, _size: int) -> Description:
    # A teacher's weights are not read again at each save.
    return describe(file)


def describe(file: Path) -> Description:
    """Size and sha256 of a file."""
    with file.open("rb") as stream:
        return {"bytes": file.stat().st_size, "sha256": hashlib.file_digest(stream, "sha256").hexdigest()}


def describe_bytes(data: bytes) -> Description:
    """As `describe`, of what a file holds."""
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def is_plain(name: str) -> bool:
    """Whether a relative name with ``/`` stays in the folder that it is relative to."""
    parts = name.split("/")
    return bool(name) and "\\" not in name and "\0" not in name and not any(part in ("", ".", "..") for part in parts)


def manifest_files(manifest: bytes) -> dict[str, Description]:
    """What the manifest of a sealed folder says of each file.

    Raises:
        ValueError: it cannot be read, or names what is no plain file name.
    """
    try:
        files = json.loads(manifest)["files"]
        names = list(files.keys())
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None
    for name in names:
        if not is_plain(name) or "/" in name or name == MANIFEST:
            raise ValueError(f"{MANIFEST} names {name!r}, which is no file of its folder")
    return dict(files)


def folder_fault(folder: Path) -> str | None:
    """Why a sealed folder does not verify; None where it does."""
    try:
        described = manifest_files((folder / MANIFEST).read_bytes())
        for name, expected in described.items():
            if describe(folder / name) != expected:
                return f"{name} is not what was written"
    except FileNotFoundError as error:
        return f"{Path(error.filename).name} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def checkpoint_fault(folder: Path) -> str | None:
    """Why a copy of a checkpoint does not verify; None where it does."""
    try:
        manifest_files((folder / MANIFEST).read_bytes())
    except FileNotFoundError:
        return f"{MANIFEST} is missing"
    except (OSError, ValueError) as error:
        return str(error)
    return checkpoints.fault(folder)


def sums_of(small: Mapping[str, bytes]) -> Sums:
    """Sums of small files, one for each."""
    return {name: [describe_bytes(data)] for name, data in small.items()}


def dump_sums(sums: Sums) -> bytes:
    """The manifest of small files."""
    return (json.dumps({"files": sums}, indent=2) + "\n").encode()


def read_sums(manifest: bytes) -> Sums:
    """The sums that small files may have, by their names.

    Raises:
        ValueError: it cannot be read.
    """
    try:
        sums = json.loads(manifest)["files"]
        return {str(name): list(described) for name, described in sums.items()}
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"{MANIFEST} cannot be read ({error})") from None


def is_small(name: str) -> bool:
    """Whether a name is that of a small file of a run or of a part."""
    path = PurePosixPath(name)
    return path.name in SMALL_FILES and prefix_of(name) is not None and name == f"{prefix_of(name)}{path.name}"


def prefix_of(name: str) -> str | None:
    """The training that a file of a run belongs to: ``""`` or ``"parts/NAME/"``; None for a name that escapes."""
    if not is_plain(name):
        return None
    parts = name.split("/")
    return f"parts/{parts[1]}/" if parts[0] == "parts" and len(parts) > 2 else ""


def step_of(name: str) -> int | None:
    """The step of a checkpoint by the name of its directory; None for another name."""
    number = name.removeprefix(STEP_PREFIX)
    return int(number) if name.startswith(STEP_PREFIX) and number.isascii() and number.isdecimal() else None


def steps_in(names: Iterable[str], prefix: str) -> dict[int, str]:
    """The checkpoints of a training among the names of files, by their steps: their directories' names."""
    found: dict[int, str] = {}
    for name in names:
        if name.startswith(f"{prefix}checkpoints/"):
            folder, _, file = name.removeprefix(f"{prefix}checkpoints/").partition("/")
            step = step_of(folder)
            if step is not None and file:
                found[step] = f"{prefix}checkpoints/{folder}"
    return found


def older_than_kept(steps: Mapping[int, str], keep: int, newly: str) -> list[str]:
    """Checkpoints that are not among the newest `keep`; the one that was just copied stays in any case."""
    return [steps[step] for step in sorted(steps, reverse=True)[keep:] if steps[step] != newly]
