"""A zip archive with the same bytes on every machine.

Members are stored, not deflated: deflate's output differs between builds of zlib. Names may be in cp949 without the
UTF-8 flag, as Korean Windows tools write them, which the standard library's writer cannot do.
"""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

_DATE, _TIME = (1 << 5) | 1, 0  # 1980-01-01, the earliest a zip can hold
_UTF8_FLAG = 0x800


def write_stored_zip(path: Path, members: list[tuple[str, bytes]], name_encoding: str = "utf-8") -> None:
    """Write the (name, data) members in order.

    Args:
        path: the archive; its folder is made.
        members: at most 65,535, smaller than 4 GiB in all.
        name_encoding: ``utf-8`` sets the flag that says so for names that need it, ``cp949`` leaves readers to guess.
    """
    assert len(members) < 1 << 16
    path.parent.mkdir(parents=True, exist_ok=True)
    directory = bytearray()
    with path.open("wb") as out:
        for name, data in members:
            raw = name.encode(name_encoding)
            flags = _UTF8_FLAG if name_encoding == "utf-8" and not name.isascii() else 0
            common = struct.pack(
                "<5H3I2H", 20, flags, 0, _TIME, _DATE, zlib.crc32(data), len(data), len(data), len(raw), 0
            )
            offset = out.tell()
            out.write(b"PK\x03\x04" + common + raw + data)
            # Made by Unix (3), an ordinary readable file.
            directory += b"PK\x01\x02" + struct.pack("<H", (3 << 8) | 20) + common
            directory += struct.pack("<3H2I", 0, 0, 0, 0o600 << 16, offset) + raw
        start = out.tell()
        out.write(directory)
        out.write(b"PK\x05\x06" + struct.pack("<4H2IH", 0, 0, len(members), len(members), len(directory), start, 0))
