"""The CSV editions of the NIKL corpora: one sentence a row.

They have lost their paragraphs: the rows of one text become one paragraph of many pieces, and the report says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from pathlib import Path

from daramgpt.corpora.archives import READ_FAULTS, Member, members, opened, pending
from daramgpt.corpora.cleaning import clean, encoding_of
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import LARGEST_ITEM_BYTES, Item, Pending, Reading

_HEAD_BYTES = 1 << 16


def is_csv(name: str) -> bool:
    """Whether a member's name is that of a table."""
    return name.lower().endswith(".csv")


def nikl_items(
    reading: Reading, paths: list[Path], parser: str, suffixes: tuple[str, ...], id_column: str
) -> Iterator[Pending]:
    """The files of a NIKL corpus, each name once, and the rows of its tables."""
    read: set[str] = set()
    for member in members(reading, paths):
        if is_csv(member.name):
            yield from csv_items(reading, member, id_column)
        elif not member.name.lower().endswith(suffixes):
            reading.pass_over(member.label, "no data of this format")
        elif member.stem in read:
            reading.pass_over(member.label, "present twice")
        else:
            read.add(member.stem)
            yield pending(reading, member, parser)


def csv_items(reading: Reading, member: Member, id_column: str) -> Iterator[Pending]:
    """The texts of a table, whose rows stand together by ``id_column``."""
    reading.report.members += 1
    csv.field_size_limit(LARGEST_ITEM_BYTES)
    encoding = encoding_of(member.head(_HEAD_BYTES).rpartition(b"\n")[0])
    if encoding == "cp949":
        reading.count("cp949 file decoded")
    try:
        with opened(reading, member) as stream:
            rows = csv.reader(io.TextIOWrapper(stream, encoding, errors="replace", newline=""))
            header = next(rows, [])
            missing = [column for column in (id_column, "sentence") if column not in header]
            if missing:
                reading.fault(member.label, f"has no column {', '.join(missing)}" if header else "is empty")
                return
            id_place, sentence_place = header.index(id_column), header.index("sentence")
            current, sentences, size = "", list[str](), 0
            for row in rows:
                if len(row) != len(header):
                    if row:
                        reading.fault(member.label, f"row {rows.line_num} has {len(row)} fields, not {len(header)}")
                    continue
                if row[id_place] != current and sentences:
                    yield _text(member, current, sentences, size)
                    sentences, size = [], 0
                current = row[id_place]
                sentences.append(row[sentence_place])
                size += 3 * len(sentences[-1])
            if sentences:
                yield _text(member, current, sentences, size)
    except (csv.Error, *READ_FAULTS) as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")


def parse_csv(reading: Reading, item: Item) -> Iterator[Document]:
    """The text of some rows: one paragraph."""
    reading.count("CSV text without paragraph breaks")
    text = "\n".join(item.data)
    if num_lost := text.count("\ufffd"):
        reading.fault(f"{item.label} text {item.id}", f"{num_lost} undecodable places left out")
    pieces = (clean(reading, sentence.replace("\ufffd", "")) for sentence in item.data)
    paragraph = tuple(piece for piece in pieces if piece)
    if document := reading.document(item.id, [paragraph] if paragraph else []):
        yield document


def _text(member: Member, text_id: str, sentences: list[str], size: int) -> Pending:
    return Pending(size, lambda: Item("csv", member.label, text_id, sentences))
