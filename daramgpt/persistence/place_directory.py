"""A place that is a directory: a mounted drive, a network volume, another disk.

A folder is copied under a temporary name, synced, read back and verified, and renamed in one step. What a kill leaves
is a whole copy or a temporary that the next copy clears.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable
from pathlib import Path

from daramgpt.persistence.contents import (
    MANIFEST,
    Contents,
    Folder,
    checkpoint_fault,
    dump_sums,
    folder_fault,
    is_plain,
    older_than_kept,
    read_sums,
    steps_in,
    sums_of,
)
from daramgpt.persistence.place import Place, PlaceError

BLOCK_BYTES = 8 * 2**20
TEMPORARY = ".tmp"


class DirectoryPlace(Place):
    """A directory.

    Args:
        path: must be there: one that is missing may be a drive that is not mounted, and what would be written below
            its mount point would be lost with the machine.
    """

    def __init__(self, path: Path) -> None:
        self.path, self.name = path, str(path)
        self._mount_point: Path | None = None
        # Exports that were read back once; a checkpoint comes only once.
        self._verified: set[tuple[str, bytes]] = set()

    def copy(self, contents: Contents, keep: int) -> None:
        self._reach()
        home = self.path / contents.run
        home.mkdir(exist_ok=True)
        _clear(home)
        self._copy_small(home, contents.small)
        for folder in contents.folders:
            self._copy_folder(home, folder, is_checkpoint=folder is contents.checkpoint)
        if contents.checkpoint is not None:
            prefix = contents.checkpoint.name.partition("checkpoints/")[0]
            steps = steps_in(_walk(home), prefix)
            for name in older_than_kept(steps, keep, contents.checkpoint.name):
                _remove(home / name)

    def _copy_small(self, home: Path, small: dict[str, bytes]) -> None:
        after = sums_of(small)
        try:
            before = read_sums((home / MANIFEST).read_bytes())
        except (FileNotFoundError, ValueError):
            before = {}
        both = {name: [*before.get(name, []), *after.get(name, [])] for name in [*before, *after]}
        _replace(home / MANIFEST, dump_sums(both))
        for name, data in small.items():
            _replace(home / name, data)
        # What this machine lacks stays as it is there.
        _replace(home / MANIFEST, dump_sums({**before, **after}))

    def _copy_folder(self, home: Path, folder: Folder, is_checkpoint: bool) -> None:
        key, verify = (folder.name, folder.manifest), checkpoint_fault if is_checkpoint else folder_fault
        final = home / folder.name
        if not is_checkpoint and key in self._verified and final.is_dir():
            return
        if _manifest_of(final) != folder.manifest or verify(final) is not None:
            temporary = final.with_name(f".{final.name}{TEMPORARY}")
            temporary.mkdir(parents=True)
            try:
                for name, file in folder.files.items():
                    _copy_file(file, temporary / name)
                _write(temporary / MANIFEST, folder.manifest)
                _sync_folder(temporary)
                if fault := verify(temporary):
                    raise PlaceError(f"the copy of {folder.name} does not verify: {fault}")
                if final.exists():
                    _remove(final)
                temporary.rename(final)
                _sync_folder(final.parent)
            except OSError:
                # Its room may be what the next copy needs.
                shutil.rmtree(temporary, ignore_errors=True)
                raise
        self._verified.add(key)

    def files(self, run: str) -> set[str]:
        self._reach()
        return set(_walk(self.path / run))

    def bring(self, run: str, names: Iterable[str], into: Path) -> Path:
        self._reach()
        into.mkdir(parents=True)
        for name in names:
            if not is_plain(name):
                raise PlaceError(f"{name!r} is no file of the run")
            target = into / name
            target.parent.mkdir(parents=True, exist_ok=True)
            _copy_file(self.path / run / name, target)
        return into

    def _reach(self) -> None:
        """See that the directory is there, and on the drive that it was on."""
        self.path.stat()
        if not self.path.is_dir():
            raise NotADirectoryError(errno.ENOTDIR, "Not a directory", self.name)
        # An unmounted drive leaves its mount point, on the disk that is lost.
        path = self.path.resolve()
        mount_point = next(folder for folder in (path, *path.parents) if folder.is_mount())
        if self._mount_point not in (None, mount_point):
            raise PlaceError(f"what was mounted at {self._mount_point} is gone")
        self._mount_point = mount_point


def _walk(home: Path) -> Iterable[str]:
    """Names of the files below a folder; links and temporaries are left out."""

    def refuse(error: OSError) -> None:
        if not isinstance(error, FileNotFoundError):
            raise error

    for folder, folders, files in os.walk(home, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in files:
            file = Path(folder, name)
            if not name.startswith(".") and not file.is_symlink() and file.is_file():
                yield file.relative_to(home).as_posix()


def _clear(home: Path) -> None:
    """Remove what a kill left behind."""
    for leftover in list(home.rglob(f".*{TEMPORARY}")):
        shutil.rmtree(leftover) if leftover.is_dir() and not leftover.is_symlink() else leftover.unlink()


def _manifest_of(folder: Path) -> bytes | None:
    try:
        return (folder / MANIFEST).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None


def _copy_file(source: Path, target: Path) -> None:
    with source.open("rb") as reader, target.open("xb") as writer:
        shutil.copyfileobj(reader, writer, BLOCK_BYTES)
        _settle(writer.fileno(), writer.flush)


def _write(path: Path, data: bytes) -> None:
    with path.open("wb") as file:
        file.write(data)
        _settle(file.fileno(), file.flush)


def _settle(descriptor: int, flush: object) -> None:
    assert callable(flush)
    flush()
    os.fsync(descriptor)
    if hasattr(os, "posix_fadvise"):
        # What is read back is to come from the drive; not every one can be told so.
        with contextlib.suppress(OSError):
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


def _replace(path: Path, data: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}{TEMPORARY}")
    _write(temporary, data)
    os.replace(temporary, path)  # noqa: PTH105


def _remove(folder: Path) -> None:
    # Renamed first: one that is half removed is never read.
    doomed = folder.with_name(f".{folder.name}.removed{TEMPORARY}")
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Drives that are mounted by a program often cannot.
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
            raise
    finally:
        os.close(descriptor)
