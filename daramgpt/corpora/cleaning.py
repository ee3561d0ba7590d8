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
# lone surrogates (JSON escapes can make them), what an earlier tool failed to decode, and the two non-characters.
# Zero-width joiners stay: emoji need them.
_UNWANTED = re.compile(
    "[\x00-\x08\x0e-\x1f\x7f-\x84\x86-\x9f\xad\u200b\u200e\u200f\u202a-\u202e\u2060\ufeff\ud800-\udfff\ufffd-\uffff]"
)
_LOST = "\ufffd"
_HIGH_BYTES = bytes(range(0x80, 0x100))
_MOST_SPOILT = 0.1


def encoding_of(data: bytes) -> str:
    """``"utf-8-sig"``, ``"utf-16"`` or ``"cp949"``: which of them a text of a Korean file is in."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        return "utf-16"
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        # A few spoilt bytes do not make it another encoding; in cp949 text nearly all are no UTF-8.
        num_lost = data.decode("utf-8", errors="replace").count(_LOST)
        num_high = len(data) - len(data.translate(None, _HIGH_BYTES))
        if num_lost > _MOST_SPOILT * num_high and data.decode("cp949", errors="replace").count(_LOST) < num_lost:
            return "cp949"
    return "utf-8-sig"


def decode(reading: Reading, label: str, data: bytes) -> str:
    """Text of a member, in the encoding that it is in; places that cannot be decoded are left out and noted."""
    encoding = encoding_of(data)
    if encoding != "utf-8-sig":
        reading.count(f"{encoding} file decoded")
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        text = data.decode(encoding, errors="replace")
        reading.fault(label, f"{text.count(_LOST)} undecodable places left out")
        return text.replace(_LOST, "")


def load_json(reading: Reading, label: str, data: bytes) -> Any:
    """The JSON value of a member; None, and a fault, where it is invalid."""
    text = decode(reading, label, data)
    try:
        # Real files hold raw newlines and tabs inside strings.
        if (value := json.loads(text, strict=False)) is None:
            reading.fault(label, "holds nothing (null)")
        return value
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
