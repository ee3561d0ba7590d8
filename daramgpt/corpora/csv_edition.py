"""The CSV editions of the NIKL corpora: one sentence a row.

They have lost their paragraphs: the rows of one text become one paragraph of many pieces, and the report says so.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from itertools import groupby

from daramgpt.corpora.archives import READ_FAULTS, Member
from daramgpt.corpora.cleaning import clean
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Reading

_LONGEST_FIELD = 1 << 30


def is_csv(name: str) -> bool:
    """Whether a member's name is that of a table."""
    return name.lower().endswith(".csv")


def read_csv(reading: Reading, member: Member, id_column: str) -> Iterator[Document]:
    """Documents of one table, whose rows stand together by ``id_column``."""
    reading.report.members += 1
    csv.field_size_limit(_LONGEST_FIELD)
    try:
        with member.open() as stream:
            rows = csv.DictReader(io.TextIOWrapper(stream, "utf-8-sig", errors="replace", newline=""))
            missing = {id_column, "sentence"} - set(rows.fieldnames or ())
            if missing:
                reading.fault(member.label, f"has no column {', '.join(sorted(missing))}")
                return
            for document_id, group in groupby(rows, key=lambda row: row[id_column] or ""):
                pieces = (clean(reading, (row["sentence"] or "").replace("\ufffd", "")) for row in group)
                paragraph = tuple(piece for piece in pieces if piece)
                reading.count("CSV text without paragraph breaks")
                if document := reading.document(document_id, [paragraph] if paragraph else []):
                    yield document
    except (csv.Error, *READ_FAULTS) as error:
        reading.fault(member.label, f"cannot be read to its end ({error})")
