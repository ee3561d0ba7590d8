"""Files and archive members as one stream, in a fixed order, without extracting anything.

Files come in natural order (``part2`` before ``part10``), members of an archive in the archive's order. Korean
zip tools write entry names in cp949 without saying so; a split archive (``x.zip.part0``, ``x.zip.part1``, …) is
read as one file. A member is decompressed when it is read and never before.
"""

from __future__ import annotations

import bz2
import io
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from daramgpt.corpora.reading import Reading

PART = re.compile(r"(?P<whole>.+)\.part(?P<number>\d+)$", re.IGNORECASE)
READ_FAULTS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError)


def natural_key(path: Path | str) -> tuple[tuple[str | int, ...], ...]:
    """Sort key that compares numbers in names as numbers, folder by folder."""
    parts = unicodedata.normalize("NFC", Path(path).as_posix()).split("/")
    return tuple(
        tuple(int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", part)) for part in parts
    )


class JoinedFile(io.RawIOBase):
    """The parts of a split archive as one seekable file."""

    def __init__(self, parts: list[Path]) -> None:
        super().__init__()
        self._files = [part.open("rb") for part in parts]
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + part.stat().st_size)
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._starts[-1]}[whence]
        self._position = max(0, base + offset)
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        for file, start, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            if start <= self._position < end:
                file.seek(self._position - start)
                data = file.read(min(len(buffer), end - self._position))
                buffer[: len(data)] = data
                self._position += len(data)
                return len(data)
        return 0

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()


@dataclass(frozen=True, slots=True)
class Member:
    """A plain file, or a member of an archive.

    Attributes:
        container: the file on disk.
        path: the member's path inside the archive, or the file's name.
        folder: what tells its neighbours from those of other folders.
        archive: the open archive, None for a plain file.
        info: the archive's entry, None for a plain file.
    """

    container: Path
    path: str
    folder: str
    archive: zipfile.ZipFile | None = None
    info: zipfile.ZipInfo | None = None

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def stem(self) -> str:
        """The name without its suffix."""
        return self.name.rsplit(".", 1)[0]

    @property
    def label(self) -> str:
        """How reports name this member."""
        return self.container.name if self.archive is None else f"{self.container.name}!{self.path}"

    def open(self) -> IO[bytes]:
        """A stream of the member's bytes; plain bz2 files come out decompressed."""
        if self.archive is not None and self.info is not None:
            return self.archive.open(self.info)
        file = self.container.open("rb")
        if file.peek(3)[:3] != b"BZh":
            return file
        file.close()
        return bz2.BZ2File(self.container)

    def head(self, num_bytes: int = 8192) -> bytes:
        """The first bytes, or none where the member cannot be read."""
        try:
            with self.open() as stream:
                return stream.read(num_bytes)
        except READ_FAULTS:
            return b""


def entry_name(info: zipfile.ZipInfo) -> str:
    """An entry's name as its writer meant it: UTF-8 if flagged or valid, else cp949."""
    if info.flag_bits & 0x800:
        return info.filename
    try:
        raw = info.filename.encode("cp437")
    except UnicodeEncodeError:
        return info.filename
    for encoding in ("utf-8", "cp949"):
        try:
            return raw.decode(encoding)
        except UnicodeDecodeError:
            continue
    return info.filename


def parts_of(path: Path) -> list[Path]:
    """All parts of the split archive that ``path`` belongs to, in numeric order; ``[path]`` if it is whole."""
    match = PART.match(path.name)
    if match is None:
        return [path]
    found = []
    for sibling in path.parent.iterdir():
        part = PART.match(sibling.name)
        if part and part["whole"] == match["whole"] and sibling.is_file():
            found.append((int(part["number"]), sibling))
    return [sibling for _, sibling in sorted(found)]


def open_archive(path: Path) -> zipfile.ZipFile | None:
    """The zip archive at ``path``, None if the file is not one.

    Raises:
        zipfile.BadZipFile: it begins as a zip archive but has no readable directory (cut short).
        OSError: the file cannot be read.
    """
    parts = parts_of(path)
    with parts[0].open("rb") as file:
        if file.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
            return None
    # A buffer of its own: zipfile asks for a few bytes at a time.
    return zipfile.ZipFile(io.BufferedReader(JoinedFile(parts))) if len(parts) > 1 else zipfile.ZipFile(path)


def archive_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    """The files of an archive, in its order."""
    for info in archive.infolist():
        if info.is_dir():
            continue
        name = unicodedata.normalize("NFC", entry_name(info))
        yield Member(path, name, f"{path}!{name.rpartition('/')[0]}", archive, info)


def members(reading: Reading, paths: list[Path]) -> Iterator[Member]:
    """Every file and every member of an archive among ``paths``, in order; unreadable archives become faults."""
    for path in paths:
        match = PART.match(path.name)
        if match and parts_of(path)[0] != path:
            continue
        try:
            archive = open_archive(path)
        except READ_FAULTS as error:
            reading.fault(path.name, f"not a readable zip archive ({error})")
            continue
        if archive is None:
            yield Member(path, unicodedata.normalize("NFC", path.name), str(path.parent))
        else:
            yield from archive_members(path, archive)


def read_bytes(reading: Reading, member: Member) -> bytes | None:
    """A member's bytes, counted as one member read; None, and a fault, where they cannot be had."""
    reading.report.members += 1
    try:
        with member.open() as stream:
            data = stream.read()
    except READ_FAULTS as error:
        reading.fault(member.label, f"cannot be read ({error})")
        return None
    if not data:
        reading.fault(member.label, "is empty")
        return None
    return data
