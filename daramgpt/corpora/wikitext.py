"""Wikitext to plain lines, in one pass over the brackets.

Templates ``{{ }}``, tables ``{| |}`` and links ``[[ ]]`` nest in each other, so they are matched with a stack, not by
patterns: an opening mark pushes a frame, its closing mark pops it and decides what is left of the inside. A mark
without a partner stays as it is, for then it is more often text (a tensor ``[[0, 0], [0, 0]]``) than markup; so does
a pair that cannot be markup (``{{ item.name }}``); both are counted. What is removed leaves a mark of its own behind,
so that the brackets it emptied, ``(, 1924년 ~ )``, can be mended without touching the ``()`` of program text.

No page, however broken, costs more than time proportional to its length: no pattern backtracks over more than it
matched, no search for an end is repeated that failed once, and nesting is followed to a fixed depth only.
"""

from __future__ import annotations

import html
import re
from collections import Counter
from dataclasses import dataclass, field

from daramgpt.corpora.brackets import REMOVED, mend_brackets
from daramgpt.corpora.reading import Reading

_BREAK = "\x01"  # A line break within a line of wikitext: quotation marks pair up across it.


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*+)(?=[\s/>])([^<>]*?)(/?)>")
# Elements that go with their content: notes, formulas, program text, pictures, tables.
_WHOLE_ELEMENTS = _words(
    """
    ref references math chem ce gallery timeline score hiero imagemap graph mapframe maplink indicator
    inputbox templatestyles templatedata categorytree syntaxhighlight source pre style script rt rp table
    """
)
# Elements of which only the tags go. Any other name in angle brackets is text.
_BARE_TAGS = _words(
    """
    abbr b bdi bdo big blockquote br center cite code dd del dfn div dl dt em font h1 h2 h3 h4 h5 h6 hr
    i includeonly ins kbd li mark nobr noinclude nowiki ol onlyinclude p poem q rb ruby s samp section
    small span strike strong sub sup tbody td th thead tr tt u ul var wbr
    """
)
_TEXT_IF_UNCLOSED = _words("source script style")
_BREAKS = _words("br p div li tr hr blockquote dd dt poem h1 h2 h3 h4 h5 h6")
_ENDS = {name: re.compile(rf"</{name}\s*>", re.IGNORECASE) for name in (*_WHOLE_ELEMENTS, "nowiki")}
# A note begun before another has ended was left open by its author: what follows it is text.
_ENDS["ref"] = re.compile(r"</ref\s*>|<ref(?=[\s>])[^<>]*(?<!/)>", re.IGNORECASE)
_CODE = re.compile(r"[^<|]*(?=</code\s*>)", re.IGNORECASE)

