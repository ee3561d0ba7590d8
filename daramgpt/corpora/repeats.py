"""Exact repeats across the documents of a corpus: of equal texts the first in reading order stays."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterable

from daramgpt.corpora.document import Document


def text_digest(document: Document) -> int:
    """64 bits of a hash of a document's text; never 0."""
    text = "\n".join([" ".join(pieces) for pieces in document.paragraphs])
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") or 1


class RepeatTable:
    """Remembers texts by their digests, in a table of fixed size.

    Open addressing with a bounded probe: while the table has room nothing is forgotten; once it is full
    the oldest guess at a slot gives way, so memory never grows and the worst outcome is a repeat kept.
    The default holds four million documents in 32 MB, more than any of the four corpora has.

    Args:
        digests: what has been seen already, in the order in which it was.
    """

    _PROBES = 16

    def __init__(self, digests: Iterable[int] = (), num_slots: int = 1 << 22) -> None:
        self._slots = array("Q", [0]) * num_slots
        for digest in digests:
            self.seen(digest)

    def seen(self, digest: int) -> bool:
        """Whether this digest came before; remembers it if not."""
        slots, size = self._slots, len(self._slots)
        for probe in range(self._PROBES):
            slot = (digest + probe) % size
            if slots[slot] == digest:
                return True
            if slots[slot] == 0:
                slots[slot] = digest
                return False
        slots[digest % size] = digest
        return False
