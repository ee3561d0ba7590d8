"""What can still be had from a zip archive that was cut short or damaged.

A download that was interrupted leaves an archive without its directory, which stands at the end, though nearly all of
the text is there. The local headers are walked from the start, over the data by seeking wherever sizes are known, and
a directory is made from them. ``zipfile`` reads the archive through a view that puts this directory behind the whole
members, so encryption, methods and checksums are handled as in any other archive.
"""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from dataclasses import dataclass, field
from typing import IO

from daramgpt.corpora.seekable import SeekableView

_CHUNK_BYTES = 1 << 20

_LOCAL = struct.Struct("<4s5H3L2H")
_CENTRAL = struct.Struct("<4s6H3L5H2L")
_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_END64_LOCATOR = struct.Struct("<4sLQL")
_LOCAL_MARK, _DESCRIPTOR_MARK = b"PK\x03\x04", b"PK\x07\x08"
# What may follow a member: another, the directory, or one of the records that stand around the directory.
_NEXT_MARKS = (_LOCAL_MARK, b"PK\x01\x02", b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x08")
_DESCRIPTORS = tuple(struct.Struct(layout) for layout in ("<4s3L", "<4sL2Q", "<3L", "<L2Q"))
_SIZES_FOLLOW, _UTF8, _ENCRYPTED = 0x8, 0x800, 0x1
_ZIP64_TAG, _IN_ZIP64 = 1, 0xFFFFFFFF


@dataclass(slots=True)
class RecoveredDirectory:
    """What the local headers of an archive tell.

    Attributes:
        members: the members whose data is whole, in the archive's order. Names are decoded as ``zipfile`` does.
        lost: members that begin in the file and do not end in it, or whose data cannot be followed.
        end_bytes: where the last whole member ends.
    """

    members: list[zipfile.ZipInfo] = field(default_factory=list)
    lost: list[zipfile.ZipInfo] = field(default_factory=list)
    end_bytes: int = 0


class SalvagedArchive(zipfile.ZipFile):
    """A zip archive read by its local headers, for files whose directory is missing; used as any ``ZipFile``.

    Reading members with streamed sizes (flag bit 3) costs one pass of inflating at opening; all others are
    skipped by a seek.

    Args:
        file: a seekable binary file, which belongs to the archive from here on.

    Attributes:
        lost: the members that could not be had, in order; an interrupted download has one, or none.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, file: IO[bytes]) -> None:
        directory = recover_directory(file)
        self.lost = directory.lost
        super().__init__(io.BufferedReader(_WithDirectory(file, directory)))


def recover_directory(file: IO[bytes]) -> RecoveredDirectory:
    """The members of a zip archive by its local headers alone.

    Args:
        file: a seekable binary file that begins with a local header.

    Raises:
        OSError: the file cannot be read.
    """
    directory = RecoveredDirectory()
    size_bytes = file.seek(0, io.SEEK_END)
    start: int | None = 0
    while start is not None and (mark := _read_at(file, start, 4)):
        if mark != _LOCAL_MARK:
            start = None if mark in _NEXT_MARKS else _find(file, start, _LOCAL_MARK)
            continue
        info, data_start = _local_header(file, start)
        try:
            end = _member_end(file, info, data_start)
        except zlib.error:
            # Damage, not a cut: what comes after it may be whole.
            directory.lost.append(info)
            start = _find(file, data_start, _LOCAL_MARK)
            continue
        if end is None or end > size_bytes:
            info.filename = info.filename or "(a name that was cut off)"
            directory.lost.append(info)
            break
        directory.members.append(info)
        directory.end_bytes = start = end
    return directory


def _read_at(file: IO[bytes], offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)


def _find(file: IO[bytes], start: int, mark: bytes) -> int | None:
    """Offset of the first ``mark`` at or after ``start``; None if there is none."""
    file.seek(start)
    rest = b""
    while chunk := file.read(_CHUNK_BYTES):
        window = rest + chunk
        if (at := window.find(mark)) >= 0:
            return start - len(rest) + at
        start += len(chunk)
        rest = window[1 - len(mark) :]
    return None


def _local_header(file: IO[bytes], start: int) -> tuple[zipfile.ZipInfo, int]:
    """The entry that a local header describes, and where its data starts (past the file's end if the cut is here)."""
    header = _read_at(file, start, _LOCAL.size)
    fields = _LOCAL.unpack(header.ljust(_LOCAL.size, b"\0"))
    _, version, flags, method, _, _, crc, compress_size, file_size, name_length, extra_length = fields
    raw_name, extra = file.read(name_length), file.read(extra_length)
    try:
        name = raw_name.decode("utf-8" if flags & _UTF8 else "cp437")
    except UnicodeDecodeError:
        # zipfile refuses this member when it is opened; here it must not refuse all the others.
        flags &= ~_UTF8
        name = raw_name.decode("cp437")
    info = zipfile.ZipInfo(name)
    info.flag_bits, info.compress_type, info.extract_version = flags, method, version
    info.CRC, info.compress_size, info.file_size = crc, compress_size, file_size
    _apply_zip64(info, extra)
    info.header_offset = start
    return info, start + _LOCAL.size + name_length + extra_length


def _apply_zip64(info: zipfile.ZipInfo, extra: bytes) -> None:
    while len(extra) >= 4:
        tag, length = struct.unpack_from("<2H", extra)
        data, extra = extra[4 : 4 + length], extra[4 + length :]
        sizes = list(struct.unpack_from(f"<{len(data) // 8}Q", data)) if tag == _ZIP64_TAG else []
        if sizes and info.file_size == _IN_ZIP64:
            info.file_size = sizes.pop(0)
        if sizes and info.compress_size == _IN_ZIP64:
            info.compress_size = sizes.pop(0)


def _member_end(file: IO[bytes], info: zipfile.ZipInfo, data_start: int) -> int | None:
    """Where a member ends; None, or a place behind the file's end, if it is cut.

    Fills in the sizes and the checksum of ``info`` where only a descriptor behind the data has them.

    Raises:
        zlib.error: the data must be inflated to find its end, and is damaged.
    """
    if not info.flag_bits & _SIZES_FOLLOW:
        return data_start + info.compress_size
    if info.compress_size in (0, _IN_ZIP64):
        is_plain_deflate = info.compress_type == zipfile.ZIP_DEFLATED and not info.flag_bits & _ENCRYPTED
        if not (_inflate_sizes if is_plain_deflate else _search_sizes)(file, info, data_start):
            # Some writers set the flag for folders too, and write no descriptor.
            is_empty = info.filename.endswith("/") and _read_at(file, data_start, 4) in _NEXT_MARKS
            return data_start if is_empty else None
    data_end = data_start + info.compress_size
    return data_end + _descriptor(file, info, data_end)


def _inflate_sizes(file: IO[bytes], info: zipfile.ZipInfo, start: int) -> bool:
    """Sizes and checksum of a deflated member by inflating it, in bounded memory; False if it is cut."""
    file.seek(start)
    inflater = zlib.decompressobj(-zlib.MAX_WBITS)
    num_read, file_size, crc = 0, 0, 0
    while not inflater.eof:
        chunk = inflater.unconsumed_tail
        if not chunk:
            chunk = file.read(_CHUNK_BYTES)
            num_read += len(chunk)
        text = inflater.decompress(chunk, _CHUNK_BYTES)
        if not chunk and not text:
            return False
        file_size += len(text)
        crc = zlib.crc32(text, crc)
    info.CRC, info.file_size = crc, file_size
    info.compress_size = num_read - len(inflater.unused_data)
    return True


def _search_sizes(file: IO[bytes], info: zipfile.ZipInfo, start: int) -> bool:
    """Sizes of a member by the first descriptor that states its own distance; False if there is none."""
    at = _find(file, start, _DESCRIPTOR_MARK)
    while at is not None:
        info.compress_size = at - start
        if _descriptor(file, info, at):
            return True
        at = _find(file, at + 1, _DESCRIPTOR_MARK)
    info.compress_size = 0
    return False


def _descriptor(file: IO[bytes], info: zipfile.ZipInfo, offset: int) -> int:
    """Length of the descriptor at ``offset`` that belongs to ``info`` (its checksum and size are taken), else 0."""
    data = _read_at(file, offset, 4 + max(layout.size for layout in _DESCRIPTORS))
    for layout in _DESCRIPTORS:
        if len(data) >= layout.size:
            *mark, crc, compress_size, file_size = layout.unpack_from(data)
            # Only what follows tells 32-bit sizes from 64-bit ones; it may be cut, even to nothing.
            next_mark = data[layout.size : layout.size + 4]
            is_followed = any(known.startswith(next_mark) for known in _NEXT_MARKS)
            if mark in ([], [_DESCRIPTOR_MARK]) and compress_size == info.compress_size and is_followed:
                info.CRC, info.file_size = crc, file_size
                return layout.size
    return 0


def _central_directory(directory: RecoveredDirectory) -> bytes:
    """The directory in its format on disk, to stand at ``directory.end_bytes``."""
    records = []
    for info in directory.members:
        name = info.orig_filename.encode("utf-8" if info.flag_bits & _UTF8 else "cp437")
        extra = struct.pack("<2H3Q", _ZIP64_TAG, 24, info.file_size, info.compress_size, info.header_offset)
        # A version above what zipfile knows would make it refuse all members; the method tells what it cannot read.
        fixed = (b"PK\x01\x02", 45, 45, info.flag_bits, info.compress_type, 0, 0, info.CRC, _IN_ZIP64, _IN_ZIP64)
        records.append(_CENTRAL.pack(*fixed, len(name), len(extra), 0, 0, 0, 0, _IN_ZIP64) + name + extra)
    data = b"".join(records)
    start, count = directory.end_bytes, len(records)
    end64 = _END64.pack(b"PK\x06\x06", _END64.size - 12, 45, 45, 0, 0, count, count, len(data), start)
    locator = _END64_LOCATOR.pack(b"PK\x06\x07", 0, start + len(data), 1)
    return data + end64 + locator + _END.pack(b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, _IN_ZIP64, _IN_ZIP64, 0)


class _WithDirectory(SeekableView):
    """A file's bytes up to the end of its last whole member, with the recovered directory behind them."""

    def __init__(self, file: IO[bytes], directory: RecoveredDirectory) -> None:
        self._file = file
        self._file_bytes = directory.end_bytes
        self._tail = _central_directory(directory)
        super().__init__(self._file_bytes + len(self._tail))

    def read_at(self, position: int, num_bytes: int) -> bytes:
        left_bytes = self._file_bytes - position
        if left_bytes > 0:
            return _read_at(self._file, position, min(num_bytes, left_bytes))
        return self._tail[-left_bytes : -left_bytes + num_bytes]

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()
