"""NIKL unpublished writing: SJML (XML), one text a file, and the later CSV edition.

Many files are not well-formed: bare ``&`` and ``<`` in diaries and letters. A file that the XML parser refuses is
read by its paragraph marks alone, which recovers all of its text, and is named in the report. Sentences marked by
``<s>`` become the pieces of their paragraph.
"""

from __future__ import annotations

import html
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterator
from pathlib import Path

from daramgpt.corpora.cleaning import clean, decode
from daramgpt.corpora.csv_edition import nikl_items
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Item, Paragraphs, Pending, Reading

_BODY = re.compile(r"<text\b[^>]*>(.*?)(?:</text>|\Z)", re.DOTALL)
_PARAGRAPH = re.compile(r"<p\b[^>]*?/>|</?p\b[^>]*>")
_SENTENCE = re.compile(r"<s\b[^>]*?/>|</?s\b[^>]*>")
_DECLARATION = re.compile(r"\A\s*<\?xml[^>]*\?>")


def unpublished_items(reading: Reading, paths: list[Path]) -> Iterator[Pending]:
    """Files, and the rows of tables."""
    return nikl_items(reading, paths, "sjml", (".sjml", ".xml"), "file_id")


def parse_sjml(reading: Reading, item: Item) -> Iterator[Document]:
    """The text of a file; its id is the file's."""
    if item.data is None:
        return
    paragraphs = _paragraphs(reading, item.label, decode(reading, item.label, item.data))
    if document := reading.document(item.id, paragraphs):
        yield document


def _paragraphs(reading: Reading, label: str, text: str) -> Paragraphs:
    try:
        # The text is decoded already, so an encoding that the declaration names must not count.
        root = ElementTree.fromstring(_DECLARATION.sub("", text))
        raw = [_pieces_of_element(element) for element in root.iter("p")]
    except ElementTree.ParseError as error:
        raw = [_pieces_of_markup(part) for body in _BODY.findall(text) for part in _PARAGRAPH.split(body)]
        reading.count("malformed file recovered")
        reading.fault(label, f"malformed XML ({error}), text recovered")
    cleaned = (tuple(filter(None, (clean(reading, piece) for piece in pieces))) for pieces in raw)
    return [pieces for pieces in cleaned if pieces]


def _pieces_of_element(paragraph: ElementTree.Element) -> list[str]:
    pieces = [paragraph.text or ""]
    for child in paragraph:
        content = "".join(child.itertext())
        if child.tag == "s":
            pieces += [content, child.tail or ""]
        else:
            pieces[-1] += content + (child.tail or "")
    return pieces


def _pieces_of_markup(markup: str) -> list[str]:
    return [html.unescape(piece) for piece in _SENTENCE.split(markup)]
