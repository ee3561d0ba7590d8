"""Corpora with one fault each, in the real formats: what a download, a tool or an enemy can do to a folder.

Every writer puts a corpus into ``<folder>/<corpus>`` and returns a ``Hostile``: what a reader must give and what it
must name. All but those in ``SIZED`` take the folder alone and are listed in ``CASES``. Each corpus holds some
good text too, so that reading it is never an error for want of text, and marks every text with a sentence of its own.
"""

from __future__ import annotations

import bz2
import io
import json
import os
import random
import socket
import struct
import unicodedata
import warnings
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from xml.sax.saxutils import escape

# Root reads whatever it likes: a test of permissions must then be skipped.
PERMISSIONS_BIND = os.geteuid() != 0

Entries = dict[str, bytes] | list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Hostile:
    """What reading a hostile corpus must come to.

    Attributes:
        corpus: its format, and the name of its folder.
        kept: texts that must each occur in exactly one document.
        named: words that must each occur in a fault of the report.
        either: pairs of a text and a word: the text must be kept, or the word be named, or both.
        never: texts that no document may hold.
        untouched: paths that must not exist afterwards.
        refusal: a UserError that names this word is right too; empty where the corpus must be read.
    """

    corpus: str
    kept: tuple[str, ...] = ()
    named: tuple[str, ...] = ()
    either: tuple[tuple[str, str], ...] = ()
    never: tuple[str, ...] = ()
    untouched: tuple[Path, ...] = ()
    refusal: str = ""


# What the formats look like


def sentence(number: int) -> str:
    """A sentence that occurs once, and that no cleaning rule touches."""
    return f"다람쥐가 {number:05d}번 굴에 도토리를 묻었다."


def web_json(text: str) -> bytes:
    """A labelled web file of one article."""
    entry = {"title": [], "subtitle": [], "content": [{"sentence": text, "labels": []}]}
    return json.dumps({"header": {}, "named_entity": [entry]}, ensure_ascii=False).encode()


def written_json(text: str, book: str, ensure_ascii: bool = False) -> bytes:
    """A written book of one document of one paragraph."""
    document = {"id": f"{book}.1", "metadata": {}, "paragraph": [{"id": f"{book}.1.1", "form": text}]}
    return json.dumps({"id": book, "metadata": {}, "document": [document]}, ensure_ascii=ensure_ascii).encode()


def sjml(text: str) -> bytes:
    """An unpublished text of one paragraph."""
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<SJML><header/><text date="0"><p>{text}</p></text></SJML>'.encode()


def wiki_pages(texts: Iterable[str], first_id: int = 1) -> list[bytes]:
    """The page elements of an export."""
    return [
        f"<page><title>제목</title><ns>0</ns><id>{page_id}</id><revision><id>9</id>"
        f'<text xml:space="preserve">{escape(text)}</text></revision></page>\n'.encode()
        for page_id, text in enumerate(texts, first_id)
    ]


