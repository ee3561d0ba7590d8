"""Plain text and JSON lines: what a user brings who has none of the four corpora."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

from daramgpt.corpora.archives import READ_FAULTS, members, read_bytes
from daramgpt.corpora.cleaning import clean_paragraphs, decode
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Reading

_BLANK_LINE = re.compile(r"\n[^\S\n]*\n\s*")
TEXT_SUFFIXES = (".txt", ".text", ".md")
JSONL_SUFFIXES = (".jsonl", ".ndjson", ".json")


def read_text(reading: Reading, paths: list[Path]) -> Iterator[Document]:
    """One document a file, paragraphs parted by blank lines; ids are file names without suffix."""
    for member in members(reading, paths):
        if not member.name.lower().endswith(TEXT_SUFFIXES):
            continue
        if (data := read_bytes(reading, member)) is None:
            continue
        text = decode(reading, member.label, data).replace("\r\n", "\n").replace("\r", "\n")
        if document := reading.document(member.stem, clean_paragraphs(reading, _BLANK_LINE.split(text))):
            yield document


def read_jsonl(reading: Reading, paths: list[Path]) -> Iterator[Document]:
    """One document a line, in its field ``text``; its id is the field ``id`` or file name and line number."""
    for member in members(reading, paths):
        if not member.name.lower().endswith(JSONL_SUFFIXES):
            continue
        reading.report.members += 1
        try:
            with member.open() as stream:
                for number, line in enumerate(stream, 1):
                    if line.strip():
                        yield from _line(reading, f"{member.label} line {number}", f"{member.stem}.{number}", line)
        except READ_FAULTS as error:
            reading.fault(member.label, f"cannot be read to its end ({error})")


def _line(reading: Reading, label: str, default_id: str, line: bytes) -> Iterator[Document]:
    try:
        entry = json.loads(decode(reading, label, line), strict=False)
        text = entry.get("text") if isinstance(entry, dict) else None
    except (ValueError, RecursionError) as error:
        reading.fault(label, f"invalid JSON ({error})")
        return
    if not isinstance(text, str):
        reading.fault(label, "has no string `text`")
        return
    # Where no blank line parts paragraphs, each line is one.
    blocks = _BLANK_LINE.split(text) if _BLANK_LINE.search(text) else text.split("\n")
    if document := reading.document(str(entry.get("id") or default_id), clean_paragraphs(reading, blocks)):
        yield document
