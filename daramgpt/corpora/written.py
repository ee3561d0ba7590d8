"""NIKL written corpus: one JSON file a book, one or more documents in it, whole paragraphs; and the CSV edition."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from daramgpt.corpora.cleaning import clean, load_json
from daramgpt.corpora.csv_edition import nikl_items
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Item, Paragraphs, Pending, Reading

_EDITORIAL = re.compile(r"\[\*[^\[\]]{0,200}\]")
# `01범보다`, but not `02월 3일`, whose number is text.
_GLUED = re.compile(r"(\d{2,3})(?=[^\W\d_])(?![월일시년호분초세장절조항](?:[\s\d]|$))")


def written_items(reading: Reading, paths: list[Path]) -> Iterator[Pending]:
    """Books, and the rows of tables."""
    return nikl_items(reading, paths, "written", (".json",), "doc_id")


def parse_written(reading: Reading, item: Item) -> Iterator[Document]:
    """Documents of a book; ids are those of the source, such as ``WARW1900000001.1``."""
    if item.data is None or (book := load_json(reading, item.label, item.data)) is None:
        return
    documents = book.get("document") if isinstance(book, dict) else None
    if not isinstance(documents, list):
        reading.fault(item.label, "holds no list `document`")
        return
    for index, entry in enumerate(documents, 1):
        if not isinstance(entry, dict) or not isinstance(entry.get("paragraph"), list):
            reading.fault(item.label, f"document {index} holds no list `paragraph`")
            continue
        document_id = str(entry.get("id") or f"{item.id}.{index}")
        if document := reading.document(document_id, _paragraphs(reading, entry["paragraph"])):
            yield document


def _paragraphs(reading: Reading, entries: Iterable[Any]) -> Paragraphs:
    paragraphs: Paragraphs = []
    heading_number = 0
    for entry in entries:
        form = entry.get("form") if isinstance(entry, dict) else None
        text = form if isinstance(form, str) else ""
        if "\\" in text and (num_escapes := text.count("\\n") + text.count("\\r")):
            text = text.replace("\\r", " ").replace("\\n", " ")
            reading.count("literal \\n removed", num_escapes)
        if "[*" in text:
            text, num_marks = _EDITORIAL.subn("", text)
            reading.count("editorial mark removed", num_marks)
        text = clean(reading, text)
        match = _GLUED.match(text)
        # From ten on a glued number cannot be told from `20세기` by its form: it must follow the one before.
        if match and (match[1].startswith("0") or int(match[1]) == heading_number + 1):
            heading_number = int(match[1])
            text = text[match.end() :]
            reading.count("glued heading number removed")
        if text:
            paragraphs.append((text,))
        else:
            reading.count("empty paragraph dropped")
    return paragraphs
