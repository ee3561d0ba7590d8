"""Plain text and JSON lines: what a user brings who has none of the four corpora."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from daramgpt.corpora.archives import READ_FAULTS, Member, members, opened, pending
from daramgpt.corpora.cleaning import clean_paragraphs, decode
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import LARGEST_ITEM_BYTES, Item, Paragraphs, Pending, Reading

TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")
_CHUNK_BYTES = 1 << 17
_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
# A text file beyond this is read in parts, each a document: nothing so long is one text, nor need it fit in memory.
_LONGEST_TEXT_BYTES = 16 << 20
_LONGEST_PART_BYTES = 4 << 20
_WEAK_SEPARATORS = (b". ", b" ")


def text_items(reading: Reading, paths: list[Path]) -> Iterator[Pending]:
    """Text files, whole or in parts."""
    for member in members(reading, paths):
        if not member.name.lower().endswith(TEXT_SUFFIXES):
            reading.pass_over(member.label, "no data of this format")
        elif member.size <= _LONGEST_TEXT_BYTES or member.head(2) in (b"\xff\xfe", b"\xfe\xff"):
            yield pending(reading, member, "text")
        else:
            reading.report.members += 1
            reading.count("long text file read in parts")
            for number, (data, _) in enumerate(_parts(reading, member, may_cut_lines=True), 1):
                yield _loaded("text", member, f"{member.stem}.{number}", data)


def parse_text(reading: Reading, item: Item) -> Iterator[Document]:
    """One document, its paragraphs parted by blank lines; its id is the file's name without suffix."""
    if item.data is None:
        return
    text = decode(reading, item.label, item.data).replace("\r\n", "\n").replace("\r", "\n")
    if document := reading.document(item.id, clean_paragraphs(reading, _BLANK_LINE.split(text))):
        yield document


def jsonl_items(reading: Reading, paths: list[Path]) -> Iterator[Pending]:
    """Lines, many at a time."""
    for member in members(reading, paths):
        if not member.name.lower().endswith(JSONL_SUFFIXES):
            reading.pass_over(member.label, "no data of this format")
            continue
        reading.report.members += 1
        for data, line_number in _parts(reading, member, may_cut_lines=False):
            yield _loaded("lines", member, f"{member.stem}.{line_number}", data)


def parse_lines(reading: Reading, item: Item) -> Iterator[Document]:
    """One document a line, in its field ``text``; its id is the field ``id`` or file name and line number."""
    stem, _, first_line = item.id.rpartition(".")
    for number, line in enumerate(item.data.split(b"\n"), int(first_line)):
        if line.strip():
            yield from _parse_line(reading, f"{item.label} line {number}", f"{stem}.{number}", line)


def text_paragraphs(reading: Reading, text: str) -> Paragraphs:
    """Paragraphs of a text field: parted by blank lines, or, where there is none, each line is one."""
    blocks = _BLANK_LINE.split(text) if _BLANK_LINE.search(text) else text.split("\n")
    return clean_paragraphs(reading, blocks)


def _parse_line(reading: Reading, label: str, default_id: str, line: bytes) -> Iterator[Document]:
    try:
        entry = json.loads(decode(reading, label, line), strict=False)
        text = entry.get("text") if isinstance(entry, dict) else None
    except (ValueError, RecursionError) as error:
        reading.fault(label, f"invalid JSON ({error})")
        return
    if not isinstance(text, str):
        reading.fault(label, "has no string `text`")
        return
    if document := reading.document(str(entry.get("id") or default_id), text_paragraphs(reading, text)):
        yield document


def _loaded(parser: str, member: Member, item_id: str, data: bytes) -> Pending:
    return Pending(len(data), lambda: Item(parser, member.label, item_id, data))


def _parts(reading: Reading, member: Member, may_cut_lines: bool) -> Iterator[tuple[bytes, int]]:
    """A member in parts of about `_CHUNK_BYTES` that end with a line, with the number of their first line.

    Args:
        may_cut_lines: whether a line that is too long for a part may be cut, at the end of a sentence or a word.
    """
    try:
        with opened(reading, member) as stream:
            yield from _cut(reading, member, stream, _WEAK_SEPARATORS if may_cut_lines else ())
    except READ_FAULTS as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")


def _cut(reading: Reading, member: Member, stream: IO[bytes], weak: tuple[bytes, ...]) -> Iterator[tuple[bytes, int]]:
    chunks: list[bytes] = []
    line_number, is_overlong, num_read = 1, False, 0
    while chunk := stream.read(_CHUNK_BYTES):
        num_read += len(chunk)
        size = sum(map(len, chunks))
        if b"\n" in chunk:
            if is_overlong:
                _, _, chunk = chunk.partition(b"\n")
                line_number, is_overlong = line_number + 1, False
            head, found, tail = chunk.rpartition(b"\n\n" if b"\n\n" in chunk else b"\n")
            if found:
                part = b"".join([*chunks, head, found])
                yield part, line_number
                line_number += part.count(b"\n")
                chunks = []
            chunks.append(tail)
        elif is_overlong:
            continue
        elif size > _LONGEST_PART_BYTES and (separator := next((one for one in weak if one in chunks[-1]), None)):
            # Not in the chunk in hand, which may be the last: a text shall not end with half a sentence.
            head, found, tail = chunks[-1].rpartition(separator)
            yield b"".join([*chunks[:-1], head, found]), line_number
            chunks = [tail, chunk]
        elif size > LARGEST_ITEM_BYTES:
            limit = LARGEST_ITEM_BYTES >> 20
            reading.fault(f"{member.label} line {line_number}", f"is longer than {limit} MB and was left out")
            chunks, is_overlong = [], True
        else:
            chunks.append(chunk)
    if rest := b"".join(chunks):
        yield rest, line_number
    if not num_read:
        reading.fault(member.label, "is empty")
