"""Cleaning that every format shares: encoding, normal form, control characters, white space.

Each rule counts what it did under its own name. What a single format needs stands in that format's module.
"""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterable
from typing import Any

from daramgpt.corpora.reading import Reading

# C0 and C1 controls but tab and newlines, soft hyphen, zero-width space and direction marks, byte order mark,
# lone surrogates (JSON escapes can make them) and the two non-characters. Zero-width joiners stay: emoji need them.
_UNWANTED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ud800-\udfff\ufffe\uffff]"
)


def decode(reading: Reading, label: str, data: bytes) -> str:
    """Text of a member: UTF-8, else UTF-16 by its mark, else cp949; what none of them reads is dropped and noted."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        reading.count("UTF-16 file decoded")
        text = data.decode("utf-16", errors="replace")
    else:
        try:
            return data.decode("utf-8-sig")
        except UnicodeDecodeError:
            pass
        try:
            text = data.decode("cp949")
            reading.count("cp949 file decoded")
            return text
        except UnicodeDecodeError:
            text = data.decode("utf-8-sig", errors="replace")
    if num_lost := text.count("\ufffd"):
        reading.fault(label, f"{num_lost} undecodable places left out")
    return text.replace("\ufffd", "")


def load_json(reading: Reading, label: str, data: bytes) -> Any:
    """The JSON value of a member; None, and a fault, where it is invalid."""
    text = decode(reading, label, data)
    try:
        # Real files hold raw newlines and tabs inside strings.
        return json.loads(text, strict=False)
    except ValueError as error:
        reading.fault(label, f"invalid JSON ({error})")
    except RecursionError:
        reading.fault(label, "JSON nested too deeply")
    return None


def clean(reading: Reading, text: str) -> str:
    """NFC, no control characters, single spaces, no outer white space."""
    return " ".join(_normal(reading, text).split())


def clean_lines(reading: Reading, lines: Iterable[str]) -> str:
    """The lines in one text, each with single spaces only; newlines stand between lines and nowhere else."""
    text = "\n".join([" ".join(line.split()) for line in lines])
    normal = _normal(reading, text)
    if normal is not text:
        normal = "\n".join([" ".join(line.split()) for line in normal.split("\n")])
    return normal


def clean_paragraphs(reading: Reading, texts: Iterable[str]) -> list[tuple[str, ...]]:
    """One paragraph for each text that has something in it after cleaning."""
    return [(line,) for line in clean_lines(reading, texts).split("\n") if line]


def _normal(reading: Reading, text: str) -> str:
    if not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
        reading.count("text brought to NFC")
    if _UNWANTED.search(text):
        text, num_removed = _UNWANTED.subn("", text)
        reading.count("control character removed", num_removed)
    return text
