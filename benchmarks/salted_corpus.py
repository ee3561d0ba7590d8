"""A corpus as many times as large as a given one, in its own containers and formats, no text of it repeated.

Every document is written so many times, each copy with a word of its own at a place that cleaning leaves alone, and
under an id of its own: files and members get the copy's number at the end of their stem, wiki pages new page ids. An
archive becomes one archive of all copies, an export one export, so whatever grows with the number of members or pages
grows here too. Copies of a document stand next to each other, which lets everything be read once and streamed: a
member, a page or a line is held at a time.

What has no text stays without. Members that hold no text that could be told apart (invalid JSON, manuals) are copied
as they are; members that cannot be unpacked are left out, and an archive that cannot be opened is copied once.
"""

from __future__ import annotations

import bz2
import html
import json
import re
import shutil
import zipfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import IO, Any

from daramgpt import corpora
from daramgpt.corpora.archives import READ_FAULTS, entry_name, open_archive
from daramgpt.corpora.reading import Reading
from daramgpt.corpora.wikitext import plain_lines
from daramgpt.errors import UserError

_CHUNK_BYTES = 1 << 20
# Other editions of what is also given as text, JSON or XML, which has all the traps.
_TABLES = (".csv", ".parquet")
_RAW_END = re.compile(r"\s+\.\s*$")
_PARAGRAPH = re.compile(r"<p\b[^>/]*>(.*?)</p>", re.DOTALL)
_TAG = re.compile(r"<[^>]*>")
_NAMESPACE = re.compile(r"<ns>\s*(-?\d+)\s*</ns>")
_ID = re.compile(r"<id>\s*(\d+)\s*</id>")
_REDIRECT = re.compile(r"\s*#\s*(?:넘겨주기|redirect)\b", re.IGNORECASE)
_TEXT = re.compile(r"<text\b[^>]*?(?:/>|>(.*?)</text>)", re.DOTALL)


def write_salted(corpus_dir: Path, formats: dict[str, str], num_copies: int, folder: Path) -> None:
    """Write the copies below ``folder/<corpus>``.

    Args:
        corpus_dir: holds the original corpora.
        formats: of each corpus, by name.
        num_copies: of each document.
        folder: is made.

    Raises:
        UserError: a corpus is not there, or is a table (CSV, parquet).
    """
    for name, format in formats.items():
        own = corpus_dir / name
        for path in corpora.find(corpus_dir, name, format).paths:
            target = folder / name / path.relative_to(own if own in path.parents else corpus_dir)
            target.parent.mkdir(parents=True, exist_ok=True)
            try:
                archive = open_archive(path)
            except READ_FAULTS:
                if path.is_file():
                    shutil.copyfile(path, target)
                continue
            if archive is None:
                _write_file(path, format, num_copies, target)
            else:
                with archive:
                    _write_archive(archive, format, num_copies, target)


def salt(copy: int) -> str:
    """The word that tells a copy's documents from those of the others."""
    return f"사본{copy}"


def _write_file(path: Path, format: str, num_copies: int, target: Path) -> None:
    _refuse_table(path.name)
    if format in _STREAMS:
        with path.open("rb") as file:
            is_bz2 = file.read(3) == b"BZh"
        opened: Callable[..., Any] = bz2.open if is_bz2 else open
        with opened(path, "rb") as source, opened(target, "wb") as out:
            out.writelines(_STREAMS[format](source, num_copies))
        return
    data = path.read_bytes()
    for copy in range(num_copies):
        target.with_name(_copy_name(path.name, copy)).write_bytes(_salted(format, data, copy))


def _write_archive(archive: zipfile.ZipFile, format: str, num_copies: int, target: Path) -> None:
    # The fastest level: how well it is packed does not matter.
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out:
        for info in archive.infolist():
            name = entry_name(info)
            if info.is_dir():
                continue
            _refuse_table(name)
            is_text = name.lower().endswith(_SUFFIXES[format])
            if is_text and format in _STREAMS:
                with archive.open(info) as source, out.open(name, "w", force_zip64=True) as member:
                    for piece in _STREAMS[format](source, num_copies):
                        member.write(piece)
                continue
            try:
                data = archive.read(info)
            except READ_FAULTS:
                continue
            for copy in range(num_copies):
                out.writestr(_copy_name(name, copy), _salted(format, data, copy) if is_text else data)


def _refuse_table(name: str) -> None:
    if name.lower().endswith(_TABLES):
        raise UserError(
            f"{name} is a table, of which no salted copies are made", "use the edition in text, JSON or XML"
        )


def _copy_name(name: str, copy: int) -> str:
    stem, dot, suffix = name.rpartition(".")
    return f"{stem}-{copy}{dot}{suffix}"