def write(path: Path, data: bytes) -> Path:
    """A file, with the folders it needs."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path


class Pipe(io.RawIOBase):
    """A sink that cannot seek: ``zipfile`` then writes sizes behind the data."""

    def __init__(self) -> None:
        super().__init__()
        self.data = bytearray()

    def writable(self) -> bool:
        return True

    def write(self, data) -> int:  # type: ignore[no-untyped-def]
        self.data += data
        return len(data)


def zip_bytes(entries: Entries, streamed: bool = False) -> bytes:
    """A deflated archive; names may repeat."""
    sink = Pipe() if streamed else io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(sink, "w", zipfile.ZIP_DEFLATED) as archive:
        warnings.simplefilter("ignore", UserWarning)
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            archive.writestr(zipfile.ZipInfo(name), data, zipfile.ZIP_DEFLATED)
    return bytes(sink.data) if isinstance(sink, Pipe) else sink.getvalue()


def patched_headers(data: bytes, name: str, flags: int | None = None, method: int | None = None) -> bytes:
    """An archive with the flag bits or the method of one member set by hand, in both of its headers."""
    patched = bytearray(data)
    for mark, name_offset, flags_offset in ((b"PK\x03\x04", 30, 6), (b"PK\x01\x02", 46, 8)):
        at = data.index(mark)
        while data[at + name_offset : at + name_offset + len(name.encode())] != name.encode():
            at = data.index(mark, at + 1)
        if flags is not None:
            struct.pack_into("<H", patched, at + flags_offset, flags)
        if method is not None:
            struct.pack_into("<H", patched, at + flags_offset + 2, method)
    return bytes(patched)


def syllables(num_syllables: int, seed: int) -> str:
    """Words of random Hangul, which compress badly."""
    chance = random.Random(seed)
    return " ".join("".join(chr(chance.randrange(0xAC00, 0xD7A4)) for _ in range(4)) for _ in range(num_syllables // 4))


# Cut short and damaged


def _truncated_zip(folder: Path, corpus: str, entry: Callable[[str, int], bytes], streamed: bool) -> Hostile:
    members = {
        f"k/W{number}.json": entry(f"{sentence(number)} {syllables(900, number)}", number) for number in range(8)
    }
    data = zip_bytes(members, streamed)
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    write(folder / corpus / "cut.zip", data[: infos[5].header_offset + infos[5].compress_size // 2])
    return Hostile(
        corpus,
        kept=tuple(map(sentence, range(5))),
        named=("cut.zip", "W5.json"),
        never=tuple(map(sentence, range(6, 8))),
    )


def truncated_written_zip(folder: Path) -> Hostile:
    """An archive without a directory that ends inside its sixth member: five books are whole."""
    return _truncated_zip(folder, "written", lambda text, number: written_json(text, f"W{number}"), streamed=False)


def truncated_web_zip(folder: Path) -> Hostile:
    """The same for the web corpus."""
    return _truncated_zip(folder, "web", lambda text, number: web_json(text), streamed=False)


def truncated_streamed_zip(folder: Path) -> Hostile:
    """The same, of an archive that was written to a pipe: sizes stand behind the data and not in the headers."""
    return _truncated_zip(folder, "written", lambda text, number: written_json(text, f"W{number}"), streamed=True)


def truncated_split_zip(folder: Path) -> Hostile:
    """A split archive whose last part is missing."""
    members = {f"W{n}.json": written_json(f"{sentence(n)} {syllables(900, n)}", f"W{n}") for n in range(8)}
    data = zip_bytes(members)
    middle = zipfile.ZipFile(io.BytesIO(data)).infolist()[5].header_offset + 300
    for number, (start, end) in enumerate(((0, middle // 2), (middle // 2, middle))):
        write(folder / "written" / f"N.zip.part{number}", data[start:end])
    return Hostile("written", kept=tuple(map(sentence, range(5))), named=("N.zip.part0", "W5.json"))


def damaged_zip_member(folder: Path) -> Hostile:
    """A member whose data does not have its checksum."""
    data = bytearray(zip_bytes({f"W{n}.json": written_json(sentence(n) * 40, f"W{n}") for n in range(3)}))
    struct.pack_into("<L", data, data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 1) + 16, 0)
    write(folder / "written" / "N.zip", bytes(data))
    return Hostile("written", kept=(sentence(0), sentence(2)), named=("W1.json",), never=(sentence(1),))


def _page_texts(num_pages: int) -> list[str]:
    return [f"{sentence(2 * n)}\n{syllables(2400, n)}\n{sentence(2 * n + 1)}" for n in range(num_pages)]


def _kept_of_pages(numbers: Iterable[int]) -> tuple[str, ...]:
    return tuple(sentence(number) for page in numbers for number in (2 * page, 2 * page + 1))


def truncated_bz2(folder: Path) -> Hostile:
    """An export of one bz2 stream that ends inside a block: every page that ends before that block is whole."""
    pages = wiki_pages(_page_texts(60))
    data = bz2.compress(b"<mediawiki>\n" + b"".join(pages) + b"</mediawiki>", 1)
    cut = data[: len(data) * 2 // 3]
    write(folder / "wiki" / "kowiki.xml.bz2", cut)
    decompressor = bz2.BZ2Decompressor()
    text = decompressor.decompress(cut)
    while piece := decompressor.decompress(b""):
        text += piece
    return Hostile("wiki", kept=_kept_of_pages(range(text.count(b"</page>"))), named=("kowiki.xml.bz2",))


def truncated_multistream_bz2(folder: Path) -> Hostile:
    """An export of ten pages a stream, cut inside its fifth stream."""
    texts = _page_texts(60)
    streams = [bz2.compress(b"".join(wiki_pages(texts[at : at + 10], at + 1))) for at in range(0, 60, 10)]
    data = bz2.compress(b"<mediawiki>\n") + b"".join(streams)
    write(folder / "wiki" / "kowiki-multistream.xml.bz2", data[: -len(streams[5]) - len(streams[4]) // 2])
    return Hostile("wiki", kept=_kept_of_pages(range(40)), named=("kowiki-multistream.xml.bz2",))


def damaged_multistream_bz2(folder: Path) -> Hostile:
    """The same export whole, with bytes of its second stream overwritten: only that stream's pages may be lost."""
    texts = _page_texts(60)
    streams = [bz2.compress(b"".join(wiki_pages(texts[at : at + 10], at + 1))) for at in range(0, 60, 10)]
    streams[1] = streams[1][:900] + bytes(200) + streams[1][1100:]
    write(folder / "wiki" / "kowiki-multistream.xml.bz2", bz2.compress(b"<mediawiki>\n") + b"".join(streams))
    kept = _kept_of_pages([*range(10), *range(20, 60)])
    return Hostile("wiki", kept=kept, named=("kowiki-multistream.xml.bz2",))


