"""Korean corpora as users download them, read as a stream of clean documents in a fixed order.

``locate`` finds the files, ``detect`` says what a file is, ``read`` streams documents, ``split_sentences`` cuts
paragraphs. Nothing is extracted to disk and no archive is held in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from daramgpt.corpora.document import Document, ReadReport
from daramgpt.corpora.formats import FORMATS, detect, locate
from daramgpt.corpora.plain import read_jsonl, read_text
from daramgpt.corpora.reading import Reading
from daramgpt.corpora.sentences import split_sentences
from daramgpt.corpora.unpublished import read_unpublished
from daramgpt.corpora.web import read_web
from daramgpt.corpora.wiki import read_wiki
from daramgpt.corpora.written import read_written
from daramgpt.errors import UserError

__all__ = ["FORMATS", "Document", "ReadReport", "detect", "locate", "read", "split_sentences"]

_READERS: dict[str, Callable[[Reading, list[Path]], Iterator[Document]]] = {
    "web": read_web,
    "written": read_written,
    "unpublished": read_unpublished,
    "wiki": read_wiki,
    "text": read_text,
    "jsonl": read_jsonl,
}


def read(name: str, format: str, paths: list[Path], report: ReadReport, strict: bool = False) -> Iterator[Document]:
    """Cleaned documents of one corpus, in the order of its files.

    Args:
        name: the corpus's name, which becomes ``Document.source``.
        format: one of ``FORMATS``.
        paths: its files, as ``locate`` gives them.
        report: filled on the way; complete when the iterator is at its end.
        strict: whether input that cannot be read whole is fatal.

    Raises:
        UserError: an unknown format, nothing at all to read, or, if strict, the first fault.
    """
    if format not in _READERS:
        raise UserError(f"unknown corpus format {format!r}", f"choose one of {', '.join(FORMATS)}")
    yield from _READERS[format](Reading(name, report, strict), paths)
    if not report.documents:
        first = f"; the first of {len(report.faults)} faults: {report.faults[0]}" if report.faults else ""
        raise UserError(
            f"corpus {name!r} gave no text from {len(paths)} files{first}", f"check that they hold {format} data"
        )