def _salted(format: str, data: bytes, copy: int) -> bytes:
    try:
        return _SALTERS[format](data.decode("utf-8-sig"), copy).encode()
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        # Undecodable, or not of the form that readers expect either.
        return data


def _salt_web(text: str, copy: int) -> str:
    value = json.loads(text, strict=False)
    is_raw = "SJML" in value
    for article in value["SJML"]["text"] if is_raw else value["named_entity"]:
        if not any(_has_text(article.get(field)) for field in ("title", "subtitle", "content")):
            continue
        # A sentence of its own: what is added to another one may go with it in cleaning, or keep it from being cleaned.
        if is_raw:
            article["content"] = f"{_RAW_END.sub('', article.get('content') or '')} . . {salt(copy)} ."
        else:
            article["content"] = [*(article.get("content") or ()), {"sentence": salt(copy)}]
    return json.dumps(value, ensure_ascii=False)


def _has_text(field: Any) -> bool:
    if isinstance(field, list):
        return any(_has_text(entry["sentence"]) for entry in field)
    return bool(field and field.strip(" ."))


def _salt_written(text: str, copy: int) -> str:
    book = json.loads(text, strict=False)
    for document in book["document"]:
        if document.get("id"):
            document["id"] = f"{document['id']}-{copy}"
        paragraphs = [paragraph for paragraph in document["paragraph"] if (paragraph.get("form") or "").strip()]
        if paragraphs:
            paragraphs[-1]["form"] += f" {salt(copy)}"
    return json.dumps(book, ensure_ascii=False)


def _salt_unpublished(text: str, copy: int) -> str:
    # As text, for many of these files are no XML.
    paragraphs = [match for match in _PARAGRAPH.finditer(text) if _TAG.sub("", match[1]).strip()]
    if not paragraphs:
        return text
    end = paragraphs[-1].end(1)
    return f"{text[:end]} {salt(copy)}{text[end:]}"


def _salt_text(text: str, copy: int) -> str:
    return f"{text.rstrip()} {salt(copy)}\n" if text.strip() else text


def _salt_lines(stream: IO[bytes], num_copies: int) -> Iterator[bytes]:
    for line in stream:
        for copy in range(num_copies):
            yield _salt_line(line, copy)


def _salt_line(line: bytes, copy: int) -> bytes:
    try:
        entry = json.loads(line, strict=False)
        if entry["text"].strip():
            entry["text"] += f" {salt(copy)}"
        if entry.get("id"):
            entry["id"] = f"{entry['id']}-{copy}"
        return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return line.rstrip(b"\r\n") + b"\n"


def _salt_export(stream: IO[bytes], num_copies: int) -> Iterator[bytes]:
    rest, reading = b"", Reading("wiki")
    for chunk in iter(partial(stream.read, _CHUNK_BYTES), b""):
        *pages, rest = (rest + chunk).split(b"</page>")
        for page in pages:
            before, found, inside = page.partition(b"<page>")
            yield before
            for copy in _salt_page(reading, inside.decode("utf-8", errors="replace"), num_copies) if found else ():
                yield f"<page>{copy}</page>".encode()
    yield rest


def _salt_page(reading: Reading, page: str, num_copies: int) -> Iterator[str]:
    text = _TEXT.search(page)
    start = text.start(1) if text and _is_article(reading, page, html.unescape(text[1] or "")) else 0
    for copy in range(num_copies):
        # A line of its own before the text: at the end it would belong to a section that is dropped.
        salted = f"{page[:start]}{salt(copy)}\n{page[start:]}" if start else page
        yield _with_id(salted, num_copies, copy)


def _with_id(page: str, num_copies: int, copy: int) -> str:
    # The first id in a page is its own; the others are of revision and author.
    return _ID.sub(lambda match: f"<id>{int(match[1]) * num_copies + copy}</id>", page, count=1)


def _is_article(reading: Reading, page: str, wikitext: str) -> bool:
    """Whether a document comes of this page: the rest of the pages has no text, and is to have none in any copy."""
    namespace = _NAMESPACE.search(page)
    if (namespace and namespace[1] != "0") or "<redirect" in page or _REDIRECT.match(wikitext):
        return False
    return bool(plain_lines(reading, wikitext))


_SALTERS = {"web": _salt_web, "written": _salt_written, "unpublished": _salt_unpublished, "text": _salt_text}
# Formats whose files hold many documents and may be of any size.
_STREAMS = {"wiki": _salt_export, "jsonl": _salt_lines}
_SUFFIXES = {
    "web": (".json",),
    "written": (".json",),
    "unpublished": (".sjml", ".xml"),
    "wiki": (".xml",),
    "text": (".txt", ".text", ".md"),
    "jsonl": (".jsonl", ".ndjson", ".json"),
}
