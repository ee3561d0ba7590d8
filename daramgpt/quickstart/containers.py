"""The four on-disk formats, with the traps that the real corpora set.

Each writer takes finished texts and lays them out as the publisher does: folder, archive and member names, indents,
metadata. What the publisher's own processing adds (bylines, masks, copyright lines, joins, templates, empty forms) is
added here, so the texts themselves stay pure.
"""

from __future__ import annotations

import bz2
import json
from pathlib import Path
from xml.sax.saxutils import escape

from daramgpt.quickstart.archive import write_stored_zip
from daramgpt.quickstart.grammar import Text
from daramgpt.quickstart.world import Chance

_COPYRIGHT = "<저작권자 ⓒ 통신, 무단전재 및 재배포 금지>"
# News first: in archive order and in name order alike, the first part of the web differs from the second.
_NEWS_CATEGORIES = (("IT_과학", "BWSC"), ("경제", "BWEC"), ("사건사고", "BWAC"), ("산업", "BWIN"))
_FORUM_CATEGORIES = (("스포츠", "BWSP"), ("연예", "BWEN"), ("취미", "BWHB"))
_ARTICLES_PER_FILE = 60


def write_web(folder: Path, news: list[Text], forum: list[Text], chance: Chance) -> None:
    """AI-Hub 624: the same articles raw (TS1.zip) and cut into labelled sentences (TL1.zip)."""
    raw_members: list[tuple[str, bytes]] = []
    labelled_members: list[tuple[str, bytes]] = []
    number = 0
    for texts, categories in ((news, _NEWS_CATEGORIES), (forum, _FORUM_CATEGORIES)):
        files = [texts[at : at + _ARTICLES_PER_FILE] for at in range(0, len(texts), _ARTICLES_PER_FILE)]
        for index, articles in enumerate(files):
            category, prefix = categories[index * len(categories) // len(files)]
            name = f"{prefix}217{number:09d}"
            header = {
                "identifier": f"텍스트_웹데이터 말뭉치 구축__217{number:09d}",
                "name": "컨테이너 텍스트 인식을 위한 학습용 데이터셋",
                "category": 0,
                "type": 0,
                "source_file": name,
                "source": "0",
            }
            pairs = [_article(text, texts is news, chance) for text in articles]
            raw = {"SJML": {"header": header, "text": [pair[0] for pair in pairs]}}
            labelled = {"header": header, "named_entity": [pair[1] for pair in pairs]}
            member = f"{category}/{name}.json"
            raw_members.append((member, json.dumps(raw, ensure_ascii=False, indent=2).encode()))
            labelled_members.append((member, json.dumps(labelled, ensure_ascii=False).encode()))
            number += len(articles)
    labelled_members.append(("취미/BWHB217999999999.json", b""))
    root = folder / "030.웹데이터 기반 한국어 말뭉치 데이터" / "01.데이터" / "1.Training"
    write_stored_zip(root / "원천데이터" / "TS1.zip", raw_members)
    write_stored_zip(root / "라벨링데이터" / "TL1.zip", labelled_members)


def _article(text: Text, is_news: bool, chance: Chance) -> tuple[dict[str, object], dict[str, object]]:
    """One article as the raw and as the labelled edition hold it."""
    sentences = [sentence for paragraph in text.paragraphs for sentence in paragraph]
    if is_news and chance.flip(0.15):
        sentences[0] = f"(서울=통신) (이름) 기자 = {sentences[0]}"
    if is_news and chance.flip(0.1):
        sentences.append(_COPYRIGHT)
    if chance.flip(0.04):
        sentences.append("연락처 (이메일)")
    if chance.flip(0.03):
        sentences[-1] += "."
    labelled = list(sentences)
    if len(labelled) > 3 and chance.flip(0.08):
        at = chance.between(1, len(labelled) - 2)
        labelled[at : at + 2] = [labelled[at] + labelled[at + 1]]
    title = "" if chance.flip(0.1) else text.title
    common = {"source_site": "뉴스 생산 업체",
    "write_date": f"20{chance.between(16, 21)}-{chance.between(1, 12):02d}-{chance.between(1, 28):02d} "
              f"{chance.between(7, 22):02d}:{chance.between(0, 59):02d}:00", "board": "사회_일반"}  # fmt: skip
    raw: dict[str, object] = {
        "title": title,
        "subtitle": "",
        "content": " . . ".join(sentences) + " .",
        "board": common["board"],
        "writer": "(이름)",
        "write_date": common["write_date"],
        "url": "https://sample.url",
        "source_site": common["source_site"],
    }
    cut: dict[str, object] = {
        "title": [{"sentence": title, "labels": []}] if title else [],
        "subtitle": [],
        "content": [{"sentence": sentence, "labels": []} for sentence in labelled],
        **common,
    }
    return raw, cut


def write_unpublished(folder: Path, texts: list[Text], chance: Chance) -> None:
    """NIKL unpublished texts: one .sjml a text in a zip whose entry names are cp949; two files are malformed."""
    base = "NIKL_NP_v1.2/국립국어원 비출판물 말뭉치(버전 1.2)/"
    members = [(base + "국립국어원 비출판물 말뭉치(버전 1.1).pdf", b"%PDF-1.4 sample")]
    for number, text in enumerate(texts):
        file_id = f"WDRW19{number:08d}"
        paragraphs = [escape(" ".join(paragraph)) for paragraph in text.paragraphs]
        if number in (5, 15):
            paragraphs[0] = "일기 & 편지 < 첫째 > " + paragraphs[0]
        body = "".join(f"        <p>{paragraph}</p>\n" for paragraph in paragraphs)
        if number % 40 == 7:
            body += "        <p/>\n"
        category = "편지" if text.title == "편지" else "일기"
        age, sex = chance.between(1, 6) * 10, chance.pick("FM")
        xml = (
            '<?xml version="1.0" encoding="UTF-8"?>\n<SJML>\n    <header>\n        <fileInfo>\n'
            f"            <fileId>{file_id}</fileId>\n            <annoLevel>원시</annoLevel>\n"
            f"            <category>비출판물 > {category}</category>\n        </fileInfo>\n        <sourceInfo>\n"
            f"            <title>{escape(text.title)}</title>\n"
            f'            <author id="P{number:05d}" age="{age}" occupation="학생" sex="{sex}" submission="온라인" '
            'handwriting="No">개인글작성자</author>\n        </sourceInfo>\n    </header>\n'
            f'    <text date="20090000" subclass="null_글">\n{body}    </text>\n</SJML>\n'
        )
        members.append((f"{base}{file_id}.sjml", xml.encode("utf-8-sig" if number % 50 == 19 else "utf-8")))
    write_stored_zip(folder / "NIKL_NP_v1.2.zip", members, name_encoding="cp949")


def write_wiki(folder: Path, texts: list[Text], chance: Chance) -> None:
    """A MediaWiki export, bz2, with redirects, other namespaces, templates, notes, links, a table now and then."""
    pages = ['<mediawiki xmlns="http://www.mediawiki.org/xml/export-0.11/" version="0.11" xml:lang="ko">\n'
             "  <siteinfo><sitename>위키백과</sitename><dbname>kowiki</dbname></siteinfo>\n"]  # fmt: skip
    page_id = 5
    linkable = {text.title for text in texts}
    for number, text in enumerate(texts):
        pages.append(_page(text.title, 0, page_id, _wikitext(text, number, linkable, chance)))
        page_id += 1
        if number % 8 == 3:
            pages.append(_page(f"{text.title} 문서", 0, page_id, f"#넘겨주기 [[{text.title}]]", redirect=text.title))
            page_id += 1
        if number % 25 == 11:
            for title, namespace, wikitext in (
                (f"분류:{text.title}", 14, "[[분류:전체]]"),
                (f"틀:{text.title}", 10, "{{{1}}}"),
                (f"빈 문서 {number}", 0, ""),
            ):
                pages.append(_page(title, namespace, page_id, wikitext))
                page_id += 1
    pages.append("</mediawiki>\n")
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "kowiki-latest-pages-articles.xml.bz2").write_bytes(bz2.compress("".join(pages).encode()))