def damaged_wiki_page(folder: Path) -> Hostile:
    """Plain XML with a page that holds invalid bytes, one without an end and one without a beginning."""
    pages = wiki_pages([*map(sentence, range(5)), f"{sentence(5)} 깨진 자리 {sentence(6)}"])
    pages[1] = pages[1].replace(b"</page>", b"")
    pages[3] = pages[3].replace(b"<page>", b"")
    pages[5] = pages[5].replace("깨진 자리".encode(), b"\xff\xfe\xb1")
    write(folder / "wiki" / "k.xml", b"<mediawiki>" + b"".join(pages) + b"</mediawiki>")
    lost = tuple((sentence(number), "k.xml") for number in (1, 2, 3))
    return Hostile("wiki", kept=tuple(map(sentence, (0, 4, 5, 6))), named=("k.xml", "page 6"), either=lost)


# Encodings


def wrong_encodings(folder: Path) -> Hostile:
    """Text files in cp949 and UTF-16, and two that mix encodings or hold bytes of none."""
    root = folder / "text"
    write(root / "a_utf8.txt", sentence(0).encode())
    write(root / "b_cp949.txt", sentence(1).encode("cp949"))
    write(root / "c_utf16.txt", sentence(2).encode("utf-16"))
    write(root / "d_utf16_no_mark.txt", sentence(3).encode("utf-16-le"))
    write(
        root / "e_mixed.txt", f"{sentence(4)}\n\n".encode() + "옛 글자".encode("cp949") + f"\n\n{sentence(5)}".encode()
    )
    write(root / "f_invalid.txt", sentence(6).encode() + b" \xff\xc3\x28\xfe " + sentence(7).encode())
    return Hostile(
        "text",
        kept=tuple(map(sentence, (0, 1, 2, 4, 5, 6, 7))),
        named=("e_mixed.txt", "f_invalid.txt"),
        either=((sentence(3), "d_utf16_no_mark.txt"),),
    )


def wrong_encodings_in_json(folder: Path) -> Hostile:
    """Books in cp949 and UTF-16, and one with invalid bytes inside a string."""
    books = [written_json(f"{sentence(n)} 끝", f"W{n}").decode() for n in range(4)]
    entries = {
        "W0.json": books[0].encode(),
        "W1.json": books[1].encode("cp949"),
        "W2.json": books[2].encode("utf-16"),
        "W3.json": books[3].encode().replace("끝".encode(), b"\xff\xff"),
    }
    write(folder / "written" / "N.zip", zip_bytes(entries))
    return Hostile("written", kept=tuple(map(sentence, range(4))), named=("W3.json",))


def byte_order_marks(folder: Path) -> Hostile:
    """Marks of UTF-8, UTF-16 and UTF-32, a doubled mark, and marks inside JSON lines."""
    root = folder / "text"
    write(root / "a.txt", b"\xef\xbb\xbf" + sentence(0).encode())
    write(root / "b.txt", b"\xff\xfe" + sentence(1).encode("utf-16-le"))
    write(root / "c.txt", b"\xfe\xff" + sentence(2).encode("utf-16-be"))
    write(root / "d.txt", b"\xff\xfe\0\0" + sentence(3).encode("utf-32-le"))
    write(root / "e.txt", b"\xef\xbb\xbf\xef\xbb\xbf" + sentence(4).encode())
    write(root / "f.txt", b"\xef\xbb\xbf")
    kept = tuple(map(sentence, (0, 1, 2, 4)))
    return Hostile("text", kept, either=((sentence(3), "d.txt"),), never=("\ufeff", "\0"))


def byte_order_marks_in_lines(folder: Path) -> Hostile:
    """JSON lines of which each begins with a mark, as joined files do."""
    lines = [b"\xef\xbb\xbf" + json.dumps({"text": sentence(n)}).encode() for n in range(3)]
    write(folder / "jsonl" / "a.jsonl", b"\n".join(lines))
    write(folder / "jsonl" / "b.jsonl", "\n".join(json.dumps({"text": sentence(n)}) for n in (3, 4)).encode("utf-16"))
    either = tuple((sentence(n), "b.jsonl") for n in (3, 4))
    return Hostile("jsonl", kept=tuple(map(sentence, range(3))), either=either, never=("\ufeff",))


