"""AI-Hub 624 web text: the same articles twice, raw (`SJML`) and labelled (`named_entity`).

The labelled edition is read, for it is already cut into sentences; a raw member is read only where no labelled member
of its name can be. Which edition a member belongs to is decided a folder at a time, by the first bytes of its data.
An article is one document: its title, if it has one of its own, then its content, whose sentences are the pieces.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from daramgpt.corpora.archives import Member, members, pending, read_twin
from daramgpt.corpora.cleaning import clean_lines, load_json
from daramgpt.corpora.document import Document
from daramgpt.corpora.reading import Item, Paragraphs, Pending, Reading
from daramgpt.corpora.sentences import part_glued

# All rules act on one article at a time, its sentences parted by newlines: a sentence at a time is five times slower.
_BYLINE = re.compile(
    r"^ ?(?:[(\[][^()\[\]=\n]{1,20}=[^()\[\]\n]{1,20}[)\]] ?)?(?:(?:\(이름\)|[가-힣]{2,4}) ?){0,3}(?:기자|특파원) ?= ?",
    re.MULTILINE,
)
_COPYRIGHT = re.compile(
    r"[<\[(]? ?(?:저작권자|ⓒ|©|Copyright)[^<>\n]{0,60}?무단 ?전재[^<>\n]{0,20}?금지 ?[>\])]?\.?"
    r"|[<\[(]? ?무단 ?전재 ?(?:및|[-·ㆍ,/]) ?재배포 ?금지 ?[>\])]?\.?"
    r"|< ?저작권자[^<>\n]{0,80}>\.?"
)
_RELATED = re.compile(r"^[^\w\n]*관련 ?기사 ?(?:[:▶☞\])>].*)?\.?$", re.MULTILINE)
_EMAIL_MASK = "(이메일)"
_EMAIL = re.compile(r" ?(?:\(이름\) ?기자 ?)?[\w.*+-]*@?\(이메일\)")
_MASKS = ("(이름)", "(전화번호)", "(주민등록번호)", "(계좌번호)", "(카드번호)")
_MASK = re.compile(rf" ?(?:{'|'.join(map(re.escape, _MASKS))})")
_DOUBLED_STOP = re.compile(r"\.\.(?<=다..)$", re.MULTILINE)
_RAW_SEPARATOR = re.compile(r"\s+\.\s+\.\s+")
_RAW_END = re.compile(r"\s+\.\s*$")


def web_items(reading: Reading, paths: list[Path]) -> Iterator[Pending]:
    """Each article file once, with its twin in the other edition."""
    labelled: dict[str, Member] = {}
    raw: dict[str, Member] = {}
    folder_is_raw: dict[str, bool] = {}
    for member in members(reading, paths):
        if not member.name.lower().endswith(".json"):
            reading.pass_over(member.label, "no data of this format")
            continue
        if member.folder not in folder_is_raw and (head := member.head()):
            folder_is_raw[member.folder] = b'"SJML"' in head
        edition = raw if folder_is_raw.get(member.folder, False) else labelled
        if edition.setdefault(member.stem, member) is not member:
            reading.pass_over(member.label, "present twice")
    for stem, member in labelled.items():
        twin = raw.get(stem)
        yield pending(reading, member, "web", (twin.container, twin.path) if twin else None)
    for stem, member in raw.items():
        if stem not in labelled:
            yield pending(reading, member, "web")


def parse_web(reading: Reading, item: Item) -> Iterator[Document]:
    """Articles of a file; ids are ``<file>.<index of the article in it>``."""
    articles = _articles(reading, item)
    if articles is None and item.twin is not None:
        reading.count("raw file read for a faulty labelled one")
        articles = _articles(reading, read_twin(reading, item.twin))
    for index, article in enumerate(articles or ()):
        if document := reading.document(f"{item.id}.{index}", _paragraphs(reading, article)):
            yield document


def _articles(reading: Reading, item: Item) -> list[dict[str, Any]] | None:
    if item.data is None or (value := load_json(reading, item.label, item.data)) is None:
        return None
    if isinstance(value, dict):
        sjml = value.get("SJML")
        articles = sjml.get("text") if isinstance(sjml, dict) else value.get("named_entity")
        if isinstance(articles, list) and all(isinstance(article, dict) for article in articles):
            return articles
    reading.fault(item.label, "holds neither `SJML.text` nor `named_entity`")
    return None


def _paragraphs(reading: Reading, article: dict[str, Any]) -> Paragraphs:
    title, subtitle, content = (
        _clean_sentences(reading, _sentences(article.get(field))) for field in ("title", "subtitle", "content")
    )
    # Untitled articles carry the beginning of their text as title.
    if title and content and " ".join(content).startswith(" ".join(title)):
        reading.count("title that repeats the text dropped")
        title = ()
    return [paragraph for paragraph in (title, subtitle, content) if paragraph]


def _sentences(field: Any) -> list[str]:
    if isinstance(field, str):
        return _RAW_SEPARATOR.split(_RAW_END.sub("", field))
    if isinstance(field, list):
        found = [entry.get("sentence") if isinstance(entry, dict) else entry for entry in field]
        return [sentence for sentence in found if isinstance(sentence, str)]
    return []


def _clean_sentences(reading: Reading, sentences: list[str]) -> tuple[str, ...]:
    if not sentences:
        return ()
    text = clean_lines(reading, sentences)
    if "기자" in text or "특파원" in text:
        text, times = _BYLINE.subn("", text)
        reading.count("byline removed", times)
    if "금지" in text or "저작권" in text:
        # The line often stands between two sentences that were glued around it.
        text, times = _COPYRIGHT.subn("\n", text)
        reading.count("copyright line removed", times)
    if "기사" in text:
        text, times = _RELATED.subn("", text)
        reading.count("related-articles line removed", times)
    if _EMAIL_MASK in text:
        text, times = _EMAIL.subn("", text)
        reading.count("mask removed", times)
    if any(mask in text for mask in _MASKS):
        text, times = _MASK.subn("", text)
        reading.count("mask removed", times)
    text, times = part_glued(text)
    reading.count("glued sentences parted", times)
    text, times = _DOUBLED_STOP.subn(".", text)
    reading.count("doubled full stop mended", times)
    # A line of full stops alone is what a separator leaves.
    return tuple([line.strip() for line in text.split("\n") if line.strip(" .")])
