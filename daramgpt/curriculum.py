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
from collections import deque
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from hashlib import blake2b
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Protocol, Self, TypeVar

from daramgpt import corpora
from daramgpt.corpora import Corpus, Document, ReadReport
from daramgpt.corpora.hub import HubDataset
from daramgpt.corpora.kiwi import split_sentences_kiwi
from daramgpt.run_directory import RunDirectory

if TYPE_CHECKING:
    from daramgpt.recipe import Recipe, Stage

READ_AHEAD_BYTES = 8_000_000
HELDOUT_BYTES = 2_000_000
# Far beyond any sentence or paragraph: what is longer is cut at white space, lest a tokenizer be given a whole book.
LONGEST_UNIT_CHARACTERS = 50_000

SPLITTERS = {"rules": corpora.split_sentences, "kiwi": split_sentences_kiwi}


def corpus_dir(recipe: Recipe, run: RunDirectory) -> Path:
    """The folder that holds the corpora: the user's, or the run's own where the package makes them."""
    return Path(recipe.corpus.dir) if recipe.corpus.dir else run.corpora


def find_corpora(recipe: Recipe, corpus_dir: Path) -> dict[str, Corpus]:
    """Where each corpus of the recipe is, by name.

    Raises:
        UserError: one is not there.
    """
    found = {}
    for name in dict.fromkeys(stage.corpus for stage in recipe.curriculum.stages):
        if (dataset := recipe.corpus.datasets.get(name)) is not None:
            found[name] = Corpus(name, "datasets", [], HubDataset(**dataset.model_dump()))
        else:
            found[name] = corpora.find(corpus_dir, name, recipe.corpus.formats.get(name))
    return found


def take_bytes(recipe: Recipe, stage: Stage) -> int:
    """Bytes of pure text (UTF-8, separators not counted) that a stage takes."""
    return max(1, round(stage.take * recipe.curriculum.scale))


def cut(document: Document, unit: str, splitter: str = "rules") -> list[str]:
    """Units of a document, each with the separator before it: nothing before the first, a line feed before the first
    of a paragraph, else a space. Joined by nothing they are the text.

    Args:
        unit: ``"sentence"`` or ``"paragraph"``.
        splitter: a name in `SPLITTERS`.
    """
    units: list[str] = []
    split = SPLITTERS[splitter]
    for paragraph in document.paragraphs:
        if unit == "paragraph":
            parts = [" ".join(paragraph)]
        else:
            parts = [sentence for piece in paragraph for sentence in split(piece)]
        separator = "\n" if units else ""
        for part in parts:
            units.append(separator + part)
            if len(part) > LONGEST_UNIT_CHARACTERS:
                units[-1:] = _cut_long(units[-1])
            separator = " "
    return units


def _cut_long(unit: str) -> list[str]:
    """A unit in parts that each but the first begin with the space that they were cut at, where there is one."""
    parts = []
    start = 0
    while len(unit) - start > LONGEST_UNIT_CHARACTERS:
        end = unit.rfind(" ", start + 1, start + LONGEST_UNIT_CHARACTERS)
        end = end if end > 0 else start + LONGEST_UNIT_CHARACTERS
        parts.append(unit[start:end])
        start = end
    return [*parts, unit[start:]]


def separator_bytes(unit: str) -> int:
    """Bytes of the separator that a unit begins with: 0 or 1."""
    return int(unit[0] in " \n")