def line_ends(folder: Path) -> Hostile:
    """Windows and old Macintosh line ends: they end lines and part paragraphs, and none stays in the text."""
    root = folder / "text"
    write(root / "a.txt", f"{sentence(0)}\r\n\r\n{sentence(1)}\r\n".encode())
    write(root / "b.txt", f"{sentence(2)}\r\r{sentence(3)}\r".encode())
    return Hostile("text", kept=tuple(map(sentence, range(4))), never=("\r",))


def line_ends_in_json_lines(folder: Path) -> Hostile:
    """JSON lines with Windows line ends, blank lines, and no end of the last line."""
    write(folder / "jsonl" / "a.jsonl", "\r\n\r\n".join(json.dumps({"text": sentence(n)}) for n in range(3)).encode())
    return Hostile("jsonl", kept=tuple(map(sentence, range(3))), never=("\r",))


def control_characters(folder: Path) -> Hostile:
    """Zero bytes, escapes and terminal codes inside text and JSON: they go, the text around them stays."""
    root = folder / "text"
    write(root / "a.txt", f"{sentence(0)}\0\0\x1b[2J {sentence(1)}".encode())
    # Zero bytes from the first on must not make a text file look like no text.
    write(root / "b.txt", b"\0" + sentence(2).encode())
    return Hostile("text", kept=tuple(map(sentence, range(2))), either=((sentence(2), "b.txt"),), never=("\0", "\x1b"))


def lone_surrogates(folder: Path) -> Hostile:
    """JSON escapes of half a pair, which no encoding can write; a whole pair must stay."""
    halves = [f"{sentence(0)}\ud800", f"\udc00{sentence(1)}", f"{sentence(2)}\ude00\ud83d", f"{sentence(3)} \U0001f43f"]
    lines = "\n".join(json.dumps({"text": text, "id": f"식\ud800{n}"}) for n, text in enumerate(halves))
    write(folder / "jsonl" / "a.jsonl", lines.encode())
    kept = (*map(sentence, range(4)), "\U0001f43f")
    return Hostile("jsonl", kept, never=("\ud800", "\udc00", "\ude00", "\ud83d"))


# Members that are not what they should be


def invalid_json(folder: Path) -> Hostile:
    """Members that are no JSON, or JSON of another shape; one of them holds a number of 6,000 digits."""
    bad = {
        "bad0.json": written_json("글", "x")[:-9],
        "bad1.json": b"{broken",
        "bad2.json": "그냥 글이다.".encode(),
        "bad3.json": b"null",
        "bad4.json": b'{"document": 3}',
        "bad5.json": b'{"document": [[1], null, {"paragraph": {}}]}',
        "bad6.json": b'{"document": ' + b"9" * 6000 + b"}",
        "bad7.json": b'{"document": []} trailing',
    }
    write(folder / "written" / "N.zip", zip_bytes({**bad, "W0.json": written_json(sentence(0), "W0")}))
    return Hostile("written", kept=(sentence(0),), named=tuple(bad))


def invalid_json_web(folder: Path) -> Hostile:
    """Web files that are no JSON, or whose articles are none."""
    bad = {"k/bad0.json": b"[}", "k/bad1.json": b"[]", "k/bad2.json": b'{"named_entity": [5]}'}
    write(folder / "web" / "TL1.zip", zip_bytes({**bad, "k/B0.json": web_json(sentence(0))}))
    return Hostile("web", kept=(sentence(0),), named=tuple(bad))


def invalid_json_lines(folder: Path) -> Hostile:
    """Lines that are no JSON or hold no text."""
    good = json.dumps({"text": sentence(0)}).encode()
    bad = [b"nonsense", b'{"text": 5}', b"[]", b'{"no": 1}', b'{"text": "x', b"\xff\xfe\xfd", b"9" * 6000]
    write(folder / "jsonl" / "a.jsonl", b"\n".join([*bad, good]))
    return Hostile("jsonl", kept=(sentence(0),), named=tuple(f"a.jsonl line {n}" for n in range(1, len(bad) + 1)))


def empty_members(folder: Path) -> Hostile:
    """Members and files of no bytes, and an archive of no members."""
    write(folder / "written" / "N.zip", zip_bytes({"W0.json": written_json(sentence(0), "W0"), "W1.json": b""}))
    write(folder / "written" / "W2.json", b"")
    write(folder / "written" / "none.zip", b"PK\x05\x06" + bytes(18))
    write(folder / "written" / "zero.zip", b"")
    return Hostile("written", kept=(sentence(0),), named=("W1.json", "W2.json", "none.zip", "zero.zip"))


