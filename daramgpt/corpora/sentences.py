"""Sentence splitting by compiled rules.

One pattern finds every place where a sentence may end: marks (``.!?…``) before white space or before the next
sentence glued on, and the endings that informal text leaves without a mark (``니다``, ``요``, ``줘``). A few cheap
checks on the characters around each place decide. No dictionary and no model: a morphological analyser gets more
out of informal text but is over a hundred times slower. The text comes out unchanged but for the white space
between sentences.
"""

from __future__ import annotations

import re

# The first class lets the regex engine skip to a possible place before it tries anything else.
_CANDIDATE = re.compile(
    r"[.!?…。！？다요줘](?:"
    r"(?<=[.!?…。！？])[.!?…。！？~]*(?P<closers>[\"'”’」』》〉)\]}]*)(?:\s+|(?=[가-힣\"“‘]))"
    r"|(?<=니다)[~;^]*\s+"
    r"|(?<=[가-힣][세어아해네군지데까나예에워와져려구고여싸봐돼거내]요)[~;^]*\s+"
    r"|(?<=[가-힣][려여아어]줘)[~;^]*\s+"
    r")"
)
_GLUED = re.compile(r"[.!?](?<=[가-힣][다요죠까네음함됨임].)[.!?]*(?=[가-힣])")
# Glued to the end of a quoted sentence these are particles, not the next sentence.
_GLUED_PAIR = re.compile(rf"{_GLUED.pattern}(?!이?라(?:고|는|며|면서|던)|고 |며 |는 |란 )")
# After a quotation, a cry or a sentence quoted without marks these words go on with the sentence around it.
_SAYING = re.compile(
    r"이?라(?:고|는|며|면서|던|지만|[ ,.])|(?:고|며|면서|는|란|할|해|해서|하(?:고|고는|는|며|면서|던|자|여|니))[ ,]"
    r"|하(?:였다|시[는며던]|셨|기[에를도]|지 [않못])|한다|했(?:다|는|지|던|고|을)|고는 |같은 |처럼 |등의? "
)
# Full stops of initials, enumerators, abbreviations and numbers (dates, most of all).
_NO_END = re.compile(
    r"(?:(?:^|[\s(\[.])(?:[A-Z]|[가나다라마바사아자차카타파하]|Mr|Mrs|Ms|Dr|Prof|St|No|vs|Vol|Jr|Sr|Inc|Ltd|Co|cf|pp?)|\d)\.$"
)
# Longest abbreviation above, with what stands on both sides of it.
_NO_END_LENGTH = 8
_FINAL_SYLLABLES = frozenset("다요죠까네지음임함됨슴냐군걸라자오")
_EMOTICONS = re.compile(r"(?:(?:[ㄱ-ㅎㅏ-ㅣ]+|\^[\^_.0oㅡ]*\^|[~;!^]+)\s*)+")
# A bracket or quotation that is not closed within so many characters never is.
_LONGEST_INSERTION = 300


def part_glued(text: str) -> tuple[str, int]:
    """The text with a newline wherever two sentences stand together without a space, and how often that was."""
    return _GLUED_PAIR.subn("\\g<0>\n", text)


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, without outer white space; none is empty."""
    sentences = []
    start = 0
    has_insertions = '"' in text or "(" in text or "“" in text
    for match in _CANDIDATE.finditer(text):
        end = match.end()
        if end >= len(text):
            break
        if end <= start or not _may_end(text, match) or (has_insertions and _inside(text, start, end)):
            continue
        if emoticons := _EMOTICONS.match(text, end):
            end = emoticons.end()
        sentences.append(text[start:end].strip())
        start = end
    if rest := text[start:].strip():
        sentences.append(rest)
    return sentences


def _may_end(text: str, match: re.Match[str]) -> bool:
    first, end = match.span()
    mark, following = text[first], text[end]
    if not text[end - 1].isspace():
        if not _GLUED_PAIR.match(text, first):
            return False
    elif mark in "다요줘!?" or match["closers"]:
        if _SAYING.match(text, end):
            return False
    elif mark == "." or mark == "…":
        final = text[first - 1] in _FINAL_SYLLABLES
        next_mark = text[first + 1]
        if mark == "…" or next_mark in ".…":
            # An ellipsis is a pause, not an end, unless the verb is finite or a full stop of its own follows.
            if not final and not (mark == "…" and next_mark == "."):
                return False
        elif not (final and text[first - 2].isalpha()) and _NO_END.search(
            text, max(0, first - _NO_END_LENGTH), first + 1
        ):
            return False
    return following not in ",.;:)]}…~"


def _inside(text: str, start: int, end: int) -> bool:
    """Whether a bracket or quotation that opened in this sentence is still open, and closes soon."""
    if end - start > 4 * _LONGEST_INSERTION:
        return False
    limit = end + _LONGEST_INSERTION
    for opening, closing in ("()", "“”"):
        if text.rfind(opening, start, end) > text.rfind(closing, start, end) and text.find(closing, end, limit) >= 0:
            return True
    return text.count('"', start, end) % 2 == 1 and text.find('"', end, limit) >= 0
