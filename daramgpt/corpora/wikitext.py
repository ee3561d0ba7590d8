"""Wikitext to plain lines, in one pass over the brackets.

Templates ``{{ }}``, tables ``{| |}`` and links ``[[ ]]`` nest in each other, so they are matched with a stack, not by
patterns: an opening mark pushes a frame, its closing mark pops it and decides what is left of the inside. A mark
without a partner stays as it is, for then it is more often text (a tensor ``[[0, 0], [0, 0]]``) than markup; these are
counted. A removed template leaves a mark of its own behind, so that the brackets it emptied, ``(, 1924년 ~ )``,
can be mended without touching the ``()`` of program text.
"""

from __future__ import annotations

import html
import re
from collections import Counter

from daramgpt.corpora.reading import Reading

_REMOVED = "\x00"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


_COMMENT = re.compile(r"<!--.*?(?:-->|\Z)", re.DOTALL)
_TAG = re.compile(r"<(/?)([a-zA-Z][a-zA-Z0-9]*)\b([^<>]*?)(/?)>")
# Elements that go with their content: notes, formulas, program text, pictures.
_WHOLE_ELEMENTS = _words(
    """
    ref references math chem ce gallery timeline score hiero imagemap graph mapframe maplink indicator
    inputbox templatestyles categorytree syntaxhighlight source pre style script rt rp
    """
)
# Elements of which only the tags go. Any other name in angle brackets is text.
_BARE_TAGS = _words(
    """
    abbr b bdi bdo big blockquote br center cite code dd del dfn div dl dt em font h1 h2 h3 h4 h5 h6 hr
    i includeonly ins kbd li mark nobr noinclude nowiki ol onlyinclude p poem q rb ruby s samp section
    small span strike strong sub sup table tbody td th thead tr tt u ul var wbr
    """
)
_BREAKS = _words("br p div li tr hr blockquote dd dt poem h1 h2 h3 h4 h5 h6")

_HEADING = re.compile(r"^(=+)(.*[^=\n])(=+)[^\S\n]*$", re.MULTILINE)
# Their names without spaces.
_CLOSING_SECTIONS = _words(
    """
    같이보기 함께보기 더보기 관련항목 관련문서 각주 주해 주석 내용주 참조주 출처 참고 참조 인용
    참고문헌 참고자료 참고서적 각주및참고문헌 주석및참고문헌 각주및참고자료
    외부링크 바깥링크 바깥고리 외부연결 링크 갤러리 사진첩 읽어보기 추가자료
    """
)
_BRACKETS = re.compile(r"\{\{|\}\}|^[ \t:*#]*\{\||\|\}(?!\})|\[\[|\]\]", re.MULTILINE)
_OPENING = {"}}": "{{", "|}": "{|", "]]": "[["}
_MEDIA_OR_CATEGORY = re.compile(r"\s*(?:파일|그림|화상|미디어|분류|file|image|media|category)\s*:", re.IGNORECASE)
_INTERLANGUAGE = re.compile(r"\s*[a-z]{2,3}(?:-[a-z-]+)?\s*:|\s*simple\s*:")
# Templates that only say in which language or how their last argument is set.
_WRAPPERS = frozenset(("lang", "언어", "nowrap", "nobr", "줄바꿈 없음", "small", "작게", "크게", "굵게"))
_EXTERNAL = re.compile(r"\[(?:https?:|ftp:|mailto:)?//[^\s\[\]]+\s*([^\[\]\n]*)\]")
_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
_QUOTES = re.compile(r"'{2,5}")
_SWITCH = re.compile(r"__(?:NO|FORCE)?(?:TOC|EDITSECTION|GALLERY|INDEX|목차|목차숨김|편집단|목차보이기|색인)__")
_LINE_MARKS = re.compile(r"^(?:[*#:;]+\s*|-{4,}\s*)")
_TABLE_LINE = re.compile(r"^\s*(?:\|[-}+]|\{\|)")
# A bracket in which a template was, or that begins with a comma, as texts do whose templates were removed before.
_BRACKETED = re.compile(r"[(（]((?:\s*[,;、]|[^()（）\x00]*\x00)[^()（）]*)[)）]")
_DEEPEST_BRACKETS = 3
# What no page title holds, and a row of numbers: a tensor, not a link.
_NO_TITLE = re.compile(r"[\[\]{}\n]|^[\d\s.+-]+,[\d\s.,+-]*$")
# Inside <nowiki> markup is text; as character references it passes unseen until references are resolved.
_AS_REFERENCES = {ord(mark): f"&#{ord(mark)};" for mark in "{}[]|'<>=*#:;_"}
# Also the dash between two dates of which neither is left.
_LOOSE_SEPARATORS = re.compile(r"^[\s,;:、·/~–-]+|(?:^|[,;:、·/])[\s~–-]*$|[\s,;:、·/]+$")
_DOUBLED_SEPARATORS = re.compile(r"([,;、·/])(?:[\s\x00]*[,;、·/])+")


