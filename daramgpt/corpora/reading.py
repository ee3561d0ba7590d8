"""The two halves of reading a corpus, and what they hand to each other.

First the files are walked in order, in one process: archives, streams, tables. That yields *items*, each of which can
be understood on its own (a file, a member of an archive, some pages, some lines), in *blocks* of about equal size.
Then a block is parsed to documents, which is a pure function of the block and most of the work, so any process may do
it. Whatever is counted or found at fault on the way is noted in a report that travels with the block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from daramgpt.corpora.document import Document, ReadReport

Paragraphs = list[tuple[str, ...]]

# Big enough that handing a block to another process costs little, small enough that many of them fit in memory.
BLOCK_BYTES = 1 << 18
# Nobody's document; a file beyond it would need several times its size in memory.
LARGEST_ITEM_BYTES = 1 << 28


@dataclass(frozen=True, slots=True)
class Item:
    """A piece of a corpus that is parsed on its own.

    Attributes:
        parser: which function understands it.
        label: how reports name it.
        id: its part of the ids of its documents.
        data: bytes, or rows of a table; None where it could not be read.
        twin: file and member that hold the same text in another edition, to be read if this one is faulty.
    """

    parser: str
    label: str
    id: str
    data: Any
    twin: tuple[Path, str] | None = None


@dataclass(frozen=True, slots=True)
class Block:
    """Items of a corpus that follow each other, and what the walk has noted since the block before."""

    source: str
    items: tuple[Item, ...]
    report: ReadReport


@dataclass(slots=True)
class Reading:
    """Where walking and parsing note what they met.

    Attributes:
        source: name of the corpus, copied into each document.
        report: what has been counted and noted.
    """

    source: str
    report: ReadReport = field(default_factory=ReadReport)

    def fault(self, label: str, what: str) -> None:
        """Note input that could not be read whole."""
        self.report.faults.append(f"{label}: {what}")

    def note(self, label: str, what: str) -> None:
        """Note something odd in input that was read whole."""
        self.report.notes.append(f"{label}: {what}")

    def pass_over(self, label: str, why: str) -> None:
        """Count and name a file that is not read, though nothing is wrong with it."""
        self.count(f"file passed over: {why}")
        self.note(label, f"passed over: {why}")

    def count(self, rule: str, times: int = 1) -> None:
        """Count what a cleaning rule did."""
        if times:
            self.report.cleaned[rule] += times

    def document(self, document_id: str, paragraphs: Paragraphs) -> Document | None:
        """The document, or None where nothing is left of it, which is counted."""
        if not paragraphs:
            self.count("empty document dropped")
            return None
        return Document(self.source, document_id, tuple(paragraphs))

    def take_report(self) -> ReadReport:
        """What was noted since this was last asked for."""
        report, self.report = self.report, ReadReport()
        return report


class Pending(NamedTuple):
    """An item whose data is still to be read; its size is known, so that blocks can be formed before.

    Attributes:
        size: bytes of its data.
        load: reads it, and notes where that is impossible.
    """

    size: int
    load: Callable[[], Item]


def in_blocks(reading: Reading, pending: Iterable[Pending], skip: int) -> Iterator[Block]:
    """Blocks of `BLOCK_BYTES` or a little more, which depend on nothing but the items; the last one holds no item.

    Args:
        skip: so many blocks are passed over without their data being read.
    """
    number, size, group = 0, 0, list[Pending]()
    for one in pending:
        group.append(one)
        size += one.size
        if size >= BLOCK_BYTES:
            if number >= skip:
                yield Block(reading.source, tuple([member.load() for member in group]), reading.take_report())
            else:
                reading.take_report()
            number, size, group = number + 1, 0, []
    for items in (group, []):
        if number >= skip:
            loaded = tuple([member.load() for member in items])
            yield Block(reading.source, loaded, reading.take_report())
        else:
            reading.take_report()
        number += 1
