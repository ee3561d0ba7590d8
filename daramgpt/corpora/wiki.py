"""Korean Wikipedia: a MediaWiki export (bz2 or plain XML), or the cleaned parquet edition.

The export is cut at ``<page>`` and ``</page>`` in a stream, and each page is read by four small patterns: far faster
than an XML tree, in constant memory, and a damaged page costs that page alone.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from daramgpt.corpora.archives import READ_FAULTS, Member, members
from daramgpt.corpora.cleaning import clean_paragraphs
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Reading
from daramgpt.corpora.wikitext import mend_brackets, plain_lines

_CHUNK_BYTES = 1 << 20
_LONGEST_PAGE_BYTES = 1 << 26
_NAMESPACE = re.compile(r"<ns>\s*(-?\d+)\s*</ns>")
_ID = re.compile(r"<id>\s*(\d+)\s*</id>")
_REDIRECT_TAG = re.compile(r"<redirect\b")
_TEXT = re.compile(r"<text\b[^>]*?(?:/>|>(.*?)</text>)", re.DOTALL)
_REDIRECT = re.compile(r"\s*#\s*(?:넘겨주기|redirect)\b", re.IGNORECASE)


def read_wiki(reading: Reading, paths: list[Path]) -> Iterator[Document]:
    """Articles of a Wikipedia; ids are page ids."""
    for member in members(reading, paths):
        if member.name.lower().endswith(".parquet"):
            yield from _read_parquet(reading, member)
        elif re.search(r"\.(xml|bz2|xml-p\w+)$", member.name.lower()):
            yield from _read_export(reading, member)


def _read_export(reading: Reading, member: Member) -> Iterator[Document]:
    reading.report.members += 1
    try:
        with member.open() as stream:
            for page in _pages(reading, member, stream):
                if document := _document(reading, member.label, page):
                    yield document
    except READ_FAULTS as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")


def _pages(reading: Reading, member: Member, stream: IO[bytes]) -> Iterator[str]:
    """The insides of ``<page>`` elements."""
    rest = b""
    num_pages = 0
    while chunk := stream.read(_CHUNK_BYTES):
        *pages, rest = (rest + chunk).split(b"</page>")
        num_pages += len(pages)
        for page in pages:
            _, found, body = page.partition(b"<page>")
            if not found:
                reading.fault(member.label, "a page has an end and no beginning")
                continue
            text = body.decode("utf-8", errors="replace")
            if "\ufffd" in text and b"\xef\xbf\xbd" not in body:
                reading.fault(member.label, f"page {_first(_ID, text)}: undecodable bytes left out")
                text = text.replace("\ufffd", "")
            yield text
        if len(rest) > _LONGEST_PAGE_BYTES:
            reading.fault(member.label, f"a page without an end was left out ({len(rest)} bytes)")
            rest = b""
    if not num_pages:
        reading.fault(member.label, "holds no page of a MediaWiki export")
    elif b"<page>" in rest:
        reading.fault(member.label, f"ends inside page {_first(_ID, rest.decode('utf-8', errors='replace'))}")


def _first(pattern: re.Pattern[str], text: str) -> str:
    match = pattern.search(text)
    return (match[1] or "") if match else ""


def _document(reading: Reading, label: str, page: str) -> Document | None:
    if _first(_NAMESPACE, page) not in ("0", ""):
        reading.count("page of another namespace dropped")
        return None
    wikitext = html.unescape(_first(_TEXT, page))
    if _REDIRECT_TAG.search(page) or _REDIRECT.match(wikitext):
        reading.count("redirect dropped")
        return None
    page_id = _first(_ID, page)
    if not page_id:
        reading.fault(label, "a page has no id and was left out")
        return None
    return reading.document(page_id, clean_paragraphs(reading, plain_lines(reading, wikitext)))


def _read_parquet(reading: Reading, member: Member) -> Iterator[Document]:
    import pyarrow.lib
    import pyarrow.parquet

    reading.report.members += 1
    try:
        with member.open() as stream:
            for batch in pyarrow.parquet.ParquetFile(stream).iter_batches(batch_size=256, columns=["id", "text"]):
                for row in batch.to_pylist():
                    lines = (mend_brackets(line) for line in (row["text"] or "").split("\n"))
                    if document := reading.document(str(row["id"]), clean_paragraphs(reading, lines)):
                        yield document
    except (pyarrow.lib.ArrowException, *READ_FAULTS) as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")
