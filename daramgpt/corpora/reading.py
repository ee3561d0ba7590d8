"""The running state of one read: which corpus it is, what it counts, and whether bad input is fatal."""

from __future__ import annotations

import hashlib
from array import array
from dataclasses import dataclass, field

from daramgpt.corpora.document import Document, ReadReport
from daramgpt.errors import UserError

Paragraphs = list[tuple[str, ...]]


class RepeatTable:
    """Remembers documents by a 64-bit digest of their text, in a table of fixed size.

    Open addressing with a bounded probe: while the table has room nothing is forgotten; once it is full
    the oldest guess at a slot gives way, so memory never grows and the worst outcome is a repeat kept.
    The default holds four million documents in 32 MB, more than any of the four corpora has.
    """

    _PROBES = 16

    def __init__(self, num_slots: int = 1 << 22) -> None:
        self._slots = array("Q", [0]) * num_slots

    def seen(self, paragraphs: Paragraphs) -> bool:
        """Whether this text came before; remembers it if not."""
        text = "\n".join(" ".join(pieces) for pieces in paragraphs).encode("utf-8")
        digest = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little") or 1
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


@dataclass(slots=True)
class Reading:
    """One read of one corpus.

    Attributes:
        source: name of the corpus, copied into each document.
        report: what is counted and noted on the way.
        strict: whether a fault in the input ends the read.
    """

    source: str
    report: ReadReport
    strict: bool = False
    _repeats: RepeatTable = field(default_factory=RepeatTable)

    def fault(self, label: str, what: str) -> None:
        """Note input that could not be read whole.

        Raises:
            UserError: if the read is strict.
        """
        line = f"{label}: {what}"
        if self.strict:
            raise UserError(line, "mend or remove that file, or read without strict")
        self.report.faults.append(line)

    def count(self, rule: str, times: int = 1) -> None:
        """Count what a cleaning rule did."""
        if times:
            self.report.cleaned[rule] += times

    def document(self, document_id: str, paragraphs: Paragraphs) -> Document | None:
        """The document, or None where nothing is left of it or the same text came before (both counted)."""
        if not paragraphs:
            self.count("empty document dropped")
            return None
        if self._repeats.seen(paragraphs):
            self.count("repeated document dropped")
            return None
        self.report.documents += 1
        return Document(self.source, document_id, tuple(paragraphs))
