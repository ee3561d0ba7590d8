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

from daramgpt.corpora.archives import READ_FAULTS, Member, members, opened
from daramgpt.corpora.brackets import mend_brackets
from daramgpt.corpora.cleaning import clean_paragraphs
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Item, Pending, Reading
from daramgpt.corpora.wikitext import plain_lines

# A fraction of a block, so that blocks come out near their size.
_CHUNK_BYTES = 1 << 17
_END_OF_PAGE = b"</page>"
_LONGEST_PAGE_BYTES = 1 << 26
_ROWS_AT_A_TIME = 256
_NAMESPACE = re.compile(r"<ns>\s*(-?\d+)\s*</ns>")
_ID = re.compile(r"<id>\s*(\d+)\s*</id>")
_TITLE = re.compile(r"<title>([^<]*)</title>")
_REDIRECT_TAG = re.compile(r"<redirect\b")
_TEXT = re.compile(r"<text\b[^>]*?(?:/>|>(.*?)</text>)", re.DOTALL)
_REDIRECT = re.compile(r"\s*#\s*(?:넘겨주기|redirect)\b", re.IGNORECASE)
# What is left of markup that has no partner, or means its characters.
_KEPT_MARKS = ("unbalanced mark kept", "double brackets kept as text", "double braces kept as text")


def wiki_items(reading: Reading, paths: list[Path]) -> Iterator[Pending]:
    """Pages, or rows, many at a time."""
    for member in members(reading, paths):
        if member.name.lower().endswith(".parquet"):
            yield from _parquet_items(reading, member)
        elif re.search(r"\.(xml|bz2|xml-p\w+)$", member.name.lower()):
            yield from _export_items(reading, member)
        else:
            reading.pass_over(member.label, "no data of this format")


def parse_pages(reading: Reading, item: Item) -> Iterator[Document]:
    """Articles among the pages of an export; ids are page ids."""
    *pages, _ = item.data.split(_END_OF_PAGE)
    for data in pages:
        _, found, body = data.partition(b"<page>")
        if not found:
            reading.fault(item.label, "a page has an end and no beginning")
            continue
        page = body.decode("utf-8", errors="replace")
        if "\ufffd" in page and b"\xef\xbf\xbd" not in body:
            reading.fault(item.label, f"{_name(page)}: undecodable bytes left out")
            page = page.replace("\ufffd", "")
        if document := _document(reading, item.label, page):
            yield document


def parse_rows(reading: Reading, item: Item) -> Iterator[Document]:
    """Texts of a table that has been cleaned before; ids are the table's."""
    for text_id, text in item.data:
        lines = (mend_brackets(line) for line in (text or "").split("\n"))
        if document := reading.document(str(text_id), clean_paragraphs(reading, lines)):
            yield document


def _export_items(reading: Reading, member: Member) -> Iterator[Pending]:
    reading.report.members += 1
    try:
        with opened(reading, member) as stream:
            for data in _whole_pages(reading, member, stream):
                yield Pending(len(data), lambda data=data: Item("pages", member.label, "", data))  # type: ignore[misc]
    except READ_FAULTS as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")


def _whole_pages(reading: Reading, member: Member, stream: IO[bytes]) -> Iterator[bytes]:
    """The stream in parts that end with a page."""
    chunks: list[bytes] = []
    num_parts = 0
    while chunk := stream.read(_CHUNK_BYTES):
        # The mark may lie across two chunks.
        tail = chunks[-1][-len(_END_OF_PAGE) :] if chunks else b""
        place = (tail + chunk).rfind(_END_OF_PAGE)
        if place >= 0:
            end = place + len(_END_OF_PAGE) - len(tail)
            yield b"".join([*chunks, chunk[:end]])
            chunks = [chunk[end:]]
            num_parts += 1
        else:
            chunks.append(chunk)
        if sum(map(len, chunks)) > _LONGEST_PAGE_BYTES:
            reading.fault(member.label, f"a page without an end was left out ({sum(map(len, chunks))} bytes)")
            chunks = []
    rest = b"".join(chunks)
    if not num_parts:
        reading.fault(member.label, "holds no page of a MediaWiki export")
    elif b"<page>" in rest:
        reading.fault(member.label, f"ends inside {_name(rest.decode('utf-8', errors='replace'))}")


def _parquet_items(reading: Reading, member: Member) -> Iterator[Pending]:
    import pyarrow.lib
    import pyarrow.parquet

    reading.report.members += 1
    try:
        with opened(reading, member) as stream:
            file = pyarrow.parquet.ParquetFile(stream)
            for batch in file.iter_batches(batch_size=_ROWS_AT_A_TIME, columns=["id", "text"]):
                rows = list(zip(batch.column("id").to_pylist(), batch.column("text").to_pylist(), strict=True))
                yield Pending(batch.nbytes, lambda rows=rows: Item("rows", member.label, "", rows))  # type: ignore[misc]
    except (pyarrow.lib.ArrowException, *READ_FAULTS) as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")


def _name(page: str) -> str:
    return f'page {_first(_ID, page)} "{html.unescape(_first(_TITLE, page))}"'


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
    before = {mark: reading.report.cleaned[mark] for mark in _KEPT_MARKS}
    lines = plain_lines(reading, wikitext)
    kept = {mark: reading.report.cleaned[mark] - number for mark, number in before.items()}
    if any(kept.values()):
        reading.note(f"{label} {_name(page)}", ", ".join(f"{mark} ({n})" for mark, n in kept.items() if n))
    return reading.document(page_id, clean_paragraphs(reading, lines))
