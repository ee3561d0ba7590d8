"""Corpora as a broken download, an odd tool or an enemy leaves them: nothing crashes, hangs or is lost in silence."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

import pytest
from hostile import CASES, PERMISSION_CASES, PERMISSIONS_BIND, SIZED, Hostile, make_readable

from daramgpt.corpora import ReadReport, find, read
from daramgpt.errors import UserError

SECONDS_UNTIL_IT_HANGS = 60
LONG_LINE_BYTES = 20_000_000


@pytest.fixture(autouse=True)
def _no_hang() -> Iterator[None]:
    def give_up(number: int, frame: FrameType | None) -> None:
        raise TimeoutError("reading hangs")

    previous = signal.signal(signal.SIGALRM, give_up)
    signal.alarm(SECONDS_UNTIL_IT_HANGS)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, previous)


def check(hostile: Hostile, folder: Path) -> None:
    report = ReadReport()
    found: list[str] = []
    refusal = ""
    try:
        for document in read(find(folder, hostile.corpus), report):
            found.append("\n".join(" ".join(pieces) for pieces in document.paragraphs))
    except UserError as error:
        refusal = str(error)
    if refusal:
        assert hostile.refusal, refusal
        assert hostile.refusal in refusal
        return
    lines = report.faults + report.notes
    for text in hostile.kept:
        assert sum(text in document for document in found) == 1, text
    for word in hostile.named:
        assert any(word in line for line in lines), (word, lines)
    for text, word in hostile.either:
        assert any(text in document for document in found) or any(word in line for line in lines), (text, word)
    for text in hostile.never:
        assert not any(text in document for document in found), text
    assert not any(path.exists() for path in hostile.untouched)
    assert all(line.isprintable() or "\n" not in line for line in lines)
    "\n".join(lines).encode()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_hostile_corpus(case: Callable[[Path], Hostile], tmp_path: Path) -> None:
    # Deep enough that a name which climbs out of the folder would still land in the test's own.
    folder = tmp_path / "a" / "b" / "corpora"
    folder.mkdir(parents=True)
    check(case(folder), folder)


@pytest.mark.parametrize("case", SIZED, ids=lambda case: case.__name__)
def test_corpus_of_one_huge_piece(case: Callable[[Path, int], Hostile], tmp_path: Path) -> None:
    check(case(tmp_path, LONG_LINE_BYTES), tmp_path)


@pytest.mark.skipif(not PERMISSIONS_BIND, reason="root may read everything")
@pytest.mark.parametrize("case", PERMISSION_CASES, ids=lambda case: case.__name__)
def test_corpus_without_permission(case: Callable[[Path], Hostile], tmp_path: Path) -> None:
    hostile = case(tmp_path)
    try:
        check(hostile, tmp_path)
    finally:
        make_readable(tmp_path)
