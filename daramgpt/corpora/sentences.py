"""Sentence splitting by compiled rules.

One pattern finds every place where a sentence may end: marks (``.!?…``) before white space or before the next
sentence glued on, and the endings that informal text leaves without a mark (``니다``, ``요``, ``줘``, ``다ㅋㅋ``). A
few cheap checks on the characters around each place decide: whether it is a date, an enumerator or an abbreviation,
whether a bracket or quotation is still open, whether a quotation goes on with ``라고``. No dictionary and no model:
the morphological analyser of `daramgpt.corpora.kiwi` is some two hundred times slower. Time is linear in any text, and
the text comes out unchanged but for the white space between sentences.

What rules cannot see: informal sentences that end in a noun or a plain verb and have no mark, and sentences that end in
a number and look like an enumerator or a date.
"""

from __future__ import annotations

import re

# The first class lets the regex engine skip to a possible place before it tries anything else. A run of marks is one
# place and is never given back, else a long run would take quadratic time.
_CANDIDATE = re.compile(
    r"[.!?…。！？다요줘오ㅋㅎㅠㅜ](?:"
    r"(?<=[.!?…。！？])(?<![.!?…。！？].)[.!?…。！？~]*+(?P<closers>[\"'”’」』》〉)\]}]*+)(?:\s+|(?=[가-힣“‘「『]))"
    r"|(?=[\s~;^ㄱ-ㅎㅏ-ㅣ])(?:"
    r"(?<=니다)"
    r"|(?<=[가-힣][세어아해네군지데까나예에워와져려구고여싸봐돼거내게께든걸셔줘뻐빠래라러서커써켜쳐겨춰둬]요)"
    r"|(?<=[가-힣][려여아어]줘)"
    r"|(?<=[으십르쓰주하리보가두기치키내]시오)"
    r"|(?<=[ㅋㅎㅠㅜ])(?:(?<=[가-힣][다네임함죠까냐].)|(?<=[가-힣][다네임함죠까냐] .)"
    r"|(?<=[았었였했겠있없됐]음.)|(?<=[았었였했겠있없됐]음 .))"
    r")[~;^ㄱ-ㅎㅏ-ㅣ]*+\s+"
    r")"
)
# Where the space is missing an ending must stand before a full stop or a question mark (``고생?했다``, ``확인？점검``
# are no ends); the ideographic full stop carries its own space.
# As above, one class first: the regex engine then skips to the next mark.
_GLUED = re.compile(
    r"[.!?！？。](?:(?:(?<=[가-힣][다요죠까네음함됨임][.!?！？])|(?<=[가-힣][가-힣][!！])|(?<=[가-힣][가냐니나데][?？]))[.!?！？]*"
    r"|(?<!。。)(?<=。)。*)"
    r"(?=[가-힣]|[“‘「『](?=[가-힣])(?!이?라[고는며]|[고며는란] ))"
)
_PARTICLE = r"이?라(?:고|는|며|면서|던)"
# Glued to the end of a quoted sentence these are particles, not the next sentence.
_GLUED_PAIR = re.compile(rf"{_GLUED.pattern}(?!{_PARTICLE}|하(?:고|며|면서|는)|[고며는란가를을은의도로] )")
_QUOTING = re.compile(rf"{_PARTICLE}[ ,]")
# After a quotation, a cry or a sentence quoted without marks these words go on with the sentence around it.
_SAYING = re.compile(
    r"이?라(?:고|는|며|면서|던|지만|[ ,.])"
    r"|(?:고|며|면서|는|란|할|해|해서|하(?:고|고는|는|며|면서|던|자|여|니|니까|더니|다가|매))[ ,]"
    r"|하(?:였다|시[는며던고니더]|셨|기[에를도]|지 [않못])|한다|한 (?:뒤|다음|후)|했(?:다|는|지|던|고|을|더니)"
    r"|[가를을은의] |고는 |같은 |처럼 |등의? "
)
_SAYING_STARTS = frozenset("이라고며면는란할해하한했가를을은의같처등")
# Full stops of initials, enumerators, abbreviations and numbers (dates, most of all).
_NO_END = re.compile(
    r"(?:(?:^|[\s(\[.“‘\"'])(?:[A-Z]|[가나다라마바사아자차카타파하]|[ㄱ-ㅅ]|[Ⅰ-ⅿ]|[IVX]{2,4}|[ivx]{1,4}"
    r"|Mr|Mrs|Ms|Dr|Prof|St|Mt|[Nn]os?|vs|[Vv]ol|[Ff]igs?|[Ee]qs?|[Cc]h|[Ss]ec|eds?|al|Jr|Sr|Inc|Ltd|Co|Corp|Rev|cf|ca|pp?|approx)"
    r"|\.[a-z]|^[거너더러머버서어저처커터퍼허]|\d[조항호목편장절관]?)\.$"
)
# Longest abbreviation above, with what stands on both sides of it.
_NO_END_LENGTH = 8
_FINAL_SYLLABLES = frozenset("다요죠까네지음임함됨슴냐군걸라자오")
_EMOTICONS = re.compile(r"(?:(?:[ㄱ-ㅎㅏ-ㅣ]{2,}|[ㅋㅎㅠㅜㅡ]|\^[\^_.0oㅡ]*\^|[~;!^]+)\s*)++(?:[.!?…]++(?:\s+|$))?")
_INSERTIONS = (("(", ")"), ("“", "”"), ("‘", "’"), ("「", "」"), ("『", "』"), ("[", "]"), ('"', '"'))
_OPENING = frozenset("([{\"'“‘「『《〈<`")
# A bracket or quotation that is not closed within so many characters never is.
_LONGEST_INSERTION = 300