_HEADING = re.compile(r"^=[^\n]+", re.MULTILINE)
_LINK_TARGET = re.compile(r"\[\[[^\[\]|]*\|")
_NOT_NAME = re.compile(r"\W|^[\d\W]+")
# Their names without spaces.
_CLOSING_SECTIONS = _words(
    """
    같이보기 함께보기 더보기 관련항목 관련문서 각주 주해 주석 내용주 참조주 출처 참고 참조 인용
    참고문헌 참고자료 참고서적 각주및참고문헌 주석및참고문헌 각주및참고자료 각주와참고문헌 참고문헌및각주
    외부링크 바깥링크 바깥고리 외부연결 외부고리 링크 갤러리 사진첩 읽어보기 읽을거리 더읽을거리 더읽어보기
    추가자료 관련서적 관련사이트 관련웹사이트 seealso notes references externallinks furtherreading
    """
)
# No mark begins with an anchor, so that the search skips from bracket to bracket; where a line begins is asked later.
_MARK = re.compile(r"\{(?:\{+|\|)|\}\}+|\|\}(?!\})|\[\[|\]\]")
_INDENT = " \t:*#\x00"
_LONGEST_INDENT = 20
_OPENING = {"}": "{", "|}": "{|", "]]": "[["}
_DEEPEST_MARKS = 60
_MEDIA_OR_CATEGORY = re.compile(r"\s*(?:파일|그림|화상|미디어|분류|file|image|media|category)\s*:", re.IGNORECASE)
_INTERLANGUAGE = re.compile(r"\s*(?:(?!(?:ko|mw|doi|irc|voy)\b)[a-z]{2,3}(?:-[a-z-]+)?|simple)\s*:")
# What a link without a label shows, of "이름공간:제목 (설명)|".
_PIPE_TRICK = re.compile(r"\([^()]*\)\Z")
# What no page title holds, and a row of numbers: a tensor, not a link.
_NO_TITLE = re.compile(r"[\[\]{}\n]|^[\d\s.+-]+,[\d\s.,+-]*$")
# Templates that only say in which language or how an argument is set: the last one, and the first one.
# Their names without spaces.
_LAST_ARGUMENT_SHOWN = _words(
    "lang 언어 nowrap nobr 줄바꿈없음 small 작게 크게 굵게 색 글자색 color 위첨자 아래첨자 sup sub"
)
_FIRST_ARGUMENT_SHOWN = _words("나라 국기 국기나라 flag flagcountry 인용문 quote blockquote 루비 ruby abbr")
_SPACES = re.compile(r"[\s_\x00]+")
_FIRST_OR_SECOND = re.compile(r"\A\s*[12]\s*=")
_NAMED_ARGUMENT = re.compile(r"\s*[\w-]+\s*=")
# A pair of braces in running text: the marks themselves being spoken of, or an expression of a page template.
_SPOKEN_OF = re.compile(r"\s+(?:와|과|나|이나|및|또는|and|or)\s+|(['\"`]).*\1|[^|]*\\[^|]*")
_EXPRESSION = re.compile(
    r"\s+[!(]?(?:[a-z_$][\w$]*|[a-z_$'\"`\[\d][ -~]*(?:[.(\[][\w'\"()\]]|['\"`?<>=+*&]|\s[-/%]\s)[ -~]*)\s+", re.ASCII
)
_LONGEST_EXPRESSION = 200
_ENGLISH_TEMPLATES = _words("reflist references clear stub fact cn who when where why which dubious br snd dot sic")
_EXTERNAL = re.compile(r"\[(?:(?:https?:|ftp:)?//|mailto:)[^\s\[\]]++\s*+([^\[\]\n]*+)\]")
_ADDRESS = re.compile(r"\s*(?:https?:)?//")
_LANGUAGE_VARIANTS = re.compile(r"-\{\s*zh[a-z-]*\s*:([^{};]*)(?:;[^{}]*)?\}-")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
# Empty strings of program text stay, in group 1.
_QUOTES = re.compile(r"((?<=[(\[{=])''(?=[)\]},;])|(?<=[,?:=] )''(?=[)\]}]))|'{2,5}")
_SWITCH = re.compile(
    r"__(?:[가-힣]{2,10}|(?:NO|FORCE)?TOC|NO(?:EDITSECTION|GALLERY|INDEX|TITLECONVERT|CONTENTCONVERT|TC|CC)"
    r"|INDEX|HIDDENCAT|DISAMBIG|(?:NO)?NEWSECTIONLINK|STATICREDIRECT)__"
)
_STARTS_LIST = frozenset("*#:;-")
_LINE_MARKS = re.compile(r"\A(?:[*#:;]+|-{4,})\s*")
_TABLE_LINE = re.compile(r"\|[-}+]|\{\|")
# Inside <nowiki> markup is text; as character references it passes unseen until references are resolved.
_AS_REFERENCES = {ord(mark): f"&#{ord(mark)};" for mark in "{}[]|'<>=*#:;_-"}


def plain_lines(reading: Reading, wikitext: str) -> list[str]:
    """The lines of running text and of lists; headings, closing sections and all markup are gone."""
    text = wikitext
    for mark in (REMOVED, _BREAK):
        text = text.replace(mark, "")
    if "<!--" in text:
        text = _COMMENT.sub(lambda match: REMOVED if text[match.end() : match.end() + 1] in ")）" else "", text)
    if "<" in text:
        text = _drop_elements(reading, text)
    text = _drop_closing_sections(text)
    text = _resolve_brackets(reading, text)
    if "-{" in text:
        text = _LANGUAGE_VARIANTS.sub(r"\1", text)
    if "[" in text:
        text = _EXTERNAL.sub(lambda match: match[1] or REMOVED, text)
    if "__" in text:
        text = _SWITCH.sub("", text)
    lines: list[str] = []
    in_table = False
    for line in text.split("\n"):
        line = line.strip(" \t\r\x00")
        if not line:
            continue
        if line[0] in "|{!" and (_TABLE_LINE.match(line) or (in_table and line[0] != "{")):
            in_table = not line.startswith("|}")
            reading.count("line of an unbalanced table dropped")
            continue
        if "''" in line:
            line = _drop_quotes(reading, line)
        for piece in map(str.strip, line.split(_BREAK)):
            if piece[:1] in _STARTS_LIST:
                piece = _LINE_MARKS.sub("", piece)
            piece = mend_brackets(piece)
            if "&" in piece:
                # References last: what they stand for is text, never markup.
                piece = html.unescape(piece).replace("\n", " ")
            if _LETTER_OR_DIGIT.search(piece):
                lines.append(piece.strip())
    return lines