def _page(title: str, namespace: int, page_id: int, wikitext: str, redirect: str = "") -> str:
    redirect_line = f'    <redirect title="{escape(redirect)}" />\n' if redirect else ""
    return (
        f"  <page>\n    <title>{escape(title)}</title>\n"
        f"    <ns>{namespace}</ns>\n    <id>{page_id}</id>\n{redirect_line}"
        f"    <revision>\n      <id>{page_id + 995}</id>\n"
        "      <model>wikitext</model>\n      <format>text/x-wiki</format>\n"
        f'      <text bytes="{len(wikitext.encode())}" xml:space="preserve">{escape(wikitext)}</text>\n'
        "    </revision>\n  </page>\n"
    )


def _wikitext(text: Text, number: int, linkable: set[str], chance: Chance) -> str:
    """An article as its authors typed it. What a reader must drop stands apart from the sentences it must keep."""
    lead, *rest = ([_linked(sentence, text.title, linkable, chance) for sentence in p] for p in text.paragraphs)
    if lead[0].startswith(text.title):
        lead[0] = f"'''{text.title}'''" + lead[0][len(text.title) :]
    parts = []
    if chance.flip(0.4):
        parts.append(f"{{{{정보상자|이름={text.title}|그림={number}.jpg}}}}\n")
    if chance.flip(0.2):
        parts.append(f"[[파일:{number}.jpg|섬네일|{text.title}의 모습]]\n")
    note = f'<ref name="r{number}">기록 {number}쪽</ref>' if chance.flip(0.5) else ""
    parts.append(" ".join(lead) + note + "\n")
    for heading, paragraph in zip(("개요", "특징", "그 밖"), rest, strict=False):
        parts.append(f"\n== {heading} ==\n" + " ".join(paragraph) + "\n")
    if chance.flip(0.1):
        parts.append('\n{| class="wikitable"\n! 가 !! 나\n|-\n| 1 || 2\n|}\n')
    if chance.flip(0.3):
        parts.append("\n== 같이 보기 ==\n* [[대한민국|한국]]\n")
    if note:
        parts.append("\n== 각주 ==\n{{각주}}\n")
    parts.append("\n[[분류:백과]]\n[[en:Title]]")
    return "".join(parts)