def part_glued(text: str) -> tuple[str, int]:
    """The text with a newline wherever two sentences stand together without a space, and how often that was."""
    return _GLUED_PAIR.subn("\\g<0>\n", text)


def split_sentences(text: str) -> list[str]:
    """Sentences of a paragraph, without outer white space; none is empty."""
    sentences = []
    start = 0
    insertions: list[tuple[str, str]] | None = None
    for match in _CANDIDATE.finditer(text):
        end = match.end()
        if end >= len(text):
            break
        if end <= start or not _may_end(text, match, start):
            continue
        if insertions is None:
            insertions = [pair for pair in _INSERTIONS if pair[0] in text]
        if insertions and _inside(text, start, end, insertions):
            continue
        if text[end] < "가" and (emoticons := _EMOTICONS.match(text, end)):
            end = emoticons.end()
        sentences.append(text[start:end].strip())
        start = end
    if rest := text[start:].strip():
        sentences.append(rest)
    return sentences


def _may_end(text: str, match: re.Match[str], start: int) -> bool:
    first, end = match.span()
    mark, following = text[first], text[end]
    if following in ",.:)]}…":
        return False
    if not text[end - 1].isspace():
        return _GLUED_PAIR.match(text, first) is not None
    closers = match["closers"]
    if closers is None:
        # An ending without a mark: a bracket after it, or a dash, goes on with the sentence.
        return following not in "([{-–—" and not _goes_on(text, end)
    before = text[first - 1] if first else ""
    if closers and before in _OPENING and first - 1 > start:
        # The mark is spoken of, or a comment: (?), "!", […]. As a sentence of its own it is a turn in a dialogue.
        return False
    if ")" in closers and _explains_word(text, first):
        return False
    is_spaced = before.isspace() and first > 1
    if is_spaced:
        before = text[first - 2]
    # A syllable by itself is an enumerator or an interjection.
    is_final = before in _FINAL_SYLLABLES and first > 1 and text[first - 2].isalnum()
    if mark == "." and not is_final and _NO_END.search(text, max(0, first - _NO_END_LENGTH), first + 1):
        return False
    if mark in "!?！？" or closers:
        # Between spaces, and after no word of Korean, a mark belongs to a formula.
        return not (is_spaced and before.isascii()) and not _goes_on(text, end)
    next_mark = text[first + 1]
    # An ellipsis is a pause, not an end, unless the verb is finite or a full stop of its own follows.
    if (mark == "…" or next_mark in ".…") and not is_final and not (mark == "…" and next_mark == "."):
        return False
    return following not in "이라" or not _QUOTING.match(text, end)


def _goes_on(text: str, position: int) -> bool:
    """Whether the sentence goes on after what was said; most words are told by their first syllable."""
    return text[position] in _SAYING_STARTS and _SAYING.match(text, position) is not None


def _explains_word(text: str, end: int) -> bool:
    """Whether the bracket that closes at `end` opened right after a word that does not end a sentence."""
    opened = text.rfind("(", max(0, end - _LONGEST_INSERTION), end)
    return opened > 0 and text[opened - 1].isalnum() and text[opened - 1] not in _FINAL_SYLLABLES


def _inside(text: str, start: int, end: int, insertions: list[tuple[str, str]]) -> bool:
    """Whether a bracket or quotation that opened in this sentence is still open, and closes soon."""
    if end - start > 4 * _LONGEST_INSERTION:
        return False
    limit = end + _LONGEST_INSERTION
    for opening, closing in insertions:
        opened = text.rfind(opening, start, end)
        if opened < 0:
            continue
        if opening == closing:
            is_open = text.count(opening, start, end) % 2 == 1
        else:
            is_open = opened > text.rfind(closing, start, end)
        if is_open and text.find(closing, end, limit) >= 0:
            return True
    return False
