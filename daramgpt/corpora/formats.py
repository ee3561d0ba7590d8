"""Which format a file has, by its data, and where the files of a corpus are."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from daramgpt.corpora.archives import (
    PACKED,
    PART,
    READ_FAULTS,
    Member,
    archive_members,
    natural_key,
    open_archive,
    parts_of,
)
from daramgpt.corpora.hub import HubDataset
from daramgpt.errors import UserError

FORMATS = ("web", "written", "unpublished", "wiki", "text", "jsonl")

_NUM_MEMBERS_LOOKED_AT = 8
# A file of these suffixes that no format claims (empty, cut short, invalid) is left to the reader to report.
_DATA_SUFFIXES = re.compile(r"\.(?:json|jsonl|ndjson|sjml|xml|csv|bz2|parquet|txt|part\d+)$", re.IGNORECASE)
_SIDE_FILES = re.compile(r"^(?:readme|licen[cs]e|changelog|sha\d*sums|md5sums)\b|^\.|-multistream-index", re.IGNORECASE)


def detect(path: Path) -> str | None:
    """The format of a file, or of the first data inside an archive; None for what is no corpus data."""
    if not path.is_file():
        return None
    try:
        archive = open_archive(path)
        if archive is None:
            return _format_of(Member(path, path.name, str(path.parent)))
        with archive:
            found = (_format_of(member) for member in archive_members(path, archive) if member.info.file_size)  # type: ignore[union-attr]
            return next((name for name in islice(found, _NUM_MEMBERS_LOOKED_AT) if name), None)
    except READ_FAULTS:
        return None


def _format_of(member: Member) -> str | None:
    name = member.name.lower()
    if _SIDE_FILES.match(name):
        return None
    head = member.head()
    if head[:4] == b"PAR1":
        return "wiki"
    if head[:5] == b"%PDF-" or (b"\x00" in head[:64] and head[:2] not in (b"\xff\xfe", b"\xfe\xff")):
        return None
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if b"<mediawiki" in start:
        return "wiki"
    if b"<SJML" in start:
        return "unpublished"
    if name.endswith(".csv"):
        columns = start.split(b"\n", 1)[0]
        if b"sentence" in columns:
            return "written" if b"doc_id" in columns else "unpublished" if b"file_id" in columns else None
        return None
    if start.startswith(b"{"):
        if b'"SJML"' in start or b'"named_entity"' in start:
            return "web"
        if b'"document"' in start and b'"metadata"' in start:
            return "written"
        return "jsonl" if b'"text"' in start else None
    return "text" if start and name.endswith((".txt", ".text", ".md")) else None


@dataclass(frozen=True, slots=True)
class Corpus:
    """A corpus that has been found.

    Attributes:
        name: the recipe's name of it.
        format: one of `FORMATS`, or ``"datasets"``.
        paths: its files, in natural order.
        hub: where its rows are, if it is a data set.
    """

    name: str
    format: str
    paths: list[Path]
    hub: HubDataset | None = None


def find(corpus_dir: Path, name: str, format: str | None = None) -> Corpus:
    """The files of one corpus.

    They are those below ``corpus_dir/<name>`` if there is such a folder, else all below ``corpus_dir`` whose data
    has the format. Where no format is given it is told by the data: that of the corpus's name, if there is any such
    file, else the one format that its own folder holds.

    Raises:
        UserError: an unknown format, no such folder, a folder that cannot be read, or no file of this format in it.
    """
    if format is not None and format not in FORMATS:
        raise UserError(f"corpus.formats.{name}: unknown format {format!r}", f"choose one of {', '.join(FORMATS)}")
    if not corpus_dir.is_dir():
        raise UserError(f"corpus folder {corpus_dir} does not exist", "name the folder of your corpora with --corpus")
    own = corpus_dir / name
    folder = own if own.is_dir() else corpus_dir
    found: dict[Path, str | None] = {}
    for path in _files(folder):
        if not (PART.match(path.name) and parts_of(path)[0] != path):
            found[path] = detect(path)
    others = sorted({detected for detected in found.values() if detected})
    is_named = format is not None
    if format is None:
        format = others[0] if folder is own and name not in others and len(others) == 1 else name
    chosen = [path for path, detected in found.items() if detected == format]
    if chosen and folder is own:
        broken = (path for path, detected in found.items() if detected is None)
        chosen += [path for path in broken if _is_data(path)]
    if not chosen and folder is own and format in FORMATS and (is_named or not others):
        # The recipe knows better, or all is so broken that no data tells; the reader will name what is wrong.
        chosen = [path for path in found if _is_data(path)]
    if not chosen:
        holds = f"it holds {', '.join(others)}" if others else f"it holds {len(found)} files, none of a known format"
        mend = f"put the downloaded files into {own}, zipped or not"
        if len(others) > 1 and folder is own:
            mend = f"name the format: corpus.formats.{name} = one of {', '.join(others)}"
        kind = f"{format} data" if format in FORMATS else "data"
        raise UserError(f"no {kind} for corpus {name!r} in {folder} ({holds})", mend)
    ordered = sorted(chosen, key=lambda path: (natural_key(path.relative_to(folder)), str(path)))
    return Corpus(name, format, ordered)


def _is_data(path: Path) -> bool:
    is_data = _DATA_SUFFIXES.search(path.name) or PACKED.search(path.name)
    return bool(is_data) and not _SIDE_FILES.match(path.name)


def _files(folder: Path) -> Iterator[Path]:
    """Every file below a folder; links to folders are followed once."""
    visited: set[tuple[int, int]] = set()

    def refuse(error: OSError) -> None:
        raise UserError(f"folder {error.filename} cannot be read ({error.strerror})", "give yourself permission to it")

    for parent, folders, files in os.walk(folder, onerror=refuse, followlinks=True):
        status = Path(parent).stat()
        if (status.st_dev, status.st_ino) in visited:
            folders.clear()
            continue
        visited.add((status.st_dev, status.st_ino))
        folders.sort(key=natural_key)
        for name in files:
            path = Path(parent) / name
            # Links that lead nowhere, sockets and the like are yielded too, to be named among what was not read.
            yield path
