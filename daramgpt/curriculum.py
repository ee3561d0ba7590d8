"""The curriculum: ordered stages, each a stretch of one corpus, cut into sentences or paragraphs.

Every corpus is one stream of documents, opened once. A stage takes units from the stream of its corpus until it has
its bytes of text; where that cuts a document, the rest of it is the first text of the next stage of that corpus, so
no text is read twice and none is lost. The unit that reaches the size still belongs to the stage.

Held-out documents never enter training. A document is held out when the hash of its id falls below the held-out
fraction, which depends on nothing but the id, and it belongs to the stage in whose stretch it was met. A small run
meets few of them, so a stage that has fewer than it should reads ahead: documents passed over wait, within
`READ_AHEAD_BYTES`, for the next stage of the corpus. Where even that finds too few (a corpus of fifty novels), those
of the waiting documents whose hash is lowest are held out instead; none of them has been trained on.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter, deque
from collections.abc import Iterable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path

from daramgpt import corpora
from daramgpt.corpora import Document, ReadReport
from daramgpt.recipe import Recipe, Stage
from daramgpt.run_directory import RunDirectory

READ_AHEAD_BYTES = 8_000_000
HELDOUT_BYTES = 2_000_000


@dataclass(frozen=True, slots=True)
class Text:
    """A document, or the part of it that a stage takes, cut into units.

    Attributes:
        id: of the document.
        units: each with the separator before it: nothing before the first, a line feed before the first of a
            paragraph, else a space. Joined by nothing they are the text.
        heldout: whether it is for measuring only.
    """

    id: str
    units: tuple[str, ...]
    heldout: bool = False


def corpus_dir(recipe: Recipe, run: RunDirectory) -> Path:
    """The folder that holds the corpora: the user's, or the run's own where the package makes them."""
    return Path(recipe.corpus.dir) if recipe.corpus.dir else run.corpora


def take_bytes(recipe: Recipe, stage: Stage) -> int:
    """Bytes of pure text (UTF-8, separators not counted) that a stage takes."""
    return max(1, round(stage.take * recipe.curriculum.scale))


def cut(document: Document, unit: str) -> list[str]:
    """Units of a document, as in `Text.units`; `unit` is ``"sentence"`` or ``"paragraph"``."""
    units: list[str] = []
    for paragraph in document.paragraphs:
        if unit == "paragraph":
            parts = [" ".join(paragraph)]
        else:
            parts = [sentence for piece in paragraph for sentence in corpora.split_sentences(piece)]
        separator = "\n" if units else ""
        for part in parts:
            units.append(separator + part)
            separator = " "
    return units


def text_bytes(units: Iterable[str]) -> int:
    """UTF-8 bytes of units, their separators not counted."""
    return sum(_unit_bytes(unit) for unit in units)


def heldout_hash(document: Document) -> float:
    """A number in [0, 1), uniform over documents, that depends on the document's source and id alone."""
    digest = blake2b(f"{document.source}/{document.id}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class _Heldout:
    """Held-out documents of a stage, `HELDOUT_BYTES` of text at most but one document at least."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.num_bytes = 0

    def add(self, document: Document) -> None:
        size = _document_bytes(document)
        if not self.documents or self.num_bytes + size <= HELDOUT_BYTES:
            self.documents.append(document)
            self.num_bytes += size

    def wants(self, num_documents: int) -> int:
        """How many are missing to so many documents."""
        return num_documents - len(self.documents) if self.num_bytes < HELDOUT_BYTES else 0


class CorpusStream:
    """One pass through one corpus, which stage after stage is taken from.

    Args:
        documents: in reading order.
        heldout_fraction: share of documents that are never trained on.
    """

    def __init__(self, documents: Iterator[Document], heldout_fraction: float) -> None:
        self._documents = documents
        self._heldout_fraction = heldout_fraction
        self._rest: Document | None = None
        self._waiting: deque[Document] = deque()
        self._waiting_bytes = 0

    def take(self, num_bytes: int, unit: str, heldout_documents: int, is_last: bool) -> Iterator[Text]:
        """The next stage: its training texts in order, then its held-out texts, which are whole documents.

        Held-out documents beyond `HELDOUT_BYTES` are left out of both. To be gone through to its end.

        Args:
            num_bytes: pure text to train on; less comes only where the corpus ends.
            unit: ``"sentence"`` or ``"paragraph"``.
            heldout_documents: how many to have at least, if need be by reading ahead.
            is_last: whether no later stage reads this corpus.
        """
        heldout = _Heldout()
        left = num_bytes
        while left > 0 and (document := self._next_training(heldout)) is not None:
            units = cut(document, unit)
            ends = list(accumulate(map(_unit_bytes, units)))
            num_units = bisect_left(ends, left) + 1
            if num_units < len(units):
                self._rest = _document_of(document, units[num_units:])
            left -= sum(map(_unit_bytes, units[:num_units]))
            yield Text(document.id, tuple(units[:num_units]))
        if self._heldout_fraction > 0:
            self._read_ahead(heldout, heldout_documents)
            self._hold_out_waiting(heldout, heldout_documents, is_last)
        for document in heldout.documents:
            yield Text(document.id, tuple(cut(document, unit)), heldout=True)

    def _next_training(self, heldout: _Heldout) -> Document | None:
        if self._rest is not None:
            document, self._rest = self._rest, None
            return document
        if self._waiting:
            document = self._waiting.popleft()
            self._waiting_bytes -= _document_bytes(document)
            return document
        return self._read(heldout)

    def _read(self, heldout: _Heldout) -> Document | None:
        """The reader's next document to train on; what is held out before it is put aside."""
        for document in self._documents:
            if heldout_hash(document) >= self._heldout_fraction:
                return document
            heldout.add(document)
        return None

    def _read_ahead(self, heldout: _Heldout, wanted: int) -> None:
        while heldout.wants(wanted) > 0 and self._waiting_bytes < READ_AHEAD_BYTES:
            document = next(self._documents, None)
            if document is None:
                return
            if heldout_hash(document) < self._heldout_fraction:
                heldout.add(document)
            else:
                self._waiting.append(document)
                self._waiting_bytes += _document_bytes(document)

    def _hold_out_waiting(self, heldout: _Heldout, wanted: int, is_last: bool) -> None:
        # A later stage must not starve for the sake of measuring this one.
        available = len(self._waiting) if is_last else len(self._waiting) // 2
        num_chosen = min(heldout.wants(wanted), available)
        if num_chosen <= 0:
            return
        lowest_first = sorted(range(len(self._waiting)), key=lambda index: heldout_hash(self._waiting[index]))
        chosen = set(lowest_first[:num_chosen])
        for index in sorted(chosen):
            heldout.add(self._waiting[index])
        self._waiting = deque(document for index, document in enumerate(self._waiting) if index not in chosen)
        self._waiting_bytes = sum(map(_document_bytes, self._waiting))


class Reader:
    """The stages of a recipe, read from its corpora in order.

    Attributes:
        files: of each corpus.

    Raises:
        UserError: a corpus that is not there (on construction), or cannot be read (while reading).
    """

    def __init__(self, recipe: Recipe, corpus_dir: Path) -> None:
        self._recipe = recipe
        self._stages = recipe.curriculum.stages
        self._formats = {stage.corpus: recipe.corpus.formats.get(stage.corpus, stage.corpus) for stage in self._stages}
        self.files = {name: corpora.locate(corpus_dir, name, format) for name, format in self._formats.items()}
        self._reports: dict[str, ReadReport] = {}
        self._streams: dict[str, CorpusStream] = {}
        self._taken: Counter[str] = Counter()

    def skip_to(self, index: int) -> None:
        """Read past the stages before number `index` that share its corpus, unless that has been done."""
        corpus = self._stages[index].corpus
        earlier = [i for i in range(index) if self._stages[i].corpus == corpus]
        for i in earlier[self._taken[corpus] :]:
            for _ in self.texts(i):
                pass

    def texts(self, index: int) -> Iterator[Text]:
        """Texts of stage number `index`, as `CorpusStream.take` gives them; to be gone through to its end."""
        self.skip_to(index)
        stage, curriculum = self._stages[index], self._recipe.curriculum
        is_last = all(later.corpus != stage.corpus for later in self._stages[index + 1 :])
        stream = self._streams.get(stage.corpus) or self._open(stage.corpus)
        self._taken[stage.corpus] += 1
        yield from stream.take(
            take_bytes(self._recipe, stage), stage.unit, curriculum.heldout_documents, is_last=is_last
        )
        if is_last:
            del self._streams[stage.corpus]

    def report(self, corpus: str) -> ReadReport:
        """A copy of what has been counted and noted in a corpus so far."""
        return deepcopy(self._reports.get(corpus, ReadReport()))

    def _open(self, corpus: str) -> CorpusStream:
        report = self._reports[corpus] = ReadReport()
        documents = corpora.read(
            corpus, self._formats[corpus], self.files[corpus], report, strict=self._recipe.corpus.strict
        )
        self._streams[corpus] = CorpusStream(documents, self._recipe.curriculum.heldout_fraction)
        return self._streams[corpus]


def texts(recipe: Recipe, corpus_dir: Path, max_bytes: int) -> Iterator[str]:
    """Training text to make a tokenizer from: from each stage's start, in proportion to what the stage takes.

    Yields:
        units without their separators, about `max_bytes` of UTF-8 in all; nothing held out.

    Raises:
        UserError: a corpus that is not there or cannot be read.
    """
    reader = Reader(recipe, corpus_dir)
    total = sum(take_bytes(recipe, stage) for stage in recipe.curriculum.stages)
    for index, stage in enumerate(recipe.curriculum.stages):
        left = max_bytes * take_bytes(recipe, stage) / total
        # The stage is read to its end in any case: where it ends, the next of its corpus begins.
        for text in reader.texts(index):
            if left > 0 and not text.heldout:
                left -= text_bytes(text.units)
                yield from (unit.lstrip() for unit in text.units)


def _unit_bytes(unit: str) -> int:
    return len(unit.encode()) - (unit[0] in " \n")


def _document_bytes(document: Document) -> int:
    return sum(len(piece.encode()) for paragraph in document.paragraphs for piece in paragraph)


def _document_of(document: Document, units: list[str]) -> Document:
    """What is left of a document when a stage has taken the units before these."""
    paragraphs: list[list[str]] = []
    for unit in units:
        if unit[0] == "\n" or not paragraphs:
            paragraphs.append([])
        paragraphs[-1].append(unit[1:])
    return Document(document.source, document.id, tuple(tuple(pieces) for pieces in paragraphs))