def nested_json(folder: Path, depth: int = 100_000) -> Hostile:
    """A member, and a field of an otherwise good member, of lists in lists."""
    deep = b"[" * depth + b"]" * depth
    aside = written_json(sentence(1), "deep1").replace(b'"metadata": {}', b'"metadata": ' + deep, 1)
    entries = {"deep0.json": deep, "deep1.json": aside, "W0.json": written_json(sentence(0), "W0")}
    write(folder / "written" / "N.zip", zip_bytes(entries))
    return Hostile("written", kept=(sentence(0),), named=("deep0.json",), either=((sentence(1), "deep1.json"),))


def nested_json_line(folder: Path, depth: int = 100_000) -> Hostile:
    """The same in a line of JSON lines."""
    lines = [b"[" * depth, b'{"text": ' + b"[" * depth, json.dumps({"text": sentence(0)}).encode()]
    write(folder / "jsonl" / "a.jsonl", b"\n".join(lines))
    return Hostile("jsonl", kept=(sentence(0),), named=("a.jsonl line 1", "a.jsonl line 2"))


def nested_wikitext(folder: Path, depth: int = 50_000) -> Hostile:
    """Pages of templates in templates and links in links that never end."""
    texts = [f"{sentence(n)}\n{unit * depth}" for n, unit in enumerate(("{{", "[[", "{|\n", "<ref>", "(", "{{[["))]
    write(folder / "wiki" / "k.xml", b"<mediawiki>" + b"".join(wiki_pages([*texts, sentence(9)])) + b"</mediawiki>")
    return Hostile("wiki", kept=(*(sentence(n) for n in range(6)), sentence(9)))


def entity_bomb(folder: Path) -> Hostile:
    """XML whose entities would unfold to gigabytes, and one that asks for a file of the machine."""
    levels = "".join(f'<!ENTITY e{n} "{f"&e{n - 1};" * 10}">' for n in range(1, 10))
    bomb = f'<!DOCTYPE SJML [<!ENTITY e0 "폭탄">{levels}]><SJML><text><p>&e9;</p></text></SJML>'
    outside = '<!DOCTYPE SJML [<!ENTITY f SYSTEM "file:///etc/passwd">]><SJML><text><p>&f;</p></text></SJML>'
    entries = {"bomb.sjml": bomb.encode(), "outside.sjml": outside.encode(), "W0.sjml": sjml(sentence(0))}
    write(folder / "unpublished" / "NP.zip", zip_bytes(entries))
    return Hostile("unpublished", kept=(sentence(0),), named=("bomb.sjml", "outside.sjml"), never=("폭탄폭탄", "root:"))


def malformed_csv(folder: Path) -> Hostile:
    """Tables with zero bytes, rows too short and too long, a quote that never ends, and one without its columns."""
    root = folder / "unpublished"
    head = b"file_id,sentence\n"
    rows = [f"F{n},{sentence(n)}".encode() for n in range(3)]
    write(root / "a.csv", head + b"\n".join([rows[0], b"F8", b"F9,\0,x,y,z", b",", rows[1], rows[2]]) + b"\n")
    write(root / "b.csv", head + f'F4,{sentence(4)}\nF5,"{sentence(5)}\nF6,{sentence(6)}\n'.encode())
    write(root / "c.csv", f"file,text\nF7,{sentence(7)}\n".encode())
    write(root / "d.csv", head + f"F10,{sentence(10)} ".encode() + b"\xff\xfe\n")
    either = tuple((sentence(n), "b.csv") for n in (5, 6))
    kept = tuple(map(sentence, (0, 1, 2, 4, 10)))
    return Hostile("unpublished", kept, named=("c.csv", "d.csv"), either=either, never=("\0",))


def csv_in_cp949(folder: Path) -> Hostile:
    """A table as a Korean spreadsheet saves it."""
    write(folder / "unpublished" / "a.csv", f"file_id,sentence\r\nF1,{sentence(1)}\r\n".encode("cp949"))
    write(folder / "unpublished" / "b.csv", f"file_id,sentence\r\nF2,{sentence(2)}\r\n".encode("utf-16"))
    write(folder / "unpublished" / "c.csv", f"file_id,sentence\nF3,{sentence(3)}\n".encode())
    return Hostile("unpublished", kept=(sentence(1), sentence(3)), either=((sentence(2), "b.csv"),))


# Archives