def plain_lines(reading: Reading, wikitext: str) -> list[str]:
    """The lines of running text and of lists; headings, closing sections and all markup are gone."""
    text = _COMMENT.sub("", wikitext) if "<!--" in wikitext else wikitext
    text = _drop_elements(text)
    text = _drop_closing_sections(text)
    text = _resolve_brackets(reading, text)
    text = _EXTERNAL.sub(r"\1", text)
    text = _SWITCH.sub("", _QUOTES.sub("", text))
    lines = []
    for line in text.split("\n"):
        if _TABLE_LINE.match(line):
            reading.count("line of an unbalanced table dropped")
            continue
        # References last: what they stand for is text, never markup.
        line = html.unescape(mend_brackets(_LINE_MARKS.sub("", line.strip())))
        if _LETTER_OR_DIGIT.search(line):
            lines.append(line)
    return lines


def _drop_elements(text: str) -> str:
    """Without the elements whose content is no running text, and without the tags of those whose content is."""
    kept: list[str] = []
    position = 0
    without_end: set[str] = set()
    for match in _TAG.finditer(text):
        if match.start() < position:
            continue
        name = match[2].lower()
        end = match.end()
        if name in _WHOLE_ELEMENTS:
            if not match[1] and not match[4] and name not in without_end:
                closing = re.compile(rf"</{name}\s*>", re.IGNORECASE).search(text, end)
                if closing:
                    end = closing.end()
                else:
                    # Searched once: a page full of unclosed tags must not cost a search to its end for each.
                    without_end.add(name)
        elif name == "nowiki" and not match[1] and not match[4]:
            kept.append(text[position : match.start()])
            found = text.find("</nowiki>", end)
            position = len(text) if found < 0 else found
            kept.append(text[end:position].translate(_AS_REFERENCES))
            continue
        elif name not in _BARE_TAGS:
            continue
        kept += (text[position : match.start()], "\n" if name in _BREAKS else "")
        position = end
    kept.append(text[position:])
    return "".join(kept)


def _drop_closing_sections(text: str) -> str:
    """Without headings, and without the sections that hold no running text, down to their last subsection."""
    kept: list[str] = []
    position = 0
    closed_at = 0  # level of the closing section that we are in, 0 outside
    for match in _HEADING.finditer(text):
        if not closed_at:
            kept.append(text[position : match.start()])
        position = match.end()
        level = min(len(match[1]), len(match[3]))
        if not closed_at or level <= closed_at:
            closed_at = level if re.sub(r"\W", "", match[2]) in _CLOSING_SECTIONS else 0
    if not closed_at:
        kept.append(text[position:])
    return "".join(kept) if kept else ""


def _resolve_brackets(reading: Reading, text: str) -> str:
    # frames: (opening mark, what is left of the text inside it so far)
    frames: list[tuple[str, list[str]]] = [("", [])]
    num_open = Counter[str]()
    position = 0
    for match in _BRACKETS.finditer(text):
        mark = match[0].strip(" \t:*#")
        frames[-1][1].append(text[position : match.start()])
        position = match.end()
        opening = _OPENING.get(mark)
        if opening is None:
            frames.append((mark, []))
            num_open[mark] += 1
        elif not num_open[opening]:
            reading.count("unbalanced mark kept")
            frames[-1][1].append(mark)
        else:
            depth = next(i for i in range(len(frames) - 1, 0, -1) if frames[i][0] == opening)
            _unwind(reading, frames, num_open, depth)
            num_open[opening] -= 1
            inside = "".join(frames.pop()[1])
            frames[-1][1].append(_resolve(reading, opening, inside))
    frames[-1][1].append(text[position:])
    _unwind(reading, frames, num_open, 0)
    return "".join(frames[0][1])


def _unwind(reading: Reading, frames: list[tuple[str, list[str]]], num_open: Counter[str], depth: int) -> None:
    """Make text of every mark above ``depth``: none of them has a partner."""
    for mark, inside in frames[depth + 1 :]:
        reading.count("unbalanced mark kept")
        num_open[mark] -= 1
        frames[depth][1].append(mark)
        frames[depth][1].extend(inside)
    del frames[depth + 1 :]


def _resolve(reading: Reading, opening: str, inside: str) -> str:
    if opening == "[[":
        return _resolve_link(reading, inside)
    if opening == "{{":
        name, bar, arguments = inside.partition("|")
        if bar and name.strip().lower() in _WRAPPERS:
            return arguments.rpartition("|")[2]
        return _REMOVED
    return ""


def _resolve_link(reading: Reading, inside: str) -> str:
    if _MEDIA_OR_CATEGORY.match(inside) or _INTERLANGUAGE.match(inside):
        return ""
    target, _, label = inside.partition("|")
    if _NO_TITLE.search(target) or not target.strip():
        reading.count("double brackets kept as text")
        return f"[[{inside}]]"
    return label.strip() or target.strip().lstrip(":")


def mend_brackets(line: str) -> str:
    """Brackets tidied that a removed template left its commas in, and removed where it left nothing else."""
    if _REMOVED not in line and "(," not in line:
        return line
    for _ in range(_DEEPEST_BRACKETS):
        line, num_mended = _BRACKETED.subn(_mend_bracket, line)
        if not num_mended:
            break
    return line.replace(_REMOVED, "")


def _mend_bracket(match: re.Match[str]) -> str:
    inside = _DOUBLED_SEPARATORS.sub(r"\1", match[1].replace(_REMOVED, " "))
    inside = " ".join(_LOOSE_SEPARATORS.sub("", inside).split())
    return f"({inside})" if _LETTER_OR_DIGIT.search(inside) else ""
