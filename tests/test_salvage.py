"""What is salvaged from zip archives and bz2 files that were cut short or damaged."""

from __future__ import annotations

import bz2
import io
import random
import struct
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import IO

import pytest
from hostile import Pipe

from daramgpt.corpora.salvaged_bz2 import SalvagedBZ2
from daramgpt.corpora.salvaged_zip import SalvagedArchive, recover_directory

TEXTS = {f"책/W{number}.json": f"글 {number} ".encode() * (50 * number + 1) for number in range(6)}


def zip_bytes(
    entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED, streamed: bool = False, zip64: bool = False
) -> bytes:
    sink: IO[bytes] = Pipe() if streamed else io.BytesIO()  # type: ignore[assignment]
    with zipfile.ZipFile(sink, "w", method) as archive:
        for name, text in entries.items():
            with archive.open(name, "w", force_zip64=zip64) as member:
                member.write(text)
    return bytes(sink.data) if isinstance(sink, Pipe) else sink.getvalue()  # type: ignore[attr-defined]


def directory_offset(data: bytes) -> int:
    return zipfile.ZipFile(io.BytesIO(data)).start_dir


def read_all(archive: zipfile.ZipFile) -> dict[str, bytes]:
    return {info.filename: archive.open(info).read() for info in archive.infolist()}


# Zip


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("zip64", [False, True])
def test_members_before_the_cut_are_had(method: int, streamed: bool, zip64: bool) -> None:
    data = zip_bytes(TEXTS, method, streamed, zip64)
    with SalvagedArchive(io.BytesIO(data[: directory_offset(data) + 7])) as archive:
        assert read_all(archive) == TEXTS
        assert not archive.lost
        assert archive.testzip() is None
    last = zipfile.ZipFile(io.BytesIO(data)).infolist()[-1]
    with SalvagedArchive(io.BytesIO(data[: last.header_offset + 60])) as archive:
        assert read_all(archive) == dict(list(TEXTS.items())[:-1])
        assert [info.filename for info in archive.lost] == ["책/W5.json"]


@pytest.mark.parametrize("streamed", [False, True])
def test_a_cut_at_any_byte_gives_exactly_the_whole_members(streamed: bool) -> None:
    entries = {"가.json": b"abc" * 9, "b/": b"", "c.json": b"", "d.json": bytes(range(256))}
    data = zip_bytes(entries, streamed=streamed)
    infos = zipfile.ZipFile(io.BytesIO(data)).infolist()
    starts = [info.header_offset for info in infos] + [directory_offset(data)]
    # Behind the data of a streamed member stand 16 bytes of sizes, which can be had from the data itself.
    ends = [start - 16 * streamed for start in starts[1:]]
    for cut in range(1, len(data)):
        with SalvagedArchive(io.BytesIO(data[:cut])) as archive:
            found = read_all(archive)
            assert found == dict(list(entries.items())[: len(found)])
            whole = sum(end <= cut for end in ends)
            assert len(found) == whole
            begun = sum(start + 4 <= cut for start in starts[:-1])
            assert len(archive.lost) == begun - whole


def test_names_are_decoded_as_zipfile_does() -> None:
    raw = "비출판물/W1.sjml".encode("cp949")
    data = zip_bytes({"x" * len(raw): b"a", "한글.txt": b"b"}).replace(b"x" * len(raw), raw)
    expected = [info.filename for info in zipfile.ZipFile(io.BytesIO(data)).infolist()]
    with SalvagedArchive(io.BytesIO(data[: directory_offset(data)])) as archive:
        assert [info.filename for info in archive.infolist()] == expected == [raw.decode("cp437"), "한글.txt"]
        assert list(read_all(archive).values()) == [b"a", b"b"]