def escaping_names(folder: Path) -> Hostile:
    """Entries that would leave the folder if they were extracted. Three share a stem, so each must be told apart."""
    names = ("../evil.json", "/etc/evil.json", "C:\\evil.json", "a/../../../evil4.json", "..\\evil5.json")
    entries = {name: written_json(sentence(n), f"evil{n}") for n, name in enumerate(names)}
    entries["W9.json"] = written_json(sentence(9), "W9")
    write(folder / "written" / "N.zip", zip_bytes(entries))
    places = (
        folder,
        folder / "written",
        folder.parent,
        folder.parent.parent,
        Path.cwd(),
        Path.cwd().parent,
        Path("/etc"),
    )
    untouched = tuple(
        place / name
        for place in places
        for name in ("evil.json", "evil4.json", "evil5.json", "C:\\evil.json", "..\\evil5.json")
    )
    either = tuple((sentence(n), name) for n, name in enumerate(names))
    return Hostile("written", kept=(sentence(9),), either=either, untouched=untouched)


def odd_entry_names(folder: Path) -> Hostile:
    """Entries whose name is empty (a zero byte comes first), holds a newline, or is 60,000 bytes long."""
    names = ("\nW1.json", "k/" * 30_000 + "W2.json", "W3.json\x1b[2J.json")
    entries = {name: written_json(sentence(n), f"W{n}") for n, name in enumerate(names, 1)}
    entries["QQQQ0.json"] = written_json(sentence(0), "W0")
    entries["W9.json"] = written_json(sentence(9), "W9")
    write(folder / "written" / "N.zip", zip_bytes(entries).replace(b"QQQQ0.json", b"\0QQQ0.json"))
    either = tuple((sentence(n), "N.zip") for n in range(4))
    return Hostile("written", kept=(sentence(9),), either=either)


def archive_in_archive(folder: Path) -> Hostile:
    """A zip archive as a member of another, and a bz2 file as a member."""
    inner = zip_bytes({"W1.json": written_json(sentence(1), "W1")})
    entries = {
        "inner.zip": inner,
        "W2.json.bz2": bz2.compress(written_json(sentence(2), "W2")),
        "W0.json": written_json(sentence(0), "W0"),
    }
    write(folder / "written" / "outer.zip", zip_bytes(entries))
    either = ((sentence(1), "inner.zip"), (sentence(2), "W2.json.bz2"))
    return Hostile("written", kept=(sentence(0),), either=either)


def unreadable_members(folder: Path) -> Hostile:
    """A member marked as encrypted, one as strongly encrypted, and two of methods that no one knows."""
    data = zip_bytes({f"W{n}.json": written_json(sentence(n), f"W{n}") for n in range(5)})
    data = patched_headers(data, "W1.json", flags=0x1)
    data = patched_headers(data, "W2.json", flags=0x41)
    data = patched_headers(data, "W3.json", method=99)
    data = patched_headers(data, "W4.json", method=9)
    write(folder / "written" / "N.zip", data)
    names = tuple(f"W{n}.json" for n in range(1, 5))
    return Hostile("written", kept=(sentence(0),), named=names, never=tuple(map(sentence, range(1, 5))))


def all_members_encrypted_first(folder: Path) -> Hostile:
    """An archive none of whose first members can be read: what it holds must be known from a later one."""
    data = zip_bytes({f"W{n:02d}.json": written_json(sentence(n), f"W{n:02d}") for n in range(20)})
    for number in range(12):
        data = patched_headers(data, f"W{number:02d}.json", flags=0x1)
    write(folder / "written" / "N.zip", data)
    named = tuple(f"W{n:02d}.json" for n in range(12))
    return Hostile("written", kept=tuple(map(sentence, range(12, 20))), named=named)


def duplicate_names(folder: Path) -> Hostile:
    """One name three times in an archive, twice with the same text; nothing may come twice."""
    same, other = written_json(sentence(0), "W0"), written_json(sentence(1), "W0")
    write(folder / "written" / "N.zip", zip_bytes([("W0.json", same), ("W0.json", same), ("W0.json", other)]))
    return Hostile("written", kept=(sentence(0),), either=((sentence(1), "W0.json"),))


# Things in the folder that are no files


def special_files(folder: Path) -> Hostile:
    """A pipe that no one writes to, a socket, and links to devices, under names of data. None may be waited for."""
    root = folder / "written"
    write(root / "W0.json", written_json(sentence(0), "W0"))
    os.mkfifo(root / "pipe.json")
    os.mkfifo(root / "N.zip.part0")
    (root / "device.json").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as listener:
        # A path of a socket holds about a hundred bytes; that of a test folder may be longer.
        here = os.open(root, os.O_DIRECTORY)
        listener.bind(f"/proc/self/fd/{here}/socket.json")
        os.close(here)
    named = ("pipe.json", "N.zip.part0", "device.json", "socket.json")
    return Hostile("written", kept=(sentence(0),), named=named)