def _linked(sentence: str, title: str, linkable: set[str], chance: Chance) -> str:
    """The sentence with one of its words made a link, where that word has an article."""
    if not chance.flip(0.3):
        return sentence
    for word in sentence.split():
        for length in (4, 3, 2):
            if len(word) >= length and word[:length] in linkable and word[:length] != title:
                style = f"[[{word[:length]}]]" if chance.flip(0.7) else f"[[{word[:length]} 문서|{word[:length]}]]"
                return sentence.replace(word, style + word[length:], 1)
    return sentence


def write_written(folder: Path, texts: list[Text], chance: Chance) -> None:
    """NIKL written corpus: one book a JSON file, its texts as documents of paragraphs."""
    members = [("NIKL_WRITTEN(v1.2).pdf", b"%PDF-1.4 sample")]
    kinds = (
        ("WARW", "문어 > 책 > 상상"),
        ("WBRW", "문어 > 책 > 정보"),
        ("WCRW", "문어 > 잡지 > 기타"),
        ("WZRW", "문어 > 책 > 기타"),
    )
    at, number = 0, 0
    while at < len(texts):
        number += 1
        taken = chance.between(8, 24)
        prefix, category = kinds[number % len(kinds)]
        book_id = f"{prefix}19{number:08d}"
        chapters = texts[at : at + taken]
        at += taken
        cut = max(1, len(chapters) // 2) if chance.flip(0.15) else len(chapters)
        documents = [part for part in (chapters[:cut], chapters[cut:]) if part]
        book = {
            "id": book_id,
            "metadata": {
                "title": f"국립국어원 문어 말뭉치 추출 {book_id}",
                "creator": "국립국어원",
                "distributor": "국립국어원",
                "year": "2019",
                "category": category,
                "annotation_level": ["원시"],
                "sampling": "부분 추출 - 임의 추출",
            },
            "document": [_book_part(f"{book_id}.{k}", part, chance) for k, part in enumerate(documents, 1)],
        }
        members.append((f"{book_id}.json", json.dumps(book, ensure_ascii=False, indent=4).encode()))
    write_stored_zip(folder / "NIKL_WRITTEN_v1.2_JSON.zip", members)


def _book_part(document_id: str, chapters: list[Text], chance: Chance) -> dict[str, object]:
    forms: list[str] = []
    for number, chapter in enumerate(chapters, 1):
        forms.append(f"{number:02d}{chapter.title}")
        forms += [" ".join(paragraph) for paragraph in chapter.paragraphs]
        if chance.flip(0.05):
            forms.append(chance.pick(("", "  ")))
    return {
        "id": document_id,
        "metadata": {"title": chapters[0].title, "author": "미상", "publisher": "미상", "date": "2018"},
        "paragraph": [{"id": f"{document_id}.{k}", "form": form} for k, form in enumerate(forms, 1)],
    }