def _drop_elements(reading: Reading, text: str) -> str:
    """Without the elements whose content is no running text, and without the tags of those whose content is."""
    kept: list[str] = []
    position = 0
    without_end: set[str] = set()
    for match in _TAG.finditer(text):
        if match.start() < position:
            continue
        name = match[2].lower()
        if name not in _WHOLE_ELEMENTS and name not in _BARE_TAGS:
            continue
        opens = not match[1] and not match[4]
        closing = None
        if opens and name in _ENDS and name not in without_end:
            closing = _ENDS[name].search(text, match.end())
            if not closing:
                # Searched once: a page full of unclosed tags must not cost a search to its end for each.
                without_end.add(name)
            elif not closing[0].startswith("</"):
                closing = None
        if opens and not closing and name in _TEXT_IF_UNCLOSED:
            continue
        kept.append(text[position : match.start()])
        position = match.end()
        if name == "nowiki":
            if closing:
                kept.append(text[position : closing.start()].translate(_AS_REFERENCES))
                position = closing.end()
        elif name in _WHOLE_ELEMENTS:
            kept.append(REMOVED)
            if closing:
                position = closing.end()
        elif name in _BREAKS:
            kept.append(_BREAK)
        elif name == "code" and opens and (code := _CODE.match(text, position)) and "{{" in code[0]:
            reading.count("double braces kept as text", code[0].count("{{"))
            kept.append(code[0].translate(_AS_REFERENCES))
            position = code.end()
    kept.append(text[position:])
    return "".join(kept)


def _drop_closing_sections(text: str) -> str:
    """Without headings, and without the sections that hold no running text, down to their last subsection."""
    kept: list[str] = []
    position = 0
    closed_at = 0  # level of the closing section that we are in, 0 outside
    for match in _HEADING.finditer(text):
        line = match[0].rstrip(" \t\r\x00")
        name = line.strip("=")
        level = min(len(line) - len(line.lstrip("=")), len(line) - len(line.rstrip("=")))
        if not level or not name:
            continue
        if not closed_at:
            kept.append(text[position : match.start()])
        position = match.end()
        if not closed_at or level <= closed_at:
            name = _NOT_NAME.sub("", _LINK_TARGET.sub("", name)).lower()
            closed_at = level if name in _CLOSING_SECTIONS else 0
    if not closed_at:
        kept.append(text[position:])
    return "".join(kept)


@dataclass(slots=True)
class _Frame:
    """An open mark, and what is left of the text inside it so far."""

    mark: str
    start: int
    inside: list[str] = field(default_factory=list)

    @property
    def kind(self) -> str:
        return self.mark[0] if self.mark[:2] == "{{" else self.mark


def _resolve_brackets(reading: Reading, text: str) -> str:
    frames = [_Frame("", 0)]
    num_open = Counter[str]()
    position = 0
    for match in _MARK.finditer(text):
        mark = match[0]
        is_table = mark in ("{|", "|}")
        if is_table and not _begins_line(text, match.start()):
            if mark == "|}" and not num_open["{|"]:
                reading.count("unbalanced mark kept")
            continue
        before = text[position : match.start()]
        if is_table:
            before = before.rstrip(_INDENT)
        frames[-1].inside.append(before)
        position = match.end()
        opening = _OPENING.get("}" if mark[:2] == "}}" else mark)
        if opening is None:
            if len(mark) > _DEEPEST_MARKS:
                frames[-1].inside.append(mark[_DEEPEST_MARKS:])
                mark = mark[:_DEEPEST_MARKS]
            frame = _Frame(mark, match.start())
            if len(frames) > _DEEPEST_MARKS:
                reading.count("unbalanced mark kept")
                frames[-1].inside.append(mark)
            else:
                frames.append(frame)
                num_open[frame.kind] += 1
        elif opening == "{":
            _close_braces(reading, frames, num_open, text, match)
        elif not num_open[opening]:
            reading.count("unbalanced mark kept")
            frames[-1].inside.append(mark)
        else:
            inside = "".join(_pop(reading, frames, num_open, opening).inside)
            frames[-1].inside.append(_resolve_link(reading, inside) if opening == "[[" else REMOVED)
    frames[-1].inside.append(text[position:])
    _unwind(reading, frames, num_open, 0)
    return "".join(frames[0].inside)


