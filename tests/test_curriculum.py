"""The order of the texts, what a stage takes of them, and what is never trained on."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from daramgpt import curriculum
from daramgpt.corpora import Document
from daramgpt.curriculum import CorpusStream, Taken, TextDocument, TextUnits, cut, stages, take_bytes, texts
from daramgpt.recipe import Recipe, validate

SHARED = Path(__file__).parents[2] / "shared"

words = st.lists(
    st.sampled_from(["하늘이", "맑다.", "비가", "왔다.", "1997년", "K리그", "바다!", "끝"]), min_size=1, max_size=12
)
pieces = words.map(" ".join)
paragraphs = st.lists(st.lists(pieces, min_size=1, max_size=3).map(tuple), min_size=1, max_size=4).map(tuple)
contents = st.lists(paragraphs, min_size=1, max_size=20)
units_of = st.sampled_from(["sentence", "paragraph"])


def documents_of(contents: Iterable[tuple[tuple[str, ...], ...]]) -> list[Document]:
    return [Document("web", str(number), paragraphs) for number, paragraphs in enumerate(contents)]


def make_documents(count: int, source: str = "web", size: int = 30) -> list[Document]:
    return [
        Document(
            source, str(number), tuple((f"{source} 글 {number}의 {place}번째 문장이다.",) for place in range(size))
        )
        for number in range(count)
    ]


def heldout_hash(document: Document) -> float:
    return curriculum.heldout_hash(document.source, document.id)


def stream_of(documents: Iterable[Document], heldout_fraction: float) -> CorpusStream[TextUnits]:
    return CorpusStream(map(TextDocument, documents), heldout_fraction)


def split(stage: Iterable[Taken[TextUnits]]) -> tuple[list[Taken[TextUnits]], list[Taken[TextUnits]]]:
    stage = list(stage)
    return [text for text in stage if not text.heldout], [text for text in stage if text.heldout]


def make_recipe(*stages: tuple[str, str, int, str], **curriculum: object) -> Recipe:
    listed = [{"name": name, "corpus": corpus, "take": take, "unit": unit} for name, corpus, take, unit in stages]
    data = {"name": "test", "curriculum": {"stages": listed, **curriculum}, "teacher": {"model": "not-read-here"}}
    return validate(data, "test")


@settings(max_examples=50, deadline=None)
@given(contents, units_of)
def test_units_joined_are_the_text(contents: list[tuple[tuple[str, ...], ...]], unit: str) -> None:
    for document in documents_of(contents):
        assert "".join(cut(document, unit)) == "\n".join(" ".join(paragraph) for paragraph in document.paragraphs)


def test_paragraphs_stay_whole_and_sentences_part() -> None:
    document = Document("written", "1", (("비가 왔다. 하늘이 맑다.", "끝이다."), ("바다가 넓다.",)))
    assert cut(document, "paragraph") == ["비가 왔다. 하늘이 맑다. 끝이다.", "\n바다가 넓다."]
    assert cut(document, "sentence") == ["비가 왔다.", " 하늘이 맑다.", " 끝이다.", "\n바다가 넓다."]


@settings(max_examples=50, deadline=None)
@given(contents, st.lists(st.tuples(st.integers(1, 400), units_of), min_size=1, max_size=5))
def test_stages_go_on_where_the_one_before_ended(
    contents: list[tuple[tuple[str, ...], ...]], stages: list[tuple[int, str]]
) -> None:
    documents = documents_of(contents)
    stream = stream_of(documents, 0.0)
    seen: list[str] = []
    for num_bytes, kind in stages:
        training, heldout = split(stream.take(num_bytes, kind, 4, is_last=False))
        assert not heldout
        units = [unit for text in training for unit in text.units.texts]
        seen += [word for unit in units for word in unit.split()]
        taken = TextUnits(tuple(units)).num_bytes
        everything = [word for document in documents for word in "".join(cut(document, kind)).split()]
        if len(seen) < len(everything):
            # Only the unit that reaches the size goes beyond it.
            assert taken >= num_bytes > taken - len(units[-1].encode())
        assert seen == everything[: len(seen)]


@settings(max_examples=50, deadline=None)
@given(contents, st.floats(0.0, 0.45), st.integers(0, 5), st.lists(st.integers(1, 600), min_size=1, max_size=4))
def test_nothing_held_out_is_trained_on_and_nothing_twice(
    contents: list[tuple[tuple[str, ...], ...]], fraction: float, wanted: int, takes: list[int]
) -> None:
    documents = documents_of(contents)
    stream = stream_of(documents, fraction)
    trained, measured = [], []
    for number, num_bytes in enumerate(takes):
        training, heldout = split(stream.take(num_bytes, "sentence", wanted, is_last=number == len(takes) - 1))
        trained += [(text.id, unit) for text in training for unit in text.units.texts]
        measured += heldout
    measured_ids = [text.id for text in measured]
    assert len(set(measured_ids)) == len(measured_ids)
    assert not set(measured_ids) & {id for id, _ in trained}
    for text in measured:
        assert list(text.units.texts) == cut(documents[int(text.id)], "sentence")
    for document in documents:
        assert heldout_hash(document) >= fraction or all(id != document.id for id, _ in trained)
        units = [unit.strip() for id, unit in trained if id == document.id]
        assert units == [unit.strip() for unit in cut(document, "sentence")][: len(units)]


def test_held_out_documents_depend_on_their_id_alone() -> None:
    held = {d.id for d in make_documents(2000) if heldout_hash(d) < 0.05}
    assert 60 <= len(held) <= 140
    fewer = [d for d in make_documents(2000, size=1) if int(d.id) % 2]
    assert {d.id for d in fewer if heldout_hash(d) < 0.05} == {id for id in held if int(id) % 2}
    assert held != {d.id for d in make_documents(2000, source="wiki") if heldout_hash(d) < 0.05}


def test_a_short_stage_reads_ahead_and_the_next_gets_what_was_passed_over() -> None:
    documents = make_documents(400)
    stream = stream_of(documents, 0.02)
    first, heldout = split(stream.take(2000, "sentence", 4, is_last=False))
    assert len(heldout) == 4 and all(heldout_hash(documents[int(text.id)]) < 0.02 for text in heldout)
    assert max(int(text.id) for text in heldout) > len(first)
    second, _ = split(stream.take(10**9, "sentence", 4, is_last=True))
    ids = list(dict.fromkeys(text.id for text in first + second))
    assert ids == [document.id for document in documents if heldout_hash(document) >= 0.02]


def test_a_corpus_of_few_documents_holds_out_some_that_were_never_trained_on() -> None:
    stream = stream_of(make_documents(12), 1e-9)
    training, heldout = split(stream.take(100, "sentence", 4, is_last=True))
    assert len(heldout) == 4
    assert not {text.id for text in training} & {text.id for text in heldout}


def test_held_out_text_and_waiting_documents_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum.stream, "HELDOUT_BYTES", 5000)
    monkeypatch.setattr(curriculum.stream, "READ_AHEAD_BYTES", 20_000)
    read = 0

    def documents() -> Iterator[Document]:
        nonlocal read
        for document in make_documents(3000):
            read += 1
            yield document

    stream = stream_of(documents(), 0.4)
    _, heldout = split(stream.take(200_000, "sentence", 4, is_last=False))
    assert 0 < sum(sum(text.units.unit_bytes) for text in heldout) <= 5000
    read_so_far = read
    stream = stream_of(documents(), 1e-9)
    list(stream.take(1, "sentence", 4, is_last=False))
    assert read - read_so_far <= 1 + 20_000 // TextDocument(make_documents(1)[0]).text_bytes + 1


@pytest.fixture
def two_corpora(tmp_path: Path) -> Path:
    """A folder with corpora of 300 documents each."""
    for name in ("web", "wiki"):
        (tmp_path / name).mkdir()
        lines = [
            json.dumps({"id": d.id, "text": "\n".join(piece for paragraph in d.paragraphs for piece in paragraph)})
            for d in make_documents(300, source=name)
        ]
        (tmp_path / name / "texts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return tmp_path


STAGES = (("a", "web", 20_000, "sentence"), ("b", "wiki", 9000, "paragraph"), ("c", "web", 30_000, "paragraph"))


def test_stages_come_in_order_and_go_on_in_their_corpus(two_corpora: Path) -> None:
    first, second, third = [split(taken) for _, taken in stages(make_recipe(*STAGES), two_corpora)]
    assert {text.units.texts[0].split()[0] for text in second[0]} == {"wiki"}
    assert first[0][0].id == "0"
    assert int(first[0][-1].id) <= int(third[0][0].id) <= int(first[0][-1].id) + 1
    assert [int(text.id) for text in third[0]] == sorted(int(text.id) for text in third[0])


def test_scale_shrinks_every_stage(two_corpora: Path) -> None:
    recipe = make_recipe(*STAGES, scale=0.1)
    assert [take_bytes(recipe, stage) for stage in recipe.curriculum.stages] == [2000, 900, 3000]
    _, taken = next(stages(recipe, two_corpora))
    assert 2000 <= sum(sum(text.units.unit_bytes) for text in split(taken)[0]) < 2100


def test_tokenizer_text_comes_from_all_stages_and_is_not_held_out(two_corpora: Path) -> None:
    recipe = make_recipe(*STAGES, heldout_fraction=0.1)
    lines = list(texts(recipe, two_corpora, max_bytes=20_000))
    sources = {line.split()[0] for line in lines}
    assert sources == {"web", "wiki"}
    assert 15_000 <= sum(len(line.encode()) for line in lines) <= 30_000
    assert all(line == line.strip() and "\n" not in line for line in lines)
    held = {
        unit.strip()
        for _, taken in stages(recipe, two_corpora)
        for text in split(taken)[1]
        for unit in text.units.texts
    }
    assert held and not held & set(lines)


def test_an_overlong_unit_is_cut_at_white_space(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(curriculum.units, "LONGEST_UNIT_CHARACTERS", 20)
    text = "바다가 넓고 하늘이 맑으며 " * 5 + "가" * 50 + " 끝"
    document = Document("web", "1", (("짧다.", text), (text,)))
    for unit in ("sentence", "paragraph"):
        units = cut(document, unit)
        assert max(map(len, units)) <= 21
        assert "".join(units) == f"짧다. {text}\n{text}"


@pytest.mark.skipif(not SHARED.is_dir(), reason="the sample corpora are not on this machine")
def test_five_stages_of_the_full_recipe_on_sample_corpora() -> None:
    from daramgpt.recipe import load

    recipe = load("daramgpt", ["curriculum.scale=0.0001"])
    for stage, taken in stages(recipe, SHARED / "corpora"):
        training, heldout = split(taken)
        assert heldout
        assert sum(sum(text.units.unit_bytes) for text in training) >= take_bytes(recipe, stage)
