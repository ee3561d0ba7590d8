"""What a corpus reader yields, and what it counts while reading."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field


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
        faults: ``"archive!member: what is wrong"`` lines for input that could not be read whole.
    """

    members: int = 0
    documents: int = 0
    cleaned: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)
