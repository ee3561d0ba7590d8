"""What can still be had from a bz2 file that was cut short or damaged.

``BZ2File`` behind a buffer drops up to a whole read before the place where it fails, and ends at the first damage,
or at junk between streams without a word. Here output is held until its block has passed its checksum. After damage
the blocks that follow are found by their 48-bit marks, which stand at any bit, and each is decompressed as a
stream of its own: damage costs the blocks it touches, in single-stream files too.
"""

from __future__ import annotations

import bz2
import io
from collections.abc import Iterator
from pathlib import Path
from typing import IO

_CHUNK_BYTES = 1 << 20


_INPUT_BYTES = 1 << 15
_BLOCK_MARK, _END_MARK = b"\x31\x41\x59\x26\x53\x59", b"\x17\x72\x45\x38\x50\x90"
_MARK_BITS = 48
# A block holds at most 900,000 bytes of runs, each five of which stand for up to 259; compressed, it hardly grows.
_LONGEST_BLOCK_BYTES = 900_000 // 5 * 259
_LONGEST_COMPRESSED_BLOCK_BYTES = 1 << 20


class SalvagedBZ2(io.BufferedReader):
    """The text of a bz2 file, of one stream or many, as far as its blocks are whole. Reading never fails on damage.

    Not seekable. What was wrong is known when the stream is at its end. Junk behind the last stream is no damage.

    Args:
        path: the bz2 file.

    Raises:
        OSError: the file cannot be read.
    """

    def __init__(self, path: Path) -> None:
        self._blocks = _Blocks(path.open("rb"))
        super().__init__(self._blocks, _CHUNK_BYTES)

    @property
    def cut(self) -> bool:
        """Whether the file ended inside a stream."""
        return self._blocks.cut

    @property
    def num_damaged(self) -> int:
        """Number of damaged places (blocks, marks or checksums) passed over, at least."""
        return self._blocks.num_damaged

    @property
    def fault(self) -> str | None:
        """What was wrong, for a report; None if nothing was."""
        damage = f"damage passed over in {self.num_damaged} places of the bz2 file" if self.num_damaged else ""
        return " and ".join(filter(None, (damage, "it is cut short" if self.cut else ""))) or None


class _Blocks(io.RawIOBase):
    """The decompressed blocks of a file that have passed their checksums, as a stream."""

    def __init__(self, file: IO[bytes]) -> None:
        super().__init__()
        self._file = file
        self._pieces = self._streams()
        self._piece = memoryview(b"")
        self.cut = False
        self.num_damaged = 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        while not self._piece:
            if (piece := next(self._pieces, None)) is None:
                return 0
            self._piece = memoryview(piece)
        num_bytes = min(len(buffer), len(self._piece))
        buffer[:num_bytes] = self._piece[:num_bytes]
        self._piece = self._piece[num_bytes:]
        return num_bytes

    def close(self) -> None:
        if not self.closed:
            self._file.close()
        super().close()

    def _streams(self) -> Iterator[bytes]:
        """Blocks in order while nothing is wrong; from the first damage on, those that can be found."""
        verified_bytes = 0  # all blocks that end before this place of the file have been given out
        data = b""
        while data := data or self._file.read(_INPUT_BYTES):
            stream_start = self._file.tell() - len(data)
            decompressor = bz2.BZ2Decompressor()
            while not decompressor.eof:
                if not data:
                    self.cut = True
                    return
                held: list[bytes] = []
                num_held_bytes = 0
                try:
                    # Once it has nothing more to give, every block that ended in the input has been checked.
                    while piece := decompressor.decompress(data, _CHUNK_BYTES):
                        data = b""
                        held.append(piece)
                        num_held_bytes += len(piece)
                        if num_held_bytes > 2 * _LONGEST_BLOCK_BYTES:
                            # Only runs of one byte grow so; what is older than the longest block has been checked.
                            verified_bytes = self._file.tell()
                            while num_held_bytes > _LONGEST_BLOCK_BYTES + _CHUNK_BYTES:
                                num_held_bytes -= len(held[0])
                                yield held.pop(0)
                        if decompressor.eof:
                            break
                except OSError:
                    is_stream = _read_at(self._file, stream_start, 3) == b"BZh" or not stream_start
                    yield from self._rescued(verified_bytes, is_stream)
                    return
                yield from held
                verified_bytes = self._file.tell()
                data = b"" if decompressor.eof else self._file.read(_INPUT_BYTES)
            data = decompressor.unused_data
            verified_bytes -= len(data)

    def _rescued(self, verified_bytes: int, is_stream: bool) -> Iterator[bytes]:
        """The whole blocks that do not end before ``verified_bytes``, found by their marks."""
        num_damaged = 0
        start: int | None = None
        for mark_bit, is_block in self._marks(max(0, verified_bytes - _LONGEST_COMPRESSED_BLOCK_BYTES)):
            if start is not None and mark_bit > 8 * verified_bytes:
                # Junk behind the last stream has no block in it.
                is_stream = True
                if block := self._block(start, mark_bit):
                    yield block
                else:
                    num_damaged += 1
            start = mark_bit if is_block else None
        self.cut = start is not None
        if is_stream or self.cut:
            self.num_damaged = max(1, num_damaged)

    def _marks(self, start_bytes: int) -> Iterator[tuple[int, bool]]:
        """Bit offsets of the marks from a place of the file on, and whether each begins a block or ends a stream."""
        last_bit = -1
        rest = b""
        while True:
            self._file.seek(start_bytes + len(rest))
            chunk = self._file.read(_CHUNK_BYTES)
            if not chunk:
                return
            window = rest + chunk
            number = int.from_bytes(window, "big")
            found = []
            for shift in range(8):
                shifted = (number >> shift).to_bytes(len(window), "big")
                for mark in (_BLOCK_MARK, _END_MARK):
                    at = -1
                    while (at := shifted.find(mark, at + 1)) >= 0:
                        found.append((8 * (start_bytes + at) - shift, mark is _BLOCK_MARK))
            for bit, is_block in sorted(found):
                if bit > last_bit:
                    last_bit = bit
                    yield bit, is_block
            rest = window[-(_MARK_BITS // 8) :]
            start_bytes += len(window) - len(rest)

    def _block(self, start_bit: int, end_bit: int) -> bytes:
        """The text of the block between two bits of the file; empty if it is damaged."""
        num_bits = end_bit - start_bit
        if num_bits > 8 * _LONGEST_COMPRESSED_BLOCK_BYTES:
            return b""
        data = _read_at(self._file, start_bit // 8, (end_bit + 7) // 8 - start_bit // 8)
        block = (int.from_bytes(data, "big") >> (-end_bit % 8)) & ((1 << num_bits) - 1)
        # The checksum of a stream of one block is that of the block, which stands behind the block's mark.
        checksum = (block >> (num_bits - _MARK_BITS - 32)) & 0xFFFFFFFF
        stream = (block << _MARK_BITS | int.from_bytes(_END_MARK, "big")) << 32 | checksum
        padding = -(num_bits + _MARK_BITS + 32) % 8
        num_bytes = (num_bits + _MARK_BITS + 32 + padding) // 8
        try:
            return bz2.decompress(b"BZh9" + (stream << padding).to_bytes(num_bytes, "big"))
        except (OSError, ValueError):
            return b""


def _read_at(file: IO[bytes], offset: int, num_bytes: int) -> bytes:
    file.seek(offset)
    return file.read(num_bytes)
