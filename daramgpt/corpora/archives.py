"""Files and archive members as one stream, in a fixed order, without extracting anything.

Files come in natural order (``part2`` before ``part10``), members of an archive in the archive's order. Korean
zip tools write entry names in cp949 without saying so; a split archive (``x.zip.part0``, ``x.zip.part1``, …) is
read as one file. A member is decompressed when it is read and never before.
"""

from __future__ import annotations

import io
import re
import unicodedata
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import IO

from daramgpt.corpora.reading import LARGEST_ITEM_BYTES, Item, Pending, Reading
from daramgpt.corpora.salvaged_bz2 import SalvagedBZ2
from daramgpt.corpora.salvaged_zip import SalvagedArchive
from daramgpt.corpora.seekable import JoinedFile

PART = re.compile(r"(?P<whole>.+)\.part(?P<number>\d+)$", re.IGNORECASE)
# Ways of packing of which only zip, on the outside, is read.
PACKED = re.compile(r"\.(?:zip|z\d\d|gz|tgz|xz|tar|7z|rar|egg|alz)$", re.IGNORECASE)
READ_FAULTS = (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError, NotImplementedError, ValueError)


def natural_key(path: Path | str) -> tuple[tuple[str | int, ...], ...]:
    """Sort key that compares numbers in names as numbers, folder by folder."""
    parts = unicodedata.normalize("NFC", Path(path).as_posix()).split("/")
    return tuple(
        tuple(int(piece) if piece.isdecimal() else piece for piece in re.split(r"(\d+)", part)) for part in parts
    )


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
    def size(self) -> int:
        """Bytes of the member before compression; of a plain file as it lies on disk, 0 where there is none."""
        if self.info is not None:
            return self.info.file_size
        return self.container.stat().st_size if self.container.exists() else 0

    @property
    def label(self) -> str:
        """How reports name this member."""
        container = printable(self.container.name)
        return container if self.archive is None else f"{container}!{self.path}"

    def open(self) -> IO[bytes]:
        """A stream of the member's bytes; plain bz2 files come out decompressed."""
        if self.archive is not None and self.info is not None:
            return self.archive.open(self.info)
        file = self.container.open("rb")
        if file.peek(3)[:3] != b"BZh":
            return file
        file.close()
        return SalvagedBZ2(self.container)

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
    return [sibling for _, sibling in sorted(found)] or [path]


def open_archive(path: Path) -> zipfile.ZipFile | None:
    """The zip archive at ``path``, None if the file is not one; a `SalvagedArchive` if its directory is gone.

    Raises:
        OSError: the file cannot be read.
    """
    parts = parts_of(path)
    with parts[0].open("rb") as file:
        if file.read(4) not in (b"PK\x03\x04", b"PK\x05\x06"):
            return None
    try:
        # A buffer of its own: zipfile asks for a few bytes at a time.
        return zipfile.ZipFile(io.BufferedReader(JoinedFile(parts))) if len(parts) > 1 else zipfile.ZipFile(path)
    except zipfile.BadZipFile:
        return SalvagedArchive(io.BufferedReader(JoinedFile(parts)))


def archive_members(path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    """The files of an archive, in its order."""
    folders: dict[str, str] = {}
    for info in archive.infolist():
        if not info.filename.endswith("/"):
            name = unicodedata.normalize("NFC", entry_name(info))
            folder = name.rpartition("/")[0]
            # One string for all members of a folder: there may be hundreds of thousands.
            yield Member(path, name, folders.setdefault(folder, f"{path}!{folder}"), archive, info)


def members(reading: Reading, paths: list[Path]) -> Iterator[Member]:
    """Every file and every member of an archive among ``paths``, in order; what cannot be opened becomes a fault."""
    for path in paths:
        match = PART.match(path.name)
        if match and parts_of(path)[0] != path:
            continue
        name = unicodedata.normalize("NFC", printable(path.name))
        if not path.is_file():
            reading.fault(name, "leads nowhere" if path.is_symlink() and not path.exists() else "is no regular file")
            continue
        try:
            archive = open_archive(path)
        except READ_FAULTS as error:
            reading.fault(name, f"cannot be read ({error})")
            continue
        if archive is not None:
            yield from _known(reading, path, archive)
        elif PACKED.search(path.name):
            reading.fault(name, "is no zip archive, or of a kind that is not read; unpack it")
        else:
            yield Member(path, name, str(path.parent))


def _known(reading: Reading, path: Path, archive: zipfile.ZipFile) -> Iterator[Member]:
    """Members of an archive that are no archives themselves."""
    name = printable(path.name)
    if isinstance(archive, SalvagedArchive):
        num_members = sum(1 for _ in archive_members(path, archive))
        reading.fault(name, f"the archive is cut short; {num_members} whole members were recovered")
        for info in archive.lost:
            reading.fault(f"{name}!{entry_name(info)}", "was lost where the archive is cut short")
    elif not archive.infolist():
        reading.fault(name, "holds no files")
    for member in archive_members(path, archive):
        if PACKED.search(member.name) or member.name.lower().endswith(".bz2"):
            reading.fault(member.label, "an archive inside an archive is not read; unpack it")
        else:
            yield member


def printable(name: str) -> str:
    """A file name that can be shown: what is no UTF-8 on disk is taken for cp949, as Korean tools write it."""
    try:
        name.encode()
    except UnicodeEncodeError:
        raw = name.encode("utf-8", "surrogateescape")
        return raw.decode("cp949", "replace")
    return name


@contextmanager
def opened(reading: Reading, member: Member) -> Iterator[IO[bytes]]:
    """A member's stream; what turns out to be missing when it has been read to its end becomes a fault."""
    with member.open() as stream:
        yield stream
        if isinstance(stream, SalvagedBZ2) and stream.fault:
            reading.fault(member.label, stream.fault)


def pending(reading: Reading, member: Member, parser: str, twin: tuple[Path, str] | None = None) -> Pending:
    """The whole of a member as one item, read when its turn comes."""
    return Pending(member.size, lambda: Item(parser, member.label, member.stem, _read(reading, member), twin))


def _read(reading: Reading, member: Member) -> bytes | None:
    """A member's bytes, counted as one member read; None, and a fault, where they cannot be had."""
    reading.report.members += 1
    try:
        with opened(reading, member) as stream:
            data = stream.read(LARGEST_ITEM_BYTES + 1)
            if len(data) <= LARGEST_ITEM_BYTES:
                stream.read(1)
    except READ_FAULTS as error:
        reading.fault(member.label, f"cannot be read ({error})")
        return None
    if not data:
        reading.fault(member.label, "is empty")
        return None
    if len(data) > LARGEST_ITEM_BYTES:
        reading.fault(member.label, f"is larger than {LARGEST_ITEM_BYTES >> 20} MB and was left out; cut it up")
        return None
    return data


def read_twin(reading: Reading, twin: tuple[Path, str]) -> Item:
    """The data of a member that an item names as its twin."""
    container, path = twin
    archive = _opened(container)
    if archive is None:
        member = Member(container, printable(container.name), "")
    else:
        member = next(member for member in archive_members(container, archive) if member.path == path)
    return Item("", member.label, member.stem, _read(reading, member))


@lru_cache(maxsize=2)
def _opened(path: Path) -> zipfile.ZipFile | None:
    return open_archive(path)
