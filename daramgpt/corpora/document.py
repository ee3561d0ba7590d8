"""What a corpus reader yields, and what it counts while reading."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

MOST_LINES = 20_000


@dataclass(frozen=True, slots=True)
class Document:
    """One text of a corpus.

    Attributes:
        source: name of the corpus, e.g. ``"wiki"``.
        id: stable identifier inside the corpus; the held-out part is chosen by its hash.
        paragraphs: the text. A paragraph is a tuple of pieces: one piece where the source gives whole
            paragraphs, several where it is already cut into sentences (AI-Hub's labelled edition).
            The pieces of a paragraph are joined by a space. No piece is empty or has outer white space.
    """

    source: str
    id: str
    paragraphs: tuple[tuple[str, ...], ...]


@dataclass(slots=True)
class ReadReport:
    """Counts of one corpus, filled while it is read.

    Attributes:
        members: files or archive members read.
        documents: documents yielded.
        cleaned: how often each cleaning rule acted, by rule name.
        faults: ``"archive!member: what is wrong"`` lines for input that could not be read whole, `MOST_LINES` at most.
        notes: lines of the same form for what was read whole and may still surprise, such as unbalanced markup.
    """

    members: int = 0
    documents: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """Plain data, from which `from_dict` makes an equal report."""
        return {name: getattr(self, name) for name in self.__slots__} | {"cleaned": dict(self.cleaned)}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> ReadReport:
        """The report that `as_dict` made this of."""
        return cls(**{**data, "cleaned": Counter(data["cleaned"])})

    def add(self, other: ReadReport) -> None:
        """Count in what another report has counted."""
        self.members += other.members
        self.documents += other.documents
        self.cleaned.update(other.cleaned)
        for lines, more in ((self.faults, other.faults), (self.notes, other.notes)):
            # A corpus that is rubbish throughout must not fill the memory with complaints.
            room = max(0, MOST_LINES - len(lines))
            lines += more[:room]
            if more[room:]:
                self.cleaned["fault or note beyond those listed"] += len(more) - room
