"""Documents cut into units, sentences or paragraphs, each with the separator before it."""

from __future__ import annotations

from dataclasses import dataclass

from daramgpt import corpora
from daramgpt.corpora import Document
from daramgpt.corpora.kiwi import split_sentences_kiwi

# Far beyond any sentence or paragraph: what is longer is cut at white space, lest a tokenizer be given a whole book.
LONGEST_UNIT_CHARACTERS = 50_000

SPLITTERS = {"rules": corpora.split_sentences, "kiwi": split_sentences_kiwi}


def cut(document: Document, unit: str, splitter: str = "rules") -> list[str]:
    """Units of a document, each with the separator before it: nothing before the first, a line feed before the first
    of a paragraph, else a space. Joined by nothing they are the text.

    Args:
        unit: ``"sentence"`` or ``"paragraph"``.
        splitter: a name in `SPLITTERS`.
    """
    units: list[str] = []
    split = SPLITTERS[splitter]
    for paragraph in document.paragraphs:
        if unit == "paragraph":
            parts = [" ".join(paragraph)]
        else:
            parts = [sentence for piece in paragraph for sentence in split(piece)]
        separator = "\n" if units else ""
        for part in parts:
            units.append(separator + part)
            if len(part) > LONGEST_UNIT_CHARACTERS:
                units[-1:] = _cut_long(units[-1])
            separator = " "
    return units


def _cut_long(unit: str) -> list[str]:
    """A unit in parts that each but the first begin with the space that they were cut at, where there is one."""
    parts = []
    start = 0
    while len(unit) - start > LONGEST_UNIT_CHARACTERS:
        end = unit.rfind(" ", start + 1, start + LONGEST_UNIT_CHARACTERS)
        end = end if end > 0 else start + LONGEST_UNIT_CHARACTERS
        parts.append(unit[start:end])
        start = end
    return [*parts, unit[start:]]


def separator_bytes(unit: str) -> int:
    """Bytes of the separator that a unit begins with: 0 or 1."""
    return int(unit[0] in " \n")


@dataclass(frozen=True, slots=True)
class TextUnits:
    """`Units` as text; each with its separator, as `cut` gives them."""

    texts: tuple[str, ...]

    @property
    def unit_bytes(self) -> list[int]:
        return [len(text.encode()) - separator_bytes(text) for text in self.texts]

    @property
    def num_bytes(self) -> int:
        return sum(self.unit_bytes)

    def first(self, num_units: int) -> TextUnits:
        return TextUnits(self.texts[:num_units])


class TextDocument:
    """A `Readable` that is read, cut and used as text.

    Args:
        splitter: of sentences, a name in `SPLITTERS`.
    """

    def __init__(self, document: Document, splitter: str = "rules") -> None:
        self.source, self.id = document.source, document.id
        self.text_bytes = document_bytes(document)
        self._document, self._splitter = document, splitter

    def cut(self, unit: str) -> TextUnits:
        return TextUnits(tuple(cut(self._document, unit, self._splitter)))

    def rest(self, unit: str, num_units: int) -> TextDocument:
        return TextDocument(rest_of(self._document, unit, num_units, self._splitter), self._splitter)


def document_bytes(document: Document) -> int:
    """UTF-8 bytes of a document's pieces."""
    return sum(len(piece.encode()) for paragraph in document.paragraphs for piece in paragraph)


def rest_of(document: Document, unit: str, num_units: int, splitter: str) -> Document:
    """What is left of a document when a stage has taken its first units."""
    paragraphs: list[list[str]] = []
    for text in cut(document, unit, splitter)[num_units:]:
        if text[0] == "\n" or not paragraphs:
            paragraphs.append([])
        paragraphs[-1].append(text[separator_bytes(text) :])
    return Document(document.source, document.id, tuple(tuple(pieces) for pieces in paragraphs))
