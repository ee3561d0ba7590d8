"""One stream of tokens on its way to disk, with the bytes of text that each of its rows is credited with.

``<name>.bin`` holds the token ids of the stream, ``<name>.bytes`` a uint32 a row. A unit's bytes go to the row that
has the unit's last token as a target: a token may hold part of a Korean syllable, so bytes are never counted token
by token. Both files are only appended to, and hashed on the way.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from daramgpt.errors import UserError
from daramgpt.shards.encode import Encoded

CREDIT_DTYPE = np.dtype("<u4")


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """The smallest type that holds every token id."""
    return np.dtype("<u2") if vocab_size <= 2**16 else np.dtype("<u4")


def num_rows(num_stream_tokens: int, context_tokens: int) -> int:
    """Rows of a stream: its tokens but the first are targets, `context_tokens` a row."""
    return -(-max(0, num_stream_tokens - 1) // context_tokens)


@contextmanager
def disk_full_is_the_users(folder: Path) -> Iterator[None]:
    """A full disk, or a used-up quota, as `UserError`."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        raise UserError(
            f"no space left for token shards in {folder} ({error.strerror})",
            "free some, or use another folder with --run; the same command goes on after the last finished stage",
        ) from None


class HashedFile:
    """A file that is written once from its start; `size` and `sha256` say what it holds."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.size = 0
        self._hash = hashlib.sha256()
        self._file = path.open("wb")

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def close(self, durably: bool) -> None:
        try:
            if durably:
                self._file.flush()
                os.fsync(self._file.fileno())
        finally:
            self._file.close()


class StreamWriter:
    """Writes ``<name>.bin`` and ``<name>.bytes`` in a folder; a context manager.

    Args:
        eos_token_id: the stream's first token.

    Attributes:
        num_tokens: tokens of the stream without that first one: the number of targets.
        text_bytes: UTF-8 bytes of the units with their separators, all of them credited to rows.
        unit_bytes: the same without separators.
        num_units, num_texts, unknown_bytes: sums over what was appended.
    """

    def __init__(self, folder: Path, name: str, eos_token_id: int, vocab_size: int, context_tokens: int) -> None:
        self._context_tokens = context_tokens
        self._dtype = token_dtype(vocab_size)
        self._tokens = HashedFile(folder / f"{name}.bin")
        self._credits = HashedFile(folder / f"{name}.bytes")
        self._open_credits = np.zeros(1, dtype=np.int64)
        self._num_credited_rows = 0
        self.num_tokens = self.text_bytes = self.unit_bytes = self.unknown_bytes = 0
        self.num_units = self.num_texts = 0
        self._tokens.write(np.array([eos_token_id], dtype=self._dtype).tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._credits):
            file.close(durably=kind is None)

    @property
    def num_rows(self) -> int:
        return num_rows(self.num_tokens + 1, self._context_tokens)

    def append(self, encoded: Encoded) -> None:
        """Put the tokens of a batch behind those before."""
        self._tokens.write(encoded.token_ids.astype(self._dtype).tobytes())
        self._credit(encoded)
        self.num_tokens += len(encoded.token_ids)
        self.text_bytes += int(encoded.unit_bytes.sum())
        self.unit_bytes += int(encoded.unit_bytes.sum()) - encoded.num_separators
        self.num_units += len(encoded.unit_bytes)
        self.num_texts += encoded.num_texts
        self.unknown_bytes += encoded.unknown_bytes

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write what is left; the files by name, with size and hash."""
        credits = np.zeros(self.num_rows - self._num_credited_rows, dtype=np.int64)
        credits[: len(self._open_credits)] = self._open_credits[: len(credits)]
        self._credits.write(credits.astype(CREDIT_DTYPE).tobytes())
        files = (self._tokens, self._credits)
        return {file.path.name: {"bytes": file.size, "sha256": file.sha256} for file in files}

    def _credit(self, encoded: Encoded) -> None:
        # Target number t of the stream is its token t + 1. A unit without tokens of its own counts with the one before.
        last_targets: NDArray[np.int64] = np.maximum(self.num_tokens + encoded.unit_ends - 1, 0)
        rows = last_targets // self._context_tokens - self._num_credited_rows
        credits = np.bincount(rows, weights=encoded.unit_bytes, minlength=1).astype(np.int64)
        credits[0] += self._open_credits[0]
        # Only the last row met can still be credited by a later unit.
        self._credits.write(credits[:-1].astype(CREDIT_DTYPE).tobytes())
        self._num_credited_rows += len(credits) - 1
        self._open_credits = credits[-1:]