def heldout_hash(source: str, document_id: str) -> float:
    """A number in [0, 1), uniform over documents, that depends on a document's corpus and id alone."""
    digest = blake2b(f"{source}/{document_id}".encode(errors="replace"), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64


class Units(Protocol):
    """A document cut into units, in whatever form: text or tokens."""

    @property
    def unit_bytes(self) -> Collection[Any]:
        """UTF-8 bytes of each unit, its separator not counted; integers."""

    @property
    def num_bytes(self) -> int:
        """Their sum."""

    def first(self, num_units: int) -> Self:
        """The units before `num_units`."""


UnitsT = TypeVar("UnitsT", bound=Units)


class Readable(Protocol[UnitsT]):
    """A document that the curriculum deals out, in whatever form."""

    source: str
    id: str
    text_bytes: int

    def cut(self, unit: str) -> UnitsT:
        """The document in units."""

    def rest(self, unit: str, num_units: int) -> Readable[UnitsT]:
        """The document without its first units."""


@dataclass(frozen=True, slots=True)
class Taken(Generic[UnitsT]):
    """A document, or the part of it that a stage takes.

    Attributes:
        heldout: whether it is for measuring only.
    """

    id: str
    units: UnitsT
    heldout: bool = False


@dataclass(slots=True)
class Heldout:
    """Held-out documents of a stage, `HELDOUT_BYTES` of text at most but one document at least."""

    num_documents: int = 0
    num_bytes: int = 0

    def takes(self, document: Readable[UnitsT]) -> bool:
        if self.num_documents and self.num_bytes + document.text_bytes > HELDOUT_BYTES:
            return False
        self.num_documents += 1
        self.num_bytes += document.text_bytes
        return True

    def wants(self, num_documents: int) -> int:
        """How many are missing to so many documents."""
        return num_documents - self.num_documents if self.num_bytes < HELDOUT_BYTES else 0


class CorpusStream(Generic[UnitsT]):
    """One pass through one corpus, which stage after stage is taken from.

    Between two texts its whole state is how many documents it has drawn from `documents`, and its attributes.

    Args:
        documents: in reading order.
        heldout_fraction: share of documents that are never trained on.

    Attributes:
        rest: of the document that the last stage cut, if any.
        waiting: documents passed over by reading ahead.
        heldout: what the stage that is taken has of them.
    """

    def __init__(self, documents: Iterator[Readable[UnitsT]], heldout_fraction: float) -> None:
        self._documents = documents
        self._heldout_fraction = heldout_fraction
        self.rest: Readable[UnitsT] | None = None
        self.waiting: deque[Readable[UnitsT]] = deque()
        self.heldout = Heldout()

    def take(
        self,
        num_bytes: int,
        unit: str,
        heldout_documents: int,
        is_last: bool,
        taken_bytes: int = 0,
        heldout_so_far: tuple[int, int] = (0, 0),
    ) -> Iterator[Taken[UnitsT]]:
        """The next stage: training texts in order, and among them whole documents that are held out.

        Held-out documents beyond `HELDOUT_BYTES` are left out of both. To be gone through to its end.

        Args:
            num_bytes: pure text to train on; less comes only where the corpus ends.
            unit: ``"sentence"`` or ``"paragraph"``.
            heldout_documents: how many to have at least, if need be by reading ahead.
            is_last: whether no later stage reads this corpus.
            taken_bytes: what the stage has of `num_bytes` already, if it is gone on with.
            heldout_so_far: the same of its held-out documents: their number and bytes.
        """
        heldout = self.heldout = Heldout(*heldout_so_far)
        left = num_bytes - taken_bytes
        while left > 0:
            if self.rest is not None:
                document, self.rest = self.rest, None
            elif self.waiting:
                document = self.waiting.popleft()
            elif (drawn := next(self._documents, None)) is None:
                break
            else:
                document = drawn
                if self._is_heldout(document):
                    if heldout.takes(document):
                        yield Taken(document.id, document.cut(unit), heldout=True)
                    continue
            units = document.cut(unit)
            drawn_bytes = units.num_bytes
            if drawn_bytes > left:
                num_units = bisect_left(list(accumulate(map(int, units.unit_bytes))), left) + 1
                if num_units < len(units.unit_bytes):
                    self.rest = document.rest(unit, num_units)
                    units = units.first(num_units)
                    drawn_bytes = units.num_bytes
            left -= drawn_bytes
            yield Taken(document.id, units)
        if self._heldout_fraction > 0:
            for document in (
                *self._read_ahead(heldout, heldout_documents),
                *self._hold_out_waiting(heldout, heldout_documents, is_last),
            ):
                yield Taken(document.id, document.cut(unit), heldout=True)

    def _is_heldout(self, document: Readable[UnitsT]) -> bool:
        return heldout_hash(document.source, document.id) < self._heldout_fraction

    def _read_ahead(self, heldout: Heldout, wanted: int) -> Iterator[Readable[UnitsT]]:
        waiting_bytes = sum(document.text_bytes for document in self.waiting)
        while heldout.wants(wanted) > 0 and waiting_bytes < READ_AHEAD_BYTES:
            document = next(self._documents, None)
            if document is None:
                return
            if not self._is_heldout(document):
                self.waiting.append(document)
                waiting_bytes += document.text_bytes
            elif heldout.takes(document):
                yield document

    def _hold_out_waiting(self, heldout: Heldout, wanted: int, is_last: bool) -> list[Readable[UnitsT]]:
        # A later stage must not starve for the sake of measuring this one.
        available = len(self.waiting) if is_last else len(self.waiting) // 2
        num_chosen = min(heldout.wants(wanted), available)
        if num_chosen <= 0:
            return []
        hashes = [heldout_hash(document.source, document.id) for document in self.waiting]
        lowest = set(sorted(range(len(hashes)), key=hashes.__getitem__)[:num_chosen])
        chosen = [self.waiting[index] for index in sorted(lowest)]
        self.waiting = deque(document for index, document in enumerate(self.waiting) if index not in lowest)
        return [document for document in chosen if heldout.takes(document)]


@dataclass(frozen=True, slots=True)
class TextUnits:
    """`Units` as text; each with its separator, as `cut` gives them."""

    texts: tuple[str, ...]

    @property
    def unit_bytes(self) -> list[int]:
        return [len(text.encode()) - separator_bytes(text) for text in self.texts]

    @property
    def num_bytes(self) -> int:
        return sum(self.unit_bytes)

    def first(self, num_units: int) -> TextUnits:
        return TextUnits(self.texts[:num_units])


class TextDocument:
    """A `Readable` that is read, cut and used as text.

    Args:
        splitter: of sentences, a name in `SPLITTERS`.
    """

    def __init__(self, document: Document, splitter: str = "rules") -> None:
        self.source, self.id = document.source, document.id
        self.text_bytes = document_bytes(document)
        self._document, self._splitter = document, splitter

    def cut(self, unit: str) -> TextUnits:
        return TextUnits(tuple(cut(self._document, unit, self._splitter)))

    def rest(self, unit: str, num_units: int) -> TextDocument:
        return TextDocument(rest_of(self._document, unit, num_units, self._splitter), self._splitter)


def document_bytes(document: Document) -> int:
    """UTF-8 bytes of a document's pieces."""
    return sum(len(piece.encode()) for paragraph in document.paragraphs for piece in paragraph)


def rest_of(document: Document, unit: str, num_units: int, splitter: str) -> Document:
    """What is left of a document when a stage has taken its first units."""
    paragraphs: list[list[str]] = []
    for text in cut(document, unit, splitter)[num_units:]:
        if text[0] == "\n" or not paragraphs:
            paragraphs.append([])
        paragraphs[-1].append(text[separator_bytes(text) :])
    return Document(document.source, document.id, tuple(tuple(pieces) for pieces in paragraphs))


def is_last_of_corpus(recipe: Recipe, number: int) -> bool:
    """Whether no stage after this one reads the same corpus."""
    stages = recipe.curriculum.stages
    return all(later.corpus != stages[number].corpus for later in stages[number + 1 :])


def stages(recipe: Recipe, corpus_dir: Path) -> Iterator[tuple[Stage, Iterator[Taken[TextUnits]]]]:
    """The stages with their texts, read by this process alone; each to be gone through before the next.

    Raises:
        UserError: a corpus that is not there or cannot be read.
    """
    streams = {}
    for name, corpus in find_corpora(recipe, corpus_dir).items():
        documents = corpora.read(corpus, ReadReport(), strict=recipe.corpus.strict)
        splitter = recipe.corpus.splitters.get(name, "rules")
        readable = (TextDocument(document, splitter) for document in documents)
        streams[name] = CorpusStream(readable, recipe.curriculum.heldout_fraction)
    for number, stage in enumerate(recipe.curriculum.stages):
        yield (
            stage,
            streams[stage.corpus].take(
                take_bytes(recipe, stage),
                stage.unit,
                recipe.curriculum.heldout_documents,
                is_last=is_last_of_corpus(recipe, number),
            ),
        )


def texts(recipe: Recipe, corpus_dir: Path, max_bytes: int) -> Iterator[str]:
    """Training text to make a tokenizer from: from each stage's start, in proportion to what the stage takes.

    Yields:
        units without their separators, about `max_bytes` of UTF-8 in all; nothing held out.

    Raises:
        UserError: a corpus that is not there or cannot be read.
    """
    total = sum(take_bytes(recipe, stage) for stage in recipe.curriculum.stages)
    for stage, taken in stages(recipe, corpus_dir):
        left = max_bytes * take_bytes(recipe, stage) / total
        # The stage is read to its end in any case: where it ends, the next of its corpus begins.
        for text in taken:
            if left > 0 and not text.heldout:
                left -= sum(text.units.unit_bytes)
                yield from (unit.lstrip() for unit in text.units.texts)


def text_bytes(units: Iterable[str]) -> int:
    """UTF-8 bytes of units, their separators not counted."""
    return sum(len(unit.encode()) - separator_bytes(unit) for unit in units)