def test_faulty_members_fail_alone_when_they_are_opened() -> None:
    def patched(name: bytes, offset: int, value: bytes) -> None:
        at = data.index(name) - 30 + offset
        data[at : at + len(value)] = value

    packed = zip_bytes({name: name.encode() * 40 for name in ("enc", "met", "ver", "utf", "crc", "ok!")})
    data = bytearray(packed[: directory_offset(packed)])
    patched(b"enc", 6, b"\x01")
    patched(b"met", 8, b"\x63")
    patched(b"ver", 4, b"\xff\xff")
    patched(b"utf", 6, b"\x00\x08")
    patched(b"utf", 30, b"\xff\xfe\xfd")
    patched(b"crc", 14, b"\x00\x00")
    with SalvagedArchive(io.BytesIO(bytes(data))) as archive:
        encrypted, method, version, name, checksum, whole = archive.infolist()
        with pytest.raises(RuntimeError, match="encrypted"):
            archive.open(encrypted)
        with pytest.raises(NotImplementedError):
            archive.open(method)
        assert archive.open(version).read() == b"ver" * 40
        with pytest.raises(UnicodeDecodeError):
            archive.open(name)
        with pytest.raises(zipfile.BadZipFile, match="CRC"):
            archive.open(checksum).read()
        assert archive.open(whole).read() == b"ok!" * 40


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
@pytest.mark.parametrize("streamed", [False, True])
def test_an_archive_in_an_archive_is_one_member(method: int, streamed: bool) -> None:
    inner = zip_bytes(TEXTS, method, streamed)
    data = zip_bytes({"inner.zip": inner, "after.json": b"{}"}, zipfile.ZIP_STORED, streamed)
    with SalvagedArchive(io.BytesIO(data[: directory_offset(data)])) as archive:
        assert read_all(archive) == {"inner.zip": inner, "after.json": b"{}"}
    with SalvagedArchive(io.BytesIO(data[: len(inner) // 2])) as archive:
        assert archive.infolist() == []
        assert [info.filename for info in archive.lost] == ["inner.zip"]


def test_junk_and_damage_before_the_cut_cost_no_other_member() -> None:
    chance = random.Random(7)
    entries = {f"{name}.json": chance.randbytes(4000) for name in "abc"}
    data = bytearray(zip_bytes(entries, streamed=True))
    starts = [info.header_offset for info in zipfile.ZipFile(io.BytesIO(bytes(data))).infolist()]
    data[starts[1] + 40 : starts[1] + 900] = b"\xff" * 860
    cut = bytes(data[: directory_offset(bytes(data))])
    with SalvagedArchive(io.BytesIO(cut[: starts[2]] + bytes(5000) + cut[starts[2] :])) as archive:
        assert read_all(archive) == {name: entries[name] for name in ("a.json", "c.json")}
        assert [info.filename for info in archive.lost] == ["b.json"]


class Sparse(io.RawIOBase):
    """A seekable file of pieces at far places, zeros between them, that counts what is read."""

    def __init__(self, pieces: dict[int, bytes], size_bytes: int) -> None:
        super().__init__()
        self._pieces, self._size, self._at = pieces, size_bytes, 0
        self.num_bytes_read = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer) -> int:  # type: ignore[no-untyped-def]
        num_bytes = max(0, min(len(buffer), self._size - self._at))
        buffer[:num_bytes] = bytes(num_bytes)
        for start, piece in self._pieces.items():
            for index in range(max(start, self._at), min(start + len(piece), self._at + num_bytes)):
                buffer[index - self._at] = piece[index - start]
        self._at += num_bytes
        self.num_bytes_read += num_bytes
        return num_bytes


def test_members_of_many_gigabytes_are_passed_by_a_seek() -> None:
    big = 9 << 30
    zip64 = struct.pack("<2H2Q", 1, 16, big, big)
    first = struct.pack("<4s5H3L2H", b"PK\3\4", 45, 0, 0, 0, 0, 0, 0xFFFFFFFF, 0xFFFFFFFF, 1, len(zip64)) + b"a" + zip64
    small = zip_bytes({"b": b"text"}, zipfile.ZIP_STORED)
    file = Sparse({0: first, len(first) + big: small[: directory_offset(small)] + b"PK\3\4"}, len(first) + big + 39)
    with SalvagedArchive(io.BufferedReader(file)) as archive:
        assert [(info.filename, info.file_size) for info in archive.infolist()] == [("a", big), ("b", 4)]
        assert archive.read("b") == b"text"
        assert len(archive.lost) == 1
    assert file.num_bytes_read < 1 << 20


def test_hostile_headers_are_survived() -> None:
    chance = random.Random(3)
    whole = zip_bytes(TEXTS, streamed=True)[:-80]
    for _ in range(300):
        data = bytearray(whole)
        for _ in range(chance.randrange(1, 6)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        archive = SalvagedArchive(io.BytesIO(bytes(data)))
        assert len(archive.infolist()) + len(archive.lost) <= len(TEXTS) + 1
    for short in (b"", b"PK", b"PK\3\4", b"PK\3\4" * 40, b"PK\5\6" + bytes(18), bytes(100)):
        assert recover_directory(io.BytesIO(short)).members == []


# Bz2


def blocks_of_text(num_blocks: int, seed: int = 0) -> list[bytes]:
    """Texts of one block each at compression level 1."""
    chance = random.Random(seed)
    words = [f"낱말{number} ".encode() for number in range(500)]
    return [b"".join(chance.choices(words, k=9_000))[:99_000] for _ in range(num_blocks)]


def write(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


def salvaged(path: Path) -> tuple[bytes, SalvagedBZ2]:
    with SalvagedBZ2(path) as stream:
        return stream.read(), stream


@pytest.mark.parametrize(
    "pack", [lambda texts: bz2.compress(b"".join(texts), 1), lambda t: b"".join(map(bz2.compress, t))]
)
def test_a_whole_file_reads_as_bz2_reads_it(tmp_path: Path, pack: Callable[[list[bytes]], bytes]) -> None:
    texts = blocks_of_text(5)
    for tail in (b"", bytes(5000), b"junk", b"B"):
        path = write(tmp_path / "a.bz2", pack(texts) + tail)
        text, stream = salvaged(path)
        assert text == b"".join(texts)
        assert stream.num_damaged == 0
        assert stream.fault is None or tail == b"B"
    with SalvagedBZ2(path) as stream:
        assert b"".join(stream) == b"".join(texts)
        assert not stream.seekable()
    assert salvaged(write(tmp_path / "empty.bz2", bz2.compress(b"") * 3))[0] == b""


def test_every_block_before_the_cut_is_had(tmp_path: Path) -> None:
    texts = blocks_of_text(6)
    text = b"".join(texts)
    data = bz2.compress(text, 1)
    for cut in (len(data) - 1, len(data) - 12, len(data) * 2 // 3, len(data) // 8, 2):
        found, stream = salvaged(write(tmp_path / "a.bz2", data[:cut]))
        decompressor = bz2.BZ2Decompressor()
        possible = decompressor.decompress(data[:cut])
        while piece := decompressor.decompress(b""):
            possible += piece
        assert found == possible
        assert stream.cut
        assert stream.fault == "it is cut short"
    assert len(possible) == 0


def test_many_streams_cut_in_the_last(tmp_path: Path) -> None:
    texts = blocks_of_text(4)
    streams = [bz2.compress(text) for text in texts]
    found, stream = salvaged(write(tmp_path / "a.bz2", b"".join(streams)[: -len(streams[-1]) // 2]))
    assert found == b"".join(texts[:-1])
    assert stream.cut


@pytest.mark.parametrize("single", [True, False])
def test_damage_costs_its_block_alone(tmp_path: Path, single: bool) -> None:
    texts = blocks_of_text(12)
    joined = b"".join(texts)
    data = bz2.compress(joined, 1) if single else b"".join(map(bz2.compress, texts))
    chance = random.Random(5)
    for _ in range(6):
        damaged = bytearray(data)
        at = chance.randrange(20, len(data) - 20)
        damaged[at] ^= 0x10
        found, stream = salvaged(write(tmp_path / "a.bz2", bytes(damaged)))
        assert stream.num_damaged >= 1
        assert not stream.cut
        # What is left is the text with one stretch of at most two blocks (the damage may hit a mark) missing.
        lost = len(joined) - len(found)
        same = next((i for i, (a, b) in enumerate(zip(found, joined, strict=False)) if a != b), len(found))
        assert lost <= 200_000
        assert found[same:] == joined[same + lost :]


def test_a_hole_and_a_cut_are_both_told(tmp_path: Path) -> None:
    texts = blocks_of_text(30)
    streams = [bz2.compress(text) for text in texts]
    start, end = sum(map(len, streams[:4])) + 500, sum(map(len, streams[:20])) + 500
    data = bytearray(b"".join(streams))
    data[start:end] = bytes(end - start)
    found, stream = salvaged(write(tmp_path / "a.bz2", bytes(data[:-500])))
    assert found == b"".join(texts[:4] + texts[21:29])
    assert stream.cut
    assert stream.num_damaged >= 1
    assert stream.fault is not None
    assert "damage" in stream.fault and "cut short" in stream.fault


def test_junk_between_streams_and_before_them(tmp_path: Path) -> None:
    texts = blocks_of_text(4)
    streams = [bz2.compress(text) for text in texts]
    data = b"junk".join(streams)
    assert salvaged(write(tmp_path / "a.bz2", data))[0] == b"".join(texts)
    found, stream = salvaged(write(tmp_path / "a.bz2", b"junk" + data))
    assert found == b"".join(texts)
    assert stream.num_damaged == 1
    found, stream = salvaged(write(tmp_path / "a.bz2", bytes(4000)))
    assert found == b""
    assert stream.num_damaged == 1


def test_damage_without_anything_behind_it_is_told(tmp_path: Path) -> None:
    texts = blocks_of_text(2)
    first, second = (bz2.compress(text) for text in texts)
    found, stream = salvaged(write(tmp_path / "a.bz2", first + second.replace(second[4:10], bytes(6))))
    assert found == texts[0]
    assert stream.num_damaged == 1
    wrong_sum = bytearray(second)
    wrong_sum[-3] ^= 0xFF
    found, stream = salvaged(write(tmp_path / "a.bz2", first + wrong_sum))
    assert found == b"".join(texts)
    assert stream.num_damaged == 1


def test_a_bomb_is_read_in_bounded_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "a.bz2", bz2.compress(bytes(200_000_000)) + bz2.compress(b"end"))
    tracemalloc.start()
    with SalvagedBZ2(path) as stream:
        num_bytes = 0
        while chunk := stream.read(1 << 20):
            num_bytes += len(chunk)
            last = chunk
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert num_bytes == 200_000_003
    assert last.endswith(b"\0end")
    assert peak_bytes < 120_000_000
