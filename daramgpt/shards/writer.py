"""One stream of tokens on its way to disk, with the bytes of text that each of its rows is credited with.

``<name>.bin`` holds the token ids of the stream, ``<name>.bytes`` a uint32 a row. A unit's bytes go to the row that
has the unit's last token as a target: a token may hold part of a Korean syllable, so bytes are never counted token
by token. Both files are only appended to, and hashed on the way.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from daramgpt.errors import UserError
from daramgpt.shards.encoded import Encoded, token_dtype

CREDIT_DTYPE = np.dtype("<u4")
_READ_BYTES = 1 << 20
_TOKENS_AT_A_TIME = 1 << 18


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
    """A file that is written from its start to its end, in one go or several; says what it holds.

    Args:
        path: of the file.
        size: bytes that it holds from before; what lies beyond them is cut off.

    Raises:
        UserError: it holds less than that.
    """

    def __init__(self, path: Path, size: int = 0) -> None:
        self.path = path
        self.size = size
        self._hash = hashlib.sha256()
        self._file = path.open("r+b" if size else "wb")
        if size:
            left = size
            while left:
                if not (data := self._file.read(min(left, _READ_BYTES))):
                    self._file.close()
                    raise UserError(f"{path} is shorter than it was", f"remove {path.parent} and prepare again")
                self._hash.update(data)
                left -= len(data)
            self._file.truncate(size)

    def write(self, data: bytes) -> None:
        self._file.write(data)
        self._hash.update(data)
        self.size += len(data)

    def sync(self) -> None:
        """What has been written survives the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())

    def description(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self._hash.hexdigest()}

    def close(self) -> None:
        self._file.close()


class StreamWriter:
    """Writes ``<name>.bin`` and ``<name>.bytes`` in a folder; a context manager.

    Args:
        eos_token_id: the stream's first token, and the one after each text.
        state: of an earlier writer of the same stream, from `save`; this one goes on after it.

    Attributes:
        counts: num_tokens (of the stream without its first token: the number of targets), text_bytes (UTF-8 of the
            units with their separators, all of them credited to rows), unit_bytes (without separators),
            unknown_bytes, num_units, num_texts.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        eos_token_id: int,
        vocab_size: int,
        context_tokens: int,
        state: dict[str, Any] | None = None,
    ) -> None:
        self._context_tokens = context_tokens
        self._dtype = token_dtype(vocab_size)
        self._eos = np.array([eos_token_id], dtype=self._dtype)
        self._pending: list[Encoded] = []
        self._num_pending_tokens = 0
        state = state or {"tokens": 0, "credits": 0, "open_credit": 0, "counts": {}}
        self._tokens = HashedFile(folder / f"{name}.bin", state["tokens"])
        self._credits = HashedFile(folder / f"{name}.bytes", state["credits"])
        # Of the last row met, which later units may still add to.
        self._open_credit: int = state["open_credit"]
        self.counts = Counter(state["counts"])
        if not self._tokens.size:
            self._tokens.write(self._eos.tobytes())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._tokens, self._credits):
            file.close()

    @property
    def num_rows(self) -> int:
        return num_rows(self.counts["num_tokens"] + 1, self._context_tokens)

    def append(self, text: Encoded) -> None:
        """Put a text behind those before, and an EOS after it; it is held until enough of them are written at once."""
        self._pending.append(text)
        self._num_pending_tokens += len(text.token_ids)
        if self._num_pending_tokens >= _TOKENS_AT_A_TIME:
            self._write_pending()

    def save(self) -> dict[str, Any]:
        """Write and sync what was appended; what a writer needs to go on from here."""
        self._write_pending()
        for file in (self._tokens, self._credits):
            file.sync()
        return {
            "tokens": self._tokens.size,
            "credits": self._credits.size,
            "open_credit": self._open_credit,
            "counts": dict(self.counts),
        }

    def finish(self) -> dict[str, dict[str, Any]]:
        """Write and sync what is left; the files by name, with size and hash."""
        self._write_pending()
        credits = np.zeros(self.num_rows - self._credits.size // CREDIT_DTYPE.itemsize, dtype=CREDIT_DTYPE)
        credits[:1] = self._open_credit
        self._credits.write(credits.tobytes())
        for file in (self._tokens, self._credits):
            file.sync()
        return {file.path.name: file.description() for file in (self._tokens, self._credits)}

    def _write_pending(self) -> None:
        if not self._pending:
            return
        texts, self._pending, self._num_pending_tokens = self._pending, [], 0
        stream = np.concatenate([part for text in texts for part in (text.token_ids, self._eos)], dtype=self._dtype)
        # Up to the end of each unit; the EOS of the texts before are among them, that of its own is not.
        tokens_before = np.cumsum(np.concatenate([text.unit_tokens for text in texts]), dtype=np.int64)
        tokens_before += np.repeat(np.arange(len(texts)), [len(text.unit_tokens) for text in texts])
        text_bytes = np.concatenate([text.text_bytes for text in texts])
        self._tokens.write(stream.tobytes())
        self._credit(tokens_before, text_bytes)
        self.counts.update(
            num_tokens=len(stream),
            text_bytes=int(text_bytes.sum(dtype=np.int64)),
            unit_bytes=int(np.concatenate([text.unit_bytes for text in texts]).sum(dtype=np.int64)),
            unknown_bytes=int(np.concatenate([text.unknown_bytes for text in texts]).sum(dtype=np.int64)),
            num_units=len(text_bytes),
            num_texts=len(texts),
        )

    def _credit(self, tokens_before: NDArray[np.int64], text_bytes: NDArray[np.uint32]) -> None:
        # Target number t of the stream is its token t + 1. A unit without tokens of its own counts with the one before.
        last_targets: NDArray[np.int64] = np.maximum(self.counts["num_tokens"] + tokens_before - 1, 0)
        rows = last_targets // self._context_tokens - self._credits.size // CREDIT_DTYPE.itemsize
        credits = np.bincount(rows, weights=text_bytes, minlength=1).astype(np.int64)
        credits[0] += self._open_credit
        # Only the last row met can still be credited by a later unit.
        self._credits.write(credits[:-1].astype(CREDIT_DTYPE).tobytes())
        self._open_credit = int(credits[-1])
