"""Any data set that the ``datasets`` library can stream: from the Hugging Face hub, or a local directory.

Rows come as they are stored, a few at a time, and nothing but the rows in hand is kept. Code of a data set is never
run.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from daramgpt.corpora.brackets import mend_brackets
from daramgpt.corpora.document import Document
from daramgpt.corpora.plain import text_paragraphs
from daramgpt.corpora.reading import BLOCK_BYTES, Item, Pending, Reading
from daramgpt.errors import UserError


@dataclass(frozen=True, slots=True)
class HubDataset:
    """Where the rows are.

    Attributes:
        path: id on the hub, or a directory.
        config: configuration of the data set, such as ``"20231101.ko"``.
        split: which part of it.
        revision: of the hub id: a tag, branch or commit.
        text_field: the column that holds the text.
    """

    path: str
    config: str | None = None
    split: str = "train"
    revision: str | None = None
    text_field: str = "text"


def hub_items(reading: Reading, dataset: HubDataset) -> Iterator[Pending]:
    """Rows, many at a time.

    Raises:
        UserError: there is no such data set, it cannot be reached, or it lacks the column.
    """
    rows: list[tuple[str, Any]] = []
    size = first = 0
    for number, row in enumerate(_rows(dataset)):
        if dataset.text_field not in row:
            raise UserError(
                f"data set {dataset.path} has no column {dataset.text_field!r} (it has {', '.join(row)})",
                "name the one that holds the text: text_field in [corpus.datasets.NAME]",
            )
        text = row[dataset.text_field]
        rows.append((str(row.get("id") or number), text))
        size += 3 * len(text) if isinstance(text, str) else 0
        if size >= BLOCK_BYTES:
            yield _item(dataset, first, rows, size)
            rows, size, first = [], 0, number + 1
    if rows:
        yield _item(dataset, first, rows, size)


def parse_texts(reading: Reading, item: Item) -> Iterator[Document]:
    """One document a row; its id is the row's column ``id``, else its number."""
    for row_id, text in item.data:
        if not isinstance(text, str):
            reading.fault(f"{item.label} row {row_id}", "holds no string")
            continue
        if reading.source == "wiki":
            # The cleaned editions of Wikipedia keep the brackets that their cleaning emptied.
            text = "\n".join(map(mend_brackets, text.split("\n")))
        if document := reading.document(row_id, text_paragraphs(reading, text)):
            yield document


def _item(dataset: HubDataset, first: int, rows: list[tuple[str, Any]], size: int) -> Pending:
    return Pending(size, lambda: Item("texts", f"{dataset.path} from row {first}", "", rows))


def _rows(dataset: HubDataset) -> Iterator[dict[str, Any]]:
    import datasets

    try:
        stream = datasets.load_dataset(
            dataset.path, dataset.config, split=dataset.split, revision=dataset.revision, streaming=True
        )
        yield from stream
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        first_line = str(error).strip().partition("\n")[0]
        raise UserError(
            f"data set {dataset.path} cannot be read: {first_line}",
            "check path, config, split and revision in [corpus.datasets.NAME], and the network",
        ) from None
