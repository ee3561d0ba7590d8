"""Brackets that something was removed from: a template, a note, a link.

A removed thing leaves `REMOVED` behind, so that the brackets it emptied, ``(, 1924년 ~ )``, can be mended without
touching the ``()`` of program text.
"""

from __future__ import annotations

import re

REMOVED = "\x00"

_LETTER_OR_DIGIT = re.compile(r"[^\W_]")
# A bracket in which something was, or that begins with a comma, as texts do whose templates were removed before.
_BRACKETED = re.compile(r"[(（]((?:\s*[,、]|[^()（）\x00]*\x00)[^()（）]*)[)）]")
_BEGINS_WITH_COMMA = re.compile(r"[(（]\s*[,、]")
_OTHER_BRACKETS = re.compile(r"[\[《〈「『【〔“‘]\s*\x00[\s\x00]*[\]》〉」』】〕”’]")
_SPACE_BEFORE_STOP = re.compile(r"(?<!\s)\s+\x00[\s\x00]*(?=[.,!?)\]](?!\w))")
_DEEPEST_BRACKETS = 3
_SEPARATORS = " \t,;:、·/"
_DASHES = "~–-"
_DOUBLED_SEPARATORS = re.compile(r"([,;、·]|/(?=\s))(?:\s*[,;、·/])+")


def mend_brackets(line: str) -> str:
    """Brackets tidied that a removed template left its commas in, and removed where it left nothing else."""
    has_removed = REMOVED in line
    if not has_removed and not _BEGINS_WITH_COMMA.search(line):
        return line
    for _ in range(_DEEPEST_BRACKETS):
        line, num_mended = _BRACKETED.subn(_mend_bracket, line)
        if not num_mended:
            break
    if has_removed:
        line = _SPACE_BEFORE_STOP.sub("", _OTHER_BRACKETS.sub("", line))
    return line.replace(REMOVED, "")


def _mend_bracket(match: re.Match[str]) -> str:
    inside = _DOUBLED_SEPARATORS.sub(r"\1", match[1].replace(REMOVED, " "))
    inside = " ".join(inside.split()).lstrip(_SEPARATORS + _DASHES).rstrip(_SEPARATORS)
    # Also the dash between two dates of which neither is left.
    before_dash = inside.rstrip(_DASHES + " ")
    if before_dash[-1:] in _SEPARATORS:
        inside = before_dash.rstrip(_SEPARATORS)
    # The mark stays: a bracket around this one may have been emptied by it.
    return f"({inside})" if _LETTER_OR_DIGIT.search(inside) else REMOVED
