"""Korean corpora as users download them, read as a stream of clean documents in a fixed order.

``find`` says where a corpus is and of which format, ``blocks`` walks through its files, ``parse`` makes documents of a
block (in any process), ``Gathering`` puts the results together again: it counts, refuses repeats and enforces
strictness. ``read`` is all of that in one process. Nothing is extracted to disk and no archive is held in memory.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path

from daramgpt.corpora.csv_edition import parse_csv
from daramgpt.corpora.document import Document, ReadReport
from daramgpt.corpora.formats import FORMATS, Corpus, detect, find
from daramgpt.corpora.hub import hub_items, parse_texts
from daramgpt.corpora.plain import jsonl_items, parse_lines, parse_text, text_items
from daramgpt.corpora.reading import Block, Item, Pending, Reading, in_blocks
from daramgpt.corpora.repeats import RepeatTable, text_digest
from daramgpt.corpora.sentences import split_sentences
from daramgpt.corpora.unpublished import parse_sjml, unpublished_items
from daramgpt.corpora.web import parse_web, web_items
from daramgpt.corpora.wiki import parse_pages, parse_rows, wiki_items
from daramgpt.corpora.written import parse_written, written_items
from daramgpt.errors import UserError

__all__ = [
    "FORMATS",
    "Block",
    "Corpus",
    "Document",
    "Gathering",
    "ReadReport",
    "blocks",
    "detect",
    "find",
    "parse",
    "read",
    "split_sentences",
    "text_digest",
]

_WALKS: dict[str, Callable[[Reading, list[Path]], Iterator[Pending]]] = {
    "web": web_items,
    "written": written_items,
    "unpublished": unpublished_items,
    "wiki": wiki_items,
    "text": text_items,
    "jsonl": jsonl_items,
}
_PARSERS: dict[str, Callable[[Reading, Item], Iterator[Document]]] = {
    "web": parse_web,
    "written": parse_written,
    "csv": parse_csv,
    "sjml": parse_sjml,
    "pages": parse_pages,
    "rows": parse_rows,
    "text": parse_text,
    "lines": parse_lines,
    "texts": parse_texts,
}


def blocks(corpus: Corpus, skip: int = 0) -> Iterator[Block]:
    """The data of a corpus, in order; the last block is empty and carries what the walk noted at its end.

    Args:
        corpus: as `find` gives it.
        skip: so many blocks are passed over, which costs little more than walking.
    """
    reading = Reading(corpus.name)
    if corpus.hub is not None:
        return in_blocks(reading, hub_items(reading, corpus.hub), skip)
    return in_blocks(reading, _WALKS[corpus.format](reading, corpus.paths), skip)


def parse(block: Block) -> tuple[list[Document], ReadReport]:
    """Documents of a block, repeats included, and what the walk and the parser noted; a pure function."""
    reading = Reading(block.source)
    documents = [document for item in block.items for document in _PARSERS[item.parser](reading, item)]
    report = ReadReport()
    report.add(block.report)
    report.add(reading.report)
    return documents, report


class Gathering:
    """What one process must see of a corpus, in order: counts, repeats and, if strict, the first fault.

    Args:
        corpus: named in errors.
        strict: whether input that cannot be read whole is fatal.
        report: what was counted by an earlier gathering that this one goes on from.
        digests: of the documents that it kept, in order.

    Attributes:
        report: what has been counted so far; faults in the order of the corpus.
        digests: of documents kept since they were last taken away.
    """

    def __init__(
        self, corpus: Corpus, strict: bool = False, report: ReadReport | None = None, digests: Iterable[int] = ()
    ) -> None:
        self.report = report or ReadReport()
        self.digests = array("Q")
        self._corpus = corpus
        self._strict = strict
        self._digests_before = digests

    @cached_property
    def _repeats(self) -> RepeatTable:
        # Made when it is first asked: a corpus may be opened while the one before it still has its own.
        return RepeatTable(self._digests_before)

    def add(self, report: ReadReport) -> None:
        """Count what was noted of a block, before its documents are kept.

        Raises:
            UserError: strict, and something was at fault.
        """
        self.report.add(report)
        if self._strict and self.report.faults:
            raise UserError(self.report.faults[0], "mend or remove that file, or read without corpus.strict")

    def keep(self, digest: int) -> bool:
        """Whether the next document, of this `text_digest`, stays; not if its text came before."""
        if self._repeats.seen(digest):
            self.report.cleaned["repeated document dropped"] += 1
            return False
        self.report.documents += 1
        self.digests.append(digest)
        return True

    def end(self) -> None:
        """All has been read.

        Raises:
            UserError: there was nothing.
        """
        if not self.report.documents:
            faults = self.report.faults
            first = f"; the first of {len(faults)} faults: {faults[0]}" if faults else ""
            raise UserError(
                f"corpus {self._corpus.name!r} gave no text from {len(self._corpus.paths)} files{first}",
                f"check that they hold {self._corpus.format} data",
            )


def read(corpus: Corpus, report: ReadReport, strict: bool = False) -> Iterator[Document]:
    """Cleaned documents of one corpus, in the order of its files, by this process alone.

    Args:
        corpus: as `find` gives it.
        report: filled on the way; complete when the iterator is at its end.
        strict: whether input that cannot be read whole is fatal.

    Raises:
        UserError: nothing at all to read, or, if strict, the first fault.
    """
    gathering = Gathering(corpus, strict, report)
    for block in blocks(corpus):
        documents, noted = parse(block)
        gathering.add(noted)
        for document in documents:
            if gathering.keep(text_digest(document)):
                yield document
    gathering.end()
