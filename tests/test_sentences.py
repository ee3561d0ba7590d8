"""The sentence splitters: our own cases, that no character is ever lost, and that no input takes quadratic time."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitter_cases import CASES

from daramgpt.corpora import kiwi
from daramgpt.corpora.kiwi import split_sentences_kiwi
from daramgpt.corpora.sentences import part_glued, split_sentences
from daramgpt.errors import UserError

GOLD = Path(__file__).parents[2] / "shared" / "sentences" / "ud_sentences.txt"
needs_kiwi = pytest.mark.skipif(find_spec("kiwipiepy") is None, reason="kiwipiepy is not installed")

# Arbitrary text, text dense in the characters that the rules look at, and long runs of pieces that mean something.
_DENSE = st.text(alphabet="가다요니줘라고하음네시오 1.!?…。？\"'“”‘’「」()[]ㅋㅠ^~;-\t\n\u3000\x1c\x85A", max_size=80)
# fmt: off
_PIECES = [
    "갔다.", "갔다", "갑니다 ", "좋아요ㅋㅋ ", "보시오 ", "알려줘\n", "왜? ", "왜?!", "음... ", "(그는 ", "없다.) ",
    '"가자." ', "라고 ", "하더니 ", "“", "” ", "‘", "’ ", "[1] ", "2009. 5. 7. ", "제3조 ", "가. ", "e.g. ", "3.14",
    "。", "^^ .", " . ", "a@b.kr ", "😀 ", "\u1100\u1161다. ", "\u200b", "\x00", "\r\n\r\n", "\u3000", "(((",
    "…. ", "그", "나무가 ",
]
# fmt: on
_LONG = st.lists(st.sampled_from(_PIECES), max_size=400).map("".join)
_TEXTS = st.one_of(st.text(max_size=200), _DENSE, _LONG)


def _splits_naively(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text)


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_boundaries(case: str) -> None:
    assert split_sentences(case.replace("|", " ").replace("‖", "")) == re.split("[|‖]", case)


def test_a_naive_split_gets_two_hundred_cases_wrong() -> None:
    cases = set(CASES.strip().splitlines())
    wrong = [
        case for case in cases if _splits_naively(case.replace("|", " ").replace("‖", "")) != re.split("[|‖]", case)
    ]
    assert len(wrong) >= 200


def _assert_nothing_lost(split: Callable[[str], list[str]], text: str) -> None:
    sentences = split(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)
    position = 0
    for sentence in sentences:
        # A sentence is a piece of the text, its inner white space included.
        position = text.index(sentence, position) + len(sentence)


@settings(max_examples=500, deadline=None)
@given(_TEXTS)
def test_nothing_is_lost(text: str) -> None:
    _assert_nothing_lost(split_sentences, text)


@settings(max_examples=300, deadline=None)
@given(_TEXTS)
def test_parting_adds_nothing_but_newlines(text: str) -> None:
    parted, times = part_glued(text)
    assert parted.replace("\n", "") == text.replace("\n", "")
    assert parted.count("\n") - text.count("\n") == times


@needs_kiwi
@settings(max_examples=100, deadline=None)
@given(_TEXTS)
def test_kiwi_loses_nothing(text: str) -> None:
    _assert_nothing_lost(split_sentences_kiwi, text)


@needs_kiwi
@pytest.mark.parametrize("text", ["가" * 9000, "비가 왔다 " * 2000, "(" * 9000, "나무 " * 4000])
def test_kiwi_reads_long_text_through_its_window(text: str) -> None:
    _assert_nothing_lost(split_sentences_kiwi, text)
    assert len(split_sentences_kiwi(text)) > 1


def test_a_missing_kiwi_is_the_users_to_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "kiwipiepy", None)
    with pytest.raises(UserError, match=r"pip install kiwipiepy"):
        kiwi._analyser.__wrapped__()


def test_space_inside_a_sentence_stays() -> None:
    assert split_sentences("  넓은   들판이다.   바람이 분다. ") == ["넓은   들판이다.", "바람이 분다."]


def test_enumerators_and_an_open_bracket_of_any_length() -> None:
    assert len(split_sentences("1. " * 200_000)) == 1
    assert len(split_sentences("(" + "갔다. " * 100_000)) == 100_000


@pytest.mark.parametrize("unit", ["(", '"', ".", "。", "!", "ㅋ", "^_", "니다~", "다.", "갔다.그", "“갔다. "])
def test_two_megabytes_of_one_unit_come_to_an_end(unit: str) -> None:
    text = unit * (2_000_000 // len(unit.encode()))
    assert "".join(split_sentences(text)).replace(" ", "") == text.replace(" ", "")
    assert part_glued(text)[0].replace("\n", "") == text


def test_glued_sentences_are_parted_and_quotations_are_not() -> None:
    assert part_glued("비가 왔다.눈이 왔다.라고 썼다.") == ("비가 왔다.\n눈이 왔다.라고 썼다.", 1)
    assert part_glued("고생?했지만 최고!였다는 말을 합리적？필요적")[1] == 1
    assert part_glued("쾅!하는 소리에 “누구냐?”라고 물었다")[1] == 0


def _boundaries(sentences: list[str]) -> set[int]:
    ends, position = set(), 0
    for sentence in sentences[:-1]:
        position += len("".join(sentence.split()))
        ends.add(position)
    return ends


@pytest.mark.skipif(not GOLD.exists(), reason="the gold sentences are not on this machine")
@pytest.mark.parametrize(("num_lines", "least"), [(4353, 0.999), (None, 0.96)])
def test_f1_on_gold_sentences(num_lines: int | None, least: float) -> None:
    gold = [line.strip() for line in GOLD.read_text(encoding="utf-8").splitlines() if line.strip()][:num_lines]
    num_right = num_found = num_gold = 0
    for start in range(0, len(gold), 8):
        group = gold[start : start + 8]
        expected, found = _boundaries(group), _boundaries(split_sentences(" ".join(group)))
        num_right += len(expected & found)
        num_found += len(found)
        num_gold += len(expected)
    assert 2 * num_right / (num_found + num_gold) >= least
