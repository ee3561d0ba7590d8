"""The sentence splitter: our own cases, and that no character is ever lost."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from splitter_cases import CASES

from daramgpt.corpora import split_sentences
from daramgpt.corpora.sentences import part_glued

GOLD = Path(__file__).parents[2] / "shared" / "sentences" / "ud_sentences.txt"


@pytest.mark.parametrize("case", CASES.strip().splitlines())
def test_boundaries(case: str) -> None:
    assert split_sentences(case.replace("|", " ").replace("‖", "")) == re.split("[|‖]", case)


@settings(max_examples=300, deadline=None)
@given(st.text(alphabet="가다요니줘라고하 1.!?…\"'“”()[]ㅋ^~\t\n\u3000A", max_size=80))
def test_nothing_is_lost(text: str) -> None:
    sentences = split_sentences(text)
    assert "".join("".join(sentences).split()) == "".join(text.split())
    assert all(sentence and sentence == sentence.strip() for sentence in sentences)


def test_space_inside_a_sentence_stays() -> None:
    assert split_sentences("  넓은   들판이다.   바람이 분다. ") == ["넓은   들판이다.", "바람이 분다."]


def test_a_paragraph_of_enumerators_takes_linear_time() -> None:
    assert len(split_sentences("1. " * 200_000)) == 1
    assert len(split_sentences("(" + "갔다. " * 100_000)) == 100_000


def test_glued_sentences_are_parted_and_quotations_are_not() -> None:
    assert part_glued("비가 왔다.눈이 왔다.라고 썼다.") == ("비가 왔다.\n눈이 왔다.라고 썼다.", 1)


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
