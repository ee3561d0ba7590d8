"""The corpus readers on small files in the real formats, and on the sample corpora where they are at hand."""

from __future__ import annotations

import bz2
import json
import os
import unicodedata
import zipfile
from pathlib import Path
from xml.sax.saxutils import escape

import pytest

from daramgpt.corpora import Corpus, Document, ReadReport, blocks, detect, find, parse, read
from daramgpt.corpora.hub import HubDataset
from daramgpt.corpora.reading import Reading
from daramgpt.corpora.repeats import RepeatTable, text_digest
from daramgpt.corpora.wikitext import plain_lines
from daramgpt.errors import UserError

SHARED = Path(__file__).parents[2] / "shared" / "corpora"


def read_all(name: str, folder: Path, strict: bool = False) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    documents = list(read(find(folder, name), report, strict))
    assert report.documents == len(documents)
    return documents, report


def texts(documents: list[Document]) -> list[str]:
    return ["\n".join(" ".join(pieces) for pieces in document.paragraphs) for document in documents]


def write_zip(path: Path, entries: dict[str, str | bytes]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            archive.writestr(name, content)
    return path


def raw(*articles: tuple[str, list[str]]) -> str:
    entries = [{"title": t, "subtitle": "", "content": " . . ".join(c) + " ."} for t, c in articles]
    return json.dumps({"SJML": {"header": {}, "text": entries}}, ensure_ascii=False)


def labelled(*articles: tuple[str, list[str]]) -> str:
    def cut(sentences: list[str]) -> list[dict[str, object]]:
        return [{"sentence": sentence, "labels": []} for sentence in sentences]

    entries = [{"title": cut([t] if t else []), "subtitle": [], "content": cut(c)} for t, c in articles]
    return json.dumps({"header": {}, "named_entity": entries}, ensure_ascii=False)


def written(*documents: list[str], name: str = "WARW1900000001") -> str:
    entries = [
        {
            "id": f"{name}.{i}",
            "metadata": {},
            "paragraph": [{"id": f"{name}.{i}.{j}", "form": form} for j, form in enumerate(d)],
        }
        for i, d in enumerate(documents, 1)
    ]
    return json.dumps({"id": name, "metadata": {}, "document": entries}, ensure_ascii=False)


def sjml(body: str) -> str:
    header = '<?xml version="1.0" encoding="UTF-8"?>\n<SJML><header><fileId>x</fileId></header>'
    return f'{header}<text date="0">{body}</text></SJML>'


def export(*pages: tuple[int, int, str]) -> bytes:
    body = "".join(
        f"<page><title>제목</title><ns>{namespace}</ns><id>{page_id}</id><revision><id>9</id>"
        f'<text bytes="1" xml:space="preserve">{escape(text)}</text></revision></page>\n'
        for page_id, namespace, text in pages
    )
    return f"<mediawiki><siteinfo/>\n{body}</mediawiki>".encode()


# Web


def test_web_reads_labelled_and_only_what_it_lacks_from_raw(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "web" / "원천데이터" / "TS1.zip",
        {"산업/A1.json": raw(("", ["가."])), "산업/A2.json": raw(("", ["나."])), "산업/A3.json": raw(("", ["다."]))},
    )
    write_zip(
        tmp_path / "web" / "라벨링데이터" / "TL1.zip", {"산업/A1.json": labelled(("", ["가."])), "산업/A2.json": ""}
    )
    documents, report = read_all("web", tmp_path)
    assert [(d.id, t) for d, t in zip(documents, texts(documents), strict=True)] == [
        ("A1.0", "가."),
        ("A2.0", "나."),
        ("A3.0", "다."),
    ]
    assert report.faults == ["TL1.zip!산업/A2.json: is empty"]
    assert report.cleaned["raw file read for a faulty labelled one"] == 1


def test_web_cleaning_counts_each_rule(tmp_path: Path) -> None:
    article = (
        "머리기사 제목",
        [
            "(서울=통신) (이름) 기자 = 비가 내렸다.",
            "강물이 불었다.다리는 (이름) 씨가 지켰다..",
            "피해는 없다.<저작권자 ⓒ 통신, 무단전재 및 재배포 금지>",
            "▶ 관련기사",
            "문의 kim@(이메일)",
        ],
    )
    repeated = ("비가 그", ["비가 그쳤다."])
    write_zip(tmp_path / "web" / "TL1.zip", {"a/B1.json": labelled(article, repeated)})
    documents, report = read_all("web", tmp_path)
    assert documents[0].paragraphs == (
        ("머리기사 제목",),
        ("비가 내렸다.", "강물이 불었다.", "다리는 씨가 지켰다.", "피해는 없다.", "문의"),
    )
    assert documents[1].paragraphs == (("비가 그쳤다.",),)
    assert report.cleaned == {
        "byline removed": 1,
        "copyright line removed": 1,
        "related-articles line removed": 1,
        "mask removed": 2,
        "glued sentences parted": 1,
        "doubled full stop mended": 1,
        "title that repeats the text dropped": 1,
    }


def test_web_raw_gives_the_sentences_of_labelled(tmp_path: Path) -> None:
    article = ("제목이다", ["첫 문장이다.", "둘째 문장이다.", "셋째인가?"])
    write_zip(tmp_path / "a" / "web" / "x.zip", {"k/C.json": raw(article)})
    write_zip(tmp_path / "b" / "web" / "x.zip", {"k/C.json": labelled(article)})
    assert read_all("web", tmp_path / "a")[0] == read_all("web", tmp_path / "b")[0]


# Written


def test_written_headings_marks_and_escapes(tmp_path: Path) -> None:
    forms = [
        "01범보다 무서운 곶감",
        "",
        "  ",
        "옛날에 [*원문 그대로]범이\\n살았다.",
        "2월이었다.",
        "02월 3일의 일",
        "02곶감",
        "03끝",
    ]
    write_zip(tmp_path / "written" / "N.zip", {"N.pdf": "%PDF-1.4", "W.json": written(forms, ["둘째 글이다."])})
    documents, report = read_all("written", tmp_path)
    assert [document.id for document in documents] == ["WARW1900000001.1", "WARW1900000001.2"]
    assert texts(documents)[0].split("\n") == [
        "범보다 무서운 곶감",
        "옛날에 범이 살았다.",
        "2월이었다.",
        "02월 3일의 일",
        "곶감",
        "끝",
    ]
    assert report.cleaned == {
        "glued heading number removed": 3,
        "file passed over: no data of this format": 1,
        "empty paragraph dropped": 2,
        "editorial mark removed": 1,
        "literal \\n removed": 1,
    }


def test_csv_editions_group_rows_by_text(tmp_path: Path) -> None:
    (tmp_path / "written").mkdir()
    (tmp_path / "written" / "w.csv").write_text(
        'doc_id,file_id,publisher,date,sentence\nA.1,A,,2000,"첫째, 문장."\nA.1,A,,2000,둘째.\nA.2,A,,2000,셋째.\n',
        encoding="utf-8-sig",
    )
    (tmp_path / "unpublished").mkdir()
    (tmp_path / "unpublished" / "u.csv").write_text("file_id,sentence\nF1,일기이다.\nF2,편지이다.\n", encoding="utf-8")
    documents, report = read_all("written", tmp_path)
    assert [document.paragraphs for document in documents] == [(("첫째, 문장.", "둘째."),), (("셋째.",),)]
    assert report.cleaned["CSV text without paragraph breaks"] == 2
    assert [document.id for document in read_all("unpublished", tmp_path)[0]] == ["F1", "F2"]


# Unpublished


def test_unpublished_recovers_malformed_files_and_names_them(tmp_path: Path) -> None:
    write_zip(
        tmp_path / "unpublished" / "NP.zip",
        {
            "d/W1.sjml": "\ufeff" + sjml("<p>첫 줄.</p><p/><p><s>문장 하나.</s><s>문장 둘.</s></p>"),
            "d/W2.sjml": sjml("<p>비용 & 시간은 3 < 5 이다.</p>\n<p><s>가 &amp; 나</s><s>끝.</s></p>"),
        },
    )
    documents, report = read_all("unpublished", tmp_path)
    assert documents[0].paragraphs == (("첫 줄.",), ("문장 하나.", "문장 둘."))
    assert documents[1].paragraphs == (("비용 & 시간은 3 < 5 이다.",), ("가 & 나", "끝."))
    assert len(report.faults) == 1
    assert report.faults[0].startswith("NP.zip!d/W2.sjml: malformed XML")


def test_entry_names_in_cp949(tmp_path: Path) -> None:
    name = "비출판물/W1.sjml"
    path = write_zip(tmp_path / "unpublished" / "NP.zip", {"x" * len(name.encode("cp949")): sjml("<p>a & b</p>")})
    path.write_bytes(path.read_bytes().replace(b"x" * len(name.encode("cp949")), name.encode("cp949")))
    documents, report = read_all("unpublished", tmp_path)
    assert [document.id for document in documents] == ["W1"]
    assert report.faults[0].startswith("NP.zip!비출판물/W1.sjml: ")


# Wikipedia


def test_wiki_keeps_articles_only(tmp_path: Path) -> None:
    pages = export(
        (5, 0, "본문이다.\n== 같이 보기 ==\n* 다른 글"),
        (6, 0, "#넘겨주기 [[본문]]"),
        (7, 14, "분류 설명"),
        (8, 0, "본문이다."),
        (9, 0, "끝 글이다."),
    )
    (tmp_path / "wiki").mkdir()
    (tmp_path / "wiki" / "k.xml.bz2").write_bytes(bz2.compress(pages[:200]) + bz2.compress(pages[200:]))
    documents, report = read_all("wiki", tmp_path)
    assert [document.id for document in documents] == ["5", "9"]
    assert report.cleaned == {
        "redirect dropped": 1,
        "page of another namespace dropped": 1,
        "repeated document dropped": 1,
    }


@pytest.mark.parametrize(
    ("wikitext", "expected"),
    [
        ("'''이름'''(表題, {{llang|en|T}}, {{출생일|1924|10|1}} ~ )는 사람이다.", "이름(表題)는 사람이다."),
        ("이름({{출생}}, 1924년 ~ )은 사람이다.", "이름(1924년 ~)은 사람이다."),
        ("이름(, 1924년 ~ )은 사람이다.", "이름(1924년 ~)은 사람이다."),
        ("이름({{출생일}} ~ {{사망일}})은", "이름은"),
        ("함수 f()와 g({{틀}})", "함수 f()와 g"),
        ("글{{각주|{{안|}}|[[파일:a.jpg]]}}자", "글자"),
        ("[[파일:a.jpg|섬네일|[[한국]]의 {{틀}} 그림]]앞뒤", "앞뒤"),
        ("[[서울|한양]]과 [[부산]], [[:분류:시]] [[en:Seoul]][[분류:도시]]", "한양과 부산, 분류:시"),
        ("[https://a.b 누리집]에서 [https://a.b]", "누리집에서"),
        ('글<ref name="a"/>을<ref>각주 {{인용|[[책]]}}</ref> 쓴다<!-- 몰래 -->.', "글을 쓴다."),
        ("{| class=a\n| [[칸]]\n{|\n| 안\n|}\n|}\n남은 줄", "남은 줄"),
        ("텐서 [[0, 0], [0, 1]]와 [[1, 2]]", "텐서 [[0, 0], [0, 1]]와 [[1, 2]]"),
        ("&lt;b&gt;는 태그, <module>은 글, 3 &amp;lt; 5", "<b>는 태그, <module>은 글, 3 &lt; 5"),
        ("* 항목 하나\n# 항목 둘\n: 들여 쓴 줄\n----", "항목 하나\n항목 둘\n들여 쓴 줄"),
        ("앞\n== 외부 링크 ==\n* 가\n=== 아래 ===\n나\n== 역사 ==\n뒤", "앞\n뒤"),
        ("열린 {{틀과 [[고리", "열린 {{틀과 [[고리"),
        ("<nowiki>{{쓰는 법}}</nowiki>이다", "{{쓰는 법}}이다"),
        ("줄<br/>바꿈<math>x^2</math>과 <small>작은</small> 글", "줄\n바꿈과 작은 글"),
        ("{{lang|en|Seoul}}의 봄 __TOC__", "Seoul의 봄"),
    ],
)
def test_wikitext(wikitext: str, expected: str) -> None:
    lines = plain_lines(Reading("wiki", ReadReport()), wikitext)
    assert "\n".join(" ".join(line.split()) for line in lines) == expected


def test_unbalanced_wikitext_takes_linear_time() -> None:
    reading = Reading("wiki", ReadReport())
    for unit in ("{{", "[[", "}} ", "<ref>", "<!--", "(", "{|\n", "== ", "''"):
        plain_lines(reading, unit * 30_000)


def test_wiki_parquet(tmp_path: Path) -> None:
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    (tmp_path / "wiki").mkdir()
    table = pyarrow.table({"id": ["5"], "title": ["제목"], "text": ["첫 문단이다.\n\n둘째(, 1924년 ~ ) 문단이다."]})
    parquet.write_table(table, tmp_path / "wiki" / "train.parquet")
    assert texts(read_all("wiki", tmp_path)[0]) == ["첫 문단이다.\n둘째(1924년 ~) 문단이다."]


# Plain formats and shared cleaning


def test_text_and_jsonl(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "b10.txt").write_text("한 문단이\n이어진다.\r\n \r\n둘째 문단.", encoding="utf-8")
    (tmp_path / "text" / "b9.txt").write_bytes("옛 글자이다.".encode("cp949"))
    documents, report = read_all("text", tmp_path)
    assert [(d.id, t) for d, t in zip(documents, texts(documents), strict=True)] == [
        ("b9", "옛 글자이다."),
        ("b10", "한 문단이 이어진다.\n둘째 문단."),
    ]
    assert report.cleaned == {"cp949 file decoded": 1}
    (tmp_path / "jsonl").mkdir()
    (tmp_path / "jsonl" / "a.jsonl").write_text(
        '{"text": "하나"}\n\nnot json\n{"id": 7, "text": "둘\\n셋"}\n{"no": 1}\n', encoding="utf-8"
    )
    documents, report = read_all("jsonl", tmp_path)
    assert [(d.id, t) for d, t in zip(documents, texts(documents), strict=True)] == [("a.1", "하나"), ("7", "둘\n셋")]
    assert [fault.split(":")[0] for fault in report.faults] == ["a.jsonl line 3", "a.jsonl line 5"]


def test_normal_form_and_control_characters(tmp_path: Path) -> None:
    (tmp_path / "jsonl").mkdir()
    text = unicodedata.normalize("NFD", "각") + "\u200b\ufeff나\x07\u3000\ud800다"
    (tmp_path / "jsonl" / "a.jsonl").write_text(json.dumps({"text": text}), encoding="utf-8")
    documents, report = read_all("jsonl", tmp_path)
    assert texts(documents) == ["각나 다"]
    assert report.cleaned == {"text brought to NFC": 1, "control character removed": 4}


def test_repeat_table_is_bounded_and_forgets_only_when_full() -> None:
    table = RepeatTable(num_slots=64)

    def digests(start: int, end: int) -> list[int]:
        return [text_digest(Document("web", "1", ((f"글 {number}",),))) for number in range(start, end)]

    first = digests(0, 20)
    assert not any(map(table.seen, first))
    assert all(map(table.seen, first))
    assert all(map(RepeatTable(first).seen, first))
    assert not any(map(table.seen, digests(20, 520)))


# Files, order, faults


def test_unpacked_folders_and_split_archives_read_like_the_archive(tmp_path: Path) -> None:
    entries = {f"k/W{number}.json": written([f"글 {number}이다."], name=f"W{number}") for number in (1, 2, 9, 10, 11)}
    archive = write_zip(tmp_path / "zip" / "written" / "N.zip", entries)
    whole, _ = read_all("written", tmp_path / "zip")
    assert [document.id for document in whole] == ["W1.1", "W2.1", "W9.1", "W10.1", "W11.1"]
    for name, content in entries.items():
        path = tmp_path / "folder" / "written" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")
    assert read_all("written", tmp_path / "folder")[0] == whole
    data = archive.read_bytes()
    parts = tmp_path / "parts" / "written"
    parts.mkdir(parents=True)
    step = len(data) // 11
    for number in range(12):
        (parts / f"N.zip.part{number}").write_bytes(data[number * step : (number + 1) * step])
    assert read_all("written", tmp_path / "parts")[0] == whole
    # The archive beside its own unpacked folder: nothing twice.
    write_zip(tmp_path / "folder" / "written" / "N.zip", entries)
    again, report = read_all("written", tmp_path / "folder")
    assert sorted(again, key=lambda d: d.id) == sorted(whole, key=lambda d: d.id)
    assert report.cleaned["file passed over: present twice"] == 5


def test_find_without_a_folder_of_that_name_goes_by_the_data(tmp_path: Path) -> None:
    web = write_zip(tmp_path / "받은 것" / "TL1.zip", {"a/x.json": labelled(("", ["가."]))})
    book = write_zip(tmp_path / "받은 것" / "N.zip", {"N.pdf": "%PDF-", "W1.json": written(["글."])})
    (tmp_path / "받은 것" / "README.txt").write_text("설명", encoding="utf-8")
    (tmp_path / "loop").symlink_to(tmp_path, target_is_directory=True)
    assert find(tmp_path, "web").paths == [web]
    assert find(tmp_path, "written").paths == [book]
    assert detect(tmp_path / "받은 것" / "README.txt") is None
    with pytest.raises(UserError, match="wiki"):
        find(tmp_path, "wiki")
    with pytest.raises(UserError, match="does not exist"):
        find(tmp_path / "none", "web")


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads every folder")
def test_unreadable_folder_is_named(tmp_path: Path) -> None:
    closed = tmp_path / "web" / "닫힌"
    closed.mkdir(parents=True)
    closed.chmod(0)
    try:
        with pytest.raises(UserError, match="닫힌"):
            find(tmp_path, "web")
    finally:
        closed.chmod(0o700)


def test_broken_files_are_named_and_the_rest_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "written"
    whole = write_zip(
        folder / "a.zip",
        {
            "W1.json": written(["좋은 글."]),
            "W2.json": "{broken",
            "W3.json": "[" * 100_000,
            "W4.json": '{"document": 3}',
        },
    )
    (folder / "b.zip").write_bytes(whole.read_bytes()[:100])
    (folder / "W5.json").write_bytes(b"")
    damaged = write_zip(
        folder / "c.zip",
        {"../W6.json": written(["다른 글."] * 50, name="W6"), "/W7.json": written(["절대 이름."], name="W7")},
    )
    data = bytearray(damaged.read_bytes())
    data[60] ^= 0xFF
    damaged.write_bytes(data)
    documents, report = read_all("written", tmp_path)
    assert texts(documents) == ["좋은 글.", "절대 이름."]
    assert sorted(fault.split(": ")[0] for fault in report.faults) == [
        "W5.json",
        "a.zip!W2.json",
        "a.zip!W3.json",
        "a.zip!W4.json",
        "b.zip",
        "b.zip!W1.json",
        "c.zip!../W6.json",
    ]
    assert not (tmp_path / "W6.json").exists()
    with pytest.raises(UserError, match=r"b\.zip"):
        read_all("written", tmp_path, strict=True)


def test_truncated_export_gives_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "wiki").mkdir()
    pages = export(*((number, 0, f"글 {number}이다. " + os.urandom(3000).hex()) for number in range(1, 400)))
    data = bz2.compress(pages, 1)
    (tmp_path / "wiki" / "k.xml.bz2").write_bytes(data[: len(data) * 2 // 3])
    documents, report = read_all("wiki", tmp_path)
    assert 100 < len(documents) < 399
    assert any("k.xml.bz2" in fault for fault in report.faults)
    (tmp_path / "wiki" / "other.xml").write_text("<other/>", encoding="utf-8")
    assert "other.xml: holds no page of a MediaWiki export" in read_all("wiki", tmp_path)[1].faults


def test_a_corpus_that_yields_nothing_is_an_error(tmp_path: Path) -> None:
    write_zip(tmp_path / "written" / "a.zip", {"W1.json": written([" "])})
    with pytest.raises(UserError, match="gave no text"):
        read_all("written", tmp_path)
    with pytest.raises(UserError, match="unknown format"):
        find(tmp_path, "written", "hwp")


# The sample corpora


@pytest.mark.skipif(not SHARED.exists(), reason="the sample corpora are not on this machine")
@pytest.mark.parametrize(
    ("name", "num_documents", "num_faults"),
    [("web", 11_391, 1), ("written", 475, 0), ("unpublished", 588, 59), ("wiki", 4_003, 0)],
)
def test_sample_corpora(name: str, num_documents: int, num_faults: int) -> None:
    documents, report = read_all(name, SHARED)
    assert len({document.id for document in documents}) == len(documents)
    dropped = report.cleaned["repeated document dropped"] + report.cleaned["empty document dropped"]
    assert len(documents) + dropped == num_documents
    assert len(report.faults) == num_faults
    assert all(piece and piece == piece.strip() for d in documents for pieces in d.paragraphs for piece in pieces)
    if name == "wiki":
        everything = "\n".join(texts(documents))
        assert everything.count("{{") == report.cleaned["double braces kept as text"]
        kept = ("unbalanced mark kept", "double brackets kept as text", "double braces kept as text")
        assert [report.cleaned[rule] for rule in kept] == [17, 4, 2]
        assert len(report.notes) >= 12 and all("page " in note and "kept" in note for note in report.notes)
        assert "<ref" not in everything
        assert "|}" not in everything
        assert everything.count("[[") == report.cleaned["double brackets kept as text"]


# Data sets


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    import pyarrow
    import pyarrow.parquet

    folder = tmp_path / "dataset"
    folder.mkdir()
    texts = [f"글 {number}번(, 1924년 ~ )이다.\n둘째 문단이다." for number in range(1000)]
    table = {"id": list(range(1000)), "body": [*texts[:-1], None]}
    pyarrow.parquet.write_table(pyarrow.table(table), folder / "train-00000.parquet")
    return folder


def test_data_set_streams(dataset: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("daramgpt.corpora.reading.BLOCK_BYTES", 5000)
    monkeypatch.setattr("daramgpt.corpora.hub.BLOCK_BYTES", 5000)
    corpus = Corpus("wiki", "datasets", [], HubDataset(str(dataset), text_field="body"))
    report = ReadReport()
    documents = list(read(corpus, report))
    assert [document.id for document in documents] == [str(number) for number in range(999)]
    assert documents[7].paragraphs == (("글 7번(1924년 ~)이다.",), ("둘째 문단이다.",))
    assert len(report.faults) == 1 and "row 999" in report.faults[0]
    # Reading can begin at any block.
    later = [document for block in blocks(corpus, skip=3) for document in parse(block)[0]]
    assert 0 < len(later) < 999 and later == documents[-len(later) :]


@pytest.mark.parametrize(
    ("changes", "words"),
    [({"text_field": "x"}, "no column 'x'"), ({"split": "x"}, "Bad split"), ({"path": "none/there/at-all"}, "at-all")],
)
def test_data_set_that_is_not_there(changes: dict[str, str], words: str, dataset: Path) -> None:
    hub = HubDataset(**{"path": str(dataset), "text_field": "body", **changes})
    with pytest.raises(UserError, match=words):
        list(read(Corpus("news", "datasets", [], hub), ReadReport()))


def test_a_corpus_of_any_name_is_known_by_its_data(tmp_path: Path) -> None:
    for name, file, text in (
        ("news", "a.jsonl", '{"text": "소식이다."}'),
        ("diary", "a.txt", "일기다."),
        ("both", "a.txt", "글이다."),
        ("both", "b.jsonl", '{"text": "줄이다."}'),
    ):
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / file).write_text(text, encoding="utf-8")
    assert [find(tmp_path, name).format for name in ("news", "diary")] == ["jsonl", "text"]
    with pytest.raises(UserError, match=r"corpus\.formats\.both = one of jsonl, text"):
        find(tmp_path, "both")
    corpus = find(tmp_path, "both", "jsonl")
    assert [path.name for path in corpus.paths] == ["b.jsonl"]