def links(folder: Path) -> Hostile:
    """Links in a circle, a link to the folder itself, one to nothing, and two to the same file."""
    root = folder / "written"
    data = write(root / "k" / "W0.json", written_json(sentence(0), "W0"))
    (root / "a_self").symlink_to(root, target_is_directory=True)
    (root / "k" / "up").symlink_to("..", target_is_directory=True)
    (root / "circle1.json").symlink_to("circle2.json")
    (root / "circle2.json").symlink_to("circle1.json")
    (root / "nothing.json").symlink_to("is not there.json")
    (root / "again").mkdir()
    (root / "again" / "W0.json").symlink_to(data)
    return Hostile("written", kept=(sentence(0),), named=("nothing.json", "circle1.json", "circle2.json"))


def folder_named_as_archive(folder: Path) -> Hostile:
    """A folder ``x.zip`` with a file in it, and an empty folder named as a part."""
    write(folder / "written" / "x.zip" / "W0.json", written_json(sentence(0), "W0"))
    (folder / "written" / "y.zip.part0").mkdir()
    write(folder / "written" / "y.zip.part1" / "W1.json", written_json(sentence(1), "W1"))
    return Hostile("written", kept=(sentence(0), sentence(1)))


def unreadable_folder(folder: Path) -> Hostile:
    """A folder that may not be entered. Only for users other than root; give it back with ``make_readable``."""
    write(folder / "written" / "W0.json", written_json(sentence(0), "W0"))
    write(folder / "written" / "closed" / "W1.json", written_json(sentence(1), "W1"))
    (folder / "written" / "closed").chmod(0)
    return Hostile("written", kept=(sentence(0),), named=("closed",), refusal="closed")


def unreadable_file(folder: Path) -> Hostile:
    """Files that may not be read. Only for users other than root."""
    write(folder / "written" / "W0.json", written_json(sentence(0), "W0"))
    write(folder / "written" / "W1.json", written_json(sentence(1), "W1")).chmod(0)
    write(folder / "written" / "N.zip", zip_bytes({"W2.json": written_json(sentence(2), "W2")})).chmod(0)
    return Hostile("written", kept=(sentence(0),), named=("W1.json", "N.zip"), refusal="W1.json")


def make_readable(folder: Path) -> None:
    """Undo what ``unreadable_folder`` did, so that the folder can be removed."""
    (folder / "written" / "closed").chmod(0o700)


def odd_file_names(folder: Path) -> Hostile:
    """Names in cp949 bytes, in decomposed Hangul, with a newline; one is named in a fault, which must be printable."""
    root = folder / "text"
    root.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate(
        ("옛글".encode("cp949"), "한글".encode(), unicodedata.normalize("NFD", "한글").encode(), b"a\nb", b" ")
    ):
        Path(os.fsdecode(os.fsencode(root) + b"/" + name + b".txt")).write_bytes(sentence(number).encode())
    Path(os.fsdecode(os.fsencode(root) + "/빈글.txt".encode("cp949"))).write_bytes(b"")
    return Hostile("text", kept=tuple(map(sentence, range(5))), named=(".txt",))


# Large things


def giant_text_line(folder: Path, size_bytes: int = 200_000_000) -> Hostile:
    """A text file of one line."""
    write(folder / "text" / "a.txt", sentence(0).encode())
    write(folder / "text" / "giant.txt", _giant(size_bytes).encode())
    return Hostile("text", kept=(sentence(0),), either=_either_giant("giant.txt"))


def giant_json_line(folder: Path, size_bytes: int = 200_000_000) -> Hostile:
    """JSON lines with one line of that size; those around it are whole."""
    lines = (json.dumps({"text": text}, ensure_ascii=False) for text in (sentence(0), _giant(size_bytes), sentence(3)))
    write(folder / "jsonl" / "giant.jsonl", "\n".join(lines).encode())
    return Hostile("jsonl", kept=(sentence(0), sentence(3)), either=_either_giant("giant.jsonl"))


def giant_csv_line(folder: Path, size_bytes: int = 200_000_000) -> Hostile:
    """A table with one field of that size."""
    rows = "\n".join(f"F{n},{text}" for n, text in enumerate((sentence(0), _giant(size_bytes), sentence(3))))
    write(folder / "unpublished" / "giant.csv", f"file_id,sentence\n{rows}\n".encode())
    return Hostile("unpublished", kept=(sentence(0),), either=(*_either_giant("giant.csv"), (sentence(3), "giant.csv")))