def _begins_line(text: str, start: int) -> bool:
    """Whether nothing but list marks stand before ``start`` in its line."""
    shortest = max(0, start - _LONGEST_INDENT)
    _, newline, indent = text[shortest:start].rpartition("\n")
    return bool(newline or not shortest) and not indent.strip(_INDENT)


def _pop(reading: Reading, frames: list[_Frame], num_open: Counter[str], kind: str) -> _Frame:
    if frames[-1].kind != kind:
        _unwind(reading, frames, num_open, next(i for i in range(len(frames) - 1, 0, -1) if frames[i].kind == kind))
    num_open[kind] -= 1
    return frames.pop()


def _unwind(reading: Reading, frames: list[_Frame], num_open: Counter[str], depth: int) -> None:
    """Make text of every mark above ``depth``: none of them has a partner."""
    for frame in frames[depth + 1 :]:
        reading.count("unbalanced mark kept")
        num_open[frame.kind] -= 1
        frames[depth].inside.append(frame.mark)
        frames[depth].inside.extend(frame.inside)
    del frames[depth + 1 :]


def _close_braces(
    reading: Reading, frames: list[_Frame], num_open: Counter[str], text: str, match: re.Match[str]
) -> None:
    """Pair a run of closing braces with the open ones, three at a time for a parameter, else two for a template."""
    num_left = len(match[0])
    while num_left >= 2 and num_open["{"]:
        frame = _pop(reading, frames, num_open, "{")
        inside = "".join(frame.inside)
        num_paired = min(3, num_left, len(frame.mark))
        num_left -= num_paired
        rest = frame.mark[num_paired:]
        if num_paired == 3:
            left = inside.partition("|")[2]
        else:
            before, after = text[max(0, frame.start - 1) : frame.start], text[match.end() : match.end() + 1]
            alone = before in ("", "\n") and after in ("", "\n") and not rest
            left = _resolve_template(reading, inside, alone)
        if len(rest) < 2:
            frames[-1].inside.append(rest + left)
        else:
            frames.append(_Frame(rest, frame.start, [left]))
            num_open["{"] += 1
    if num_left >= 2:
        reading.count("unbalanced mark kept")
    frames[-1].inside.append("}" * num_left)


def _resolve_template(reading: Reading, inside: str, alone: bool) -> str:
    name, bar, rest = inside.partition("|")
    if not bar:
        if len(inside) > _LONGEST_EXPRESSION or not (_SPOKEN_OF.fullmatch(inside) or _is_expression(inside, alone)):
            return REMOVED
        reading.count("double braces kept as text")
        return f"{{{{{inside}}}}}"
    name = _SPACES.sub("", name).lower()
    if name not in _LAST_ARGUMENT_SHOWN and name not in _FIRST_ARGUMENT_SHOWN:
        return REMOVED
    arguments = [_FIRST_OR_SECOND.sub("", argument, count=1) for argument in rest.split("|")]
    arguments = [argument for argument in arguments if not _NAMED_ARGUMENT.match(argument)]
    return arguments[0 if name in _FIRST_ARGUMENT_SHOWN else -1].strip() if arguments else REMOVED


def _is_expression(inside: str, alone: bool) -> bool:
    """A template that is named as an expression might be, without arguments, stands on a line of its own."""
    return not alone and bool(_EXPRESSION.fullmatch(inside)) and inside.strip() not in _ENGLISH_TEMPLATES


def _resolve_link(reading: Reading, inside: str) -> str:
    if _MEDIA_OR_CATEGORY.match(inside) or _INTERLANGUAGE.match(inside):
        return REMOVED
    if _ADDRESS.match(inside):
        return f"[{inside}]"
    target, bar, label = inside.partition("|")
    if _NO_TITLE.search(target) or not target.strip():
        reading.count("double brackets kept as text")
        return f"[[{inside}]]"
    if bar and not label.strip():
        return _PIPE_TRICK.sub("", target.rpartition(":")[2].strip()).strip()
    return label.strip() or target.strip().lstrip(":")


def _drop_quotes(reading: Reading, line: str) -> str:
    if line.count("''") == 1 and "'''" not in line:
        reading.count("quotes kept as text")
        return line
    return _QUOTES.sub(r"\1", line)
