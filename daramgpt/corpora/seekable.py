"""What lies in pieces, on disk or in memory, as one seekable file."""

from __future__ import annotations

import io
from abc import abstractmethod
from pathlib import Path


class SeekableView(io.RawIOBase):
    """A readable, seekable file of known size over bytes that are kept some other way.

    Args:
        size: bytes of the whole.
    """

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self._position = 0

    @abstractmethod
    def read_at(self, position: int, num_bytes: int) -> bytes:
        """Bytes from a position before the end: at least one, at most `num_bytes`."""

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._size}[whence]
        if base + offset < 0:
            raise OSError(f"negative position {base + offset}")
        self._position = base + offset
        return self._position

    def tell(self) -> int:
        return self._position

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        data = self.read_at(self._position, len(buffer)) if self._position < self._size else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


class JoinedFile(SeekableView):
    """The parts of a split file as one."""

    def __init__(self, parts: list[Path]) -> None:
        self._files = [part.open("rb") for part in parts]
        self._starts = [0]
        for part in parts:
            self._starts.append(self._starts[-1] + part.stat().st_size)
        super().__init__(self._starts[-1])

    def read_at(self, position: int, num_bytes: int) -> bytes:
        for file, start, end in zip(self._files, self._starts, self._starts[1:], strict=False):
            if start <= position < end:
                file.seek(position - start)
                return file.read(min(num_bytes, end - position))
        raise AssertionError(position)

    def close(self) -> None:
        for file in self._files:
            file.close()
        super().close()