def giant_json_member(folder: Path, size_bytes: int = 200_000_000) -> Hostile:
    """A book of one paragraph of that size."""
    entries = {"W0.json": written_json(sentence(0), "W0"), "giant.json": written_json(_giant(size_bytes), "giant")}
    write(folder / "written" / "N.zip", zip_bytes(entries))
    return Hostile("written", kept=(sentence(0),), either=_either_giant("giant.json"))


def giant_web_member(folder: Path, size_bytes: int = 200_000_000) -> Hostile:
    """A web file of one sentence of that size."""
    entries = {"k/B0.json": web_json(sentence(0)), "k/giant.json": web_json(_giant(size_bytes))}
    write(folder / "web" / "TL1.zip", zip_bytes(entries))
    return Hostile("web", kept=(sentence(0),), either=_either_giant("giant.json"))


def giant_wiki_line(folder: Path, size_bytes: int = 200_000_000) -> Hostile:
    """A page of one line of that size."""
    pages = wiki_pages([sentence(0), _giant(size_bytes), sentence(3)])
    write(folder / "wiki" / "giant.xml", b"<mediawiki>" + b"".join(pages) + b"</mediawiki>")
    return Hostile("wiki", kept=(sentence(0), sentence(3)), either=_either_giant("giant.xml"))


def zip_bomb(folder: Path, size_bytes: int = 1_000_000_000) -> Hostile:
    """Members of zeros that are a thousandth of their size in the archive."""
    path = folder / "written" / "N.zip"
    write(path, zip_bytes({"W0.json": written_json(sentence(0), "W0")}))
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("bomb.json", "w") as member:
        for start in range(0, size_bytes, 1 << 20):
            member.write(bytes(min(1 << 20, size_bytes - start)))
    return Hostile("written", kept=(sentence(0),), named=("bomb.json",))


def bz2_bomb(folder: Path, size_bytes: int = 1_000_000_000) -> Hostile:
    """An export whose middle unfolds to spaces without an end; good pages stand before and behind it."""
    compressor = bz2.BZ2Compressor()
    data = compressor.compress(b"<mediawiki>" + wiki_pages([sentence(0)])[0])
    for start in range(0, size_bytes, 1 << 20):
        data += compressor.compress(b" " * min(1 << 20, size_bytes - start))
    data += compressor.compress(wiki_pages([sentence(1)], 2)[0] + b"</mediawiki>") + compressor.flush()
    write(folder / "wiki" / "bomb.xml.bz2", data)
    return Hostile("wiki", kept=(sentence(0),), either=((sentence(1), "bomb.xml.bz2"),))


def _giant(size_bytes: int) -> str:
    filler = "가나다라 "
    return f"{sentence(1)} {filler * (size_bytes // len(filler.encode()))}{sentence(2)}"


def _either_giant(name: str) -> tuple[tuple[str, str], ...]:
    return (sentence(1), name), (sentence(2), name)


CASES: tuple[Callable[[Path], Hostile], ...] = (
    truncated_written_zip,
    truncated_web_zip,
    truncated_streamed_zip,
    truncated_split_zip,
    damaged_zip_member,
    truncated_bz2,
    truncated_multistream_bz2,
    damaged_multistream_bz2,
    damaged_wiki_page,
    wrong_encodings,
    wrong_encodings_in_json,
    byte_order_marks,
    byte_order_marks_in_lines,
    line_ends,
    line_ends_in_json_lines,
    control_characters,
    lone_surrogates,
    invalid_json,
    invalid_json_web,
    invalid_json_lines,
    empty_members,
    nested_json,
    nested_json_line,
    nested_wikitext,
    entity_bomb,
    malformed_csv,
    csv_in_cp949,
    escaping_names,
    odd_entry_names,
    archive_in_archive,
    unreadable_members,
    all_members_encrypted_first,
    duplicate_names,
    special_files,
    links,
    folder_named_as_archive,
    odd_file_names,
)
# These need a user who is not root.
PERMISSION_CASES: tuple[Callable[[Path], Hostile], ...] = (unreadable_folder, unreadable_file)
# These take the size of the large thing; small ones test the same code in a moment.
SIZED: tuple[Callable[[Path, int], Hostile], ...] = (
    giant_text_line,
    giant_json_line,
    giant_csv_line,
    giant_json_member,
    giant_web_member,
    giant_wiki_line,
    zip_bomb,
    bz2_bomb,
)
