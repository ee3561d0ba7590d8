"""The prepare measurement: its figures and keys, the memory of a process tree, and the salted copies of a corpus."""

from __future__ import annotations

import bz2
import json
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from benchmarks import machine, prepare, prepare_sides, process_tree, salted_corpus
from daramgpt import corpora, quickstart
from daramgpt.corpora import Document, ReadReport
from daramgpt.errors import UserError
from daramgpt.tokenizer import train_tokenizer

CORPORA = ("web", "unpublished", "wiki", "written")
NUM_COPIES = 3
# Its name is to be mistaken for the fields that follow it in /proc/PID/stat.
HOLDER = """
import pathlib, sys
pathlib.Path("/proc/self/comm").write_text("x) S 1 1 (")
held = b"x" * 30_000_000
print("held", flush=True)
sys.stdin.read()
"""


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prepare") / "corpora"
    quickstart.write_corpus(folder, text_megabytes=0.3)
    return folder


@pytest.fixture(scope="module")
def tokenizer_dir(corpus: Path) -> Path:
    texts = (" ".join(pieces) for document in read(corpus, "wiki")[0] for pieces in document.paragraphs)
    train_tokenizer(texts, 400, corpus.parent / "tokenizer")
    return corpus.parent / "tokenizer"


def read(folder: Path, name: str) -> tuple[list[Document], ReadReport]:
    report = ReadReport()
    return list(corpora.read(corpora.find(folder, name, name), report)), report


def ended(
    name: str, num_bytes: int, seconds: float, start_up_seconds: float = 0.0, peak: int = 1
) -> prepare_sides.Ended:
    stages = [{"name": name, "text_bytes": num_bytes, "tokens": num_bytes // 5, "seconds": seconds}]
    return prepare_sides.Ended(seconds + start_up_seconds, peak, stages)


def test_all_keys_are_measured(corpus: Path, tokenizer_dir: Path, tmp_path: Path) -> None:
    said: list[str] = []
    result = prepare.measure(corpus, tokenizer_dir, tmp_path, num_copies=NUM_COPIES, say=said.append)
    assert not list(tmp_path.iterdir())
    machine.write_result(result, tmp_path / "result.json")
    written = json.loads((tmp_path / "result.json").read_text())
    for key in (
        "text_megabytes_per_second",
        "tokenizer_megabytes_per_second",
        "ratio_without_wiki",
        "wiki_megabytes_per_second",
        "splitter_megabytes_per_second",
        "peak_memory_bytes",
        "memory_growth",
    ):
        assert written[key] > 0, key
    assert "tokenizers" in written["versions"] and "torch" in written["versions"] and written["hardware"]
    assert [row["name"] for row in written["rows"]] == ["web", "unpublished", "written", "wiki"]
    for row in written["rows"]:
        assert row["text_bytes"] > row["tokens"] > 0
        assert row["megabytes_per_second"] == pytest.approx(row["text_bytes"] / 1e6 / row["seconds"])
        assert row["tokenizer_megabytes_per_second"] > 0
    assert written["small"]["text_bytes"] == sum(row["text_bytes"] for row in written["rows"])
    assert written["large"]["text_bytes"] > NUM_COPIES * written["small"]["text_bytes"]
    table = prepare.format_result(result)
    assert "ratio without wiki" in table and f"{result['memory_growth']:.2f} times" in table


def test_rates_are_end_to_end_and_medians_count() -> None:
    prepared = [[ended("web", 8_000_000, 3.0, 1.0), ended("web", 8_000_000, 7.0), ended("web", 8_000_000, 1.0)]]
    alone = [[ended("web", 8_000_000, seconds, 9.0) for seconds in (2.4, 2.0, 1.0)]]
    splitter = ended("web", 4_000_000, 0.5, 9.0)
    result = prepare.result(prepared, alone, splitter, ended("web", 8_000_000, 9.0, peak=5))
    assert result["text_megabytes_per_second"] == pytest.approx(2.0)
    assert result["tokenizer_megabytes_per_second"] == pytest.approx(4.0)
    # Of pairs, not of the medians of both sides.
    assert result["ratio_without_wiki"] == pytest.approx(0.6)
    assert result["lowest_and_highest_ratio"] == pytest.approx([2 / 7, 1.0])
    assert result["splitter_megabytes_per_second"] == pytest.approx(8.0)
    assert result["peak_memory_bytes"] == 5
    assert result["wiki_megabytes_per_second"] is None and result["memory_growth"] is None
    assert result["rows"][0]["megabytes_per_second"] == pytest.approx(8 / 3)
    assert "wiki end to end not measured" in prepare.format_result(result)


def test_wiki_by_itself_has_no_ratio() -> None:
    prepared, alone = [[ended("wiki", 6_000_000, 3.0)]], [[ended("wiki", 6_000_000, 1.5)]]
    result = prepare.result(prepared, alone, ended("wiki", 1, 1.0), ended("wiki", 6_000_000, 3.0))
    assert result["wiki_megabytes_per_second"] == result["text_megabytes_per_second"] == pytest.approx(2.0)
    assert result["tokenizer_megabytes_per_second"] == pytest.approx(4.0)
    assert result["ratio_without_wiki"] is None


def test_corpora_are_found_by_what_is_there(corpus: Path, tmp_path: Path) -> None:
    assert prepare.find_corpora(corpus) == {name: name for name in CORPORA}
    (tmp_path / "notes.txt").write_text("첫째 문장이다. 둘째 문장이다.")
    assert prepare.find_corpora(tmp_path) == {"text": "text"}
    (tmp_path / "written").symlink_to(corpus / "written")
    assert prepare.find_corpora(tmp_path) == {"written": "written"}
    with pytest.raises(UserError, match="does not exist"):
        prepare.find_corpora(tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="holds none of web"):
        prepare.find_corpora(tmp_path / "empty")


def test_a_fault_of_the_user_comes_back_as_one(corpus: Path, tmp_path: Path) -> None:
    recipe = prepare.make_recipe(corpus, {"unpublished": "unpublished"}, tmp_path)
    with pytest.raises(UserError, match=r"tokenizer\.json is missing"):
        prepare_sides.run_side("prepare", recipe, tmp_path)


def test_the_tokenizer_gets_all_units_in_bounded_batches() -> None:
    texts = ["가" * length for length in range(1, 40)]
    batches = list(prepare_sides._batches(texts, 10, 90))
    assert [text for batch, _ in batches for text in batch] == texts
    assert all(len(batch) <= 10 and size == 3 * len("".join(batch)) for batch, size in batches)
    assert all(size - 3 * len(batch[-1]) < 90 for batch, size in batches)


def test_memory_of_descendants_counts() -> None:
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {HOLDER!r}])"
    with subprocess.Popen([sys.executable, "-c", parent], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin and process.stdout
        with process_tree.PeakOfTree(process.pid) as memory:
            assert process.stdout.readline() == b"held\n"
            assert process_tree.tree_bytes(process.pid) > 30_000_000 > process_tree._proportional_bytes(process.pid)
            looks = 0
            while memory.peak_bytes < 30_000_000 and (looks := looks + 1) < 200:
                time.sleep(process_tree.INTERVAL_SECONDS / 4)
            process.communicate()
        # That it has gone is no reason to fail.
        assert process_tree.tree_bytes(process.pid) == 0
    assert 30_000_000 < memory.peak_bytes < 200_000_000


def test_the_measuring_process_shares_no_torch_with_the_measured_one() -> None:
    line = [sys.executable, "-c", "import sys, benchmarks.prepare; sys.exit('torch' in sys.modules)"]
    assert subprocess.run(line, cwd=prepare_sides.ROOT).returncode == 0


def test_shared_pages_count_once() -> None:
    script = (
        "import mmap, os, sys\n"
        # Mapped, not from malloc, which by the environment's settings may keep what is freed.
        "held = mmap.mmap(-1, 40_000_000, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)\n"
        "for at in range(0, 40_000_000, 4096): held[at] = 1\n"
        "if os.fork(): os.wait()\n"
        "else: print('held', flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", script], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stdout.readline() == b"held\n"
        assert 40_000_000 < process_tree.tree_bytes(process.pid) < 75_000_000
        process.communicate()


def test_a_system_without_shares_of_memory_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(process_tree, "_PROC", tmp_path)
    with pytest.raises(UserError, match="smaps_rollup"):
        process_tree.PeakOfTree(os.getpid())


@pytest.fixture(scope="module")
def salted(corpus: Path) -> Path:
    folder = corpus.parent / "salted"
    salted_corpus.write_salted(corpus, {name: name for name in CORPORA}, NUM_COPIES, folder)
    return folder


@pytest.mark.parametrize("name", CORPORA)
def test_every_copy_is_read_and_none_is_a_repeat(name: str, corpus: Path, salted: Path) -> None:
    originals, original_report = read(corpus, name)
    copies, report = read(salted, name)
    assert len(copies) == NUM_COPIES * len(originals)
    assert len({document.id for document in copies}) == len(copies)
    assert len(report.faults) == NUM_COPIES * len(original_report.faults)
    assert report.cleaned == {rule: NUM_COPIES * times for rule, times in original_report.cleaned.items()}
    texts = [" ".join(" ".join(pieces) for pieces in document.paragraphs) for document in copies]
    for copy in range(NUM_COPIES):
        assert sum(salted_corpus.salt(copy) in text.split() for text in texts) == len(originals)


@pytest.mark.parametrize("name", CORPORA)
def test_copies_stand_in_the_containers_of_the_original(name: str, corpus: Path, salted: Path) -> None:
    def containers(folder: Path) -> set[Path]:
        return {path.relative_to(folder) for path in (folder / name).rglob("*") if path.is_file()}

    assert containers(salted) == containers(corpus)


def test_raw_web_articles_are_salted_where_no_labelled_ones_are(corpus: Path, salted: Path, tmp_path: Path) -> None:
    for folder, target in ((corpus, tmp_path / "original"), (salted, tmp_path / "salted")):
        (raw,) = folder.rglob("TS1.zip")
        (target / "web").mkdir(parents=True)
        (target / "web" / "TS1.zip").symlink_to(raw)
    originals, copies = read(tmp_path / "original", "web")[0], read(tmp_path / "salted", "web")[0]
    assert len(copies) == NUM_COPIES * len(originals)


def test_unpacked_files_and_lines_are_salted_too(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    (tmp_path / "original" / "a.txt").write_text("첫째 문단이다.\n\n둘째 문단이다.\n")
    lines = [{"id": "x", "text": "첫째 줄이다."}, {"text": "둘째 줄이다."}, {"text": " "}]
    content = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "original" / "b.jsonl").write_text(content + "{broken\n")
    salted_corpus.write_salted(tmp_path / "original", {"text": "text", "jsonl": "jsonl"}, 2, tmp_path / "salted")
    documents, _ = read(tmp_path / "salted", "text")
    assert [document.paragraphs[-1] for document in documents] == [("둘째 문단이다. 사본0",), ("둘째 문단이다. 사본1",)]
    documents, report = read(tmp_path / "salted", "jsonl")
    assert len({document.id for document in documents}) == len({document.paragraphs for document in documents}) == 4
    assert len(report.faults) == 2


def test_what_has_no_text_gets_none_and_what_is_broken_stays(tmp_path: Path) -> None:
    (tmp_path / "original").mkdir()
    with zipfile.ZipFile(tmp_path / "original" / "x.zip", "w") as archive:
        for name, body in (("full", "<p>하나</p><p/>"), ("void", "<p> </p>"), ("bare", "<p>둘 & <셋</p>")):
            archive.writestr(f"{name}.sjml", f"<SJML><text>{body}</text></SJML>")
        archive.writestr("zero.sjml", b"")
    page = "<page><ns>0</ns><id>{}</id><text>{}</text></page>"
    pages = (
        page.format(7, "본문이다.\n== 각주 ==\n출처")
        + page.format(8, "{{{{틀}}}}")
        + page.format(9, "#넘겨주기 [[가]]")
    )
    (tmp_path / "original" / "w.xml.bz2").write_bytes(bz2.compress(f"<mediawiki>{pages}</mediawiki>".encode()))
    (tmp_path / "original" / "unpublished").mkdir()
    (tmp_path / "original" / "x.zip").rename(tmp_path / "original" / "unpublished" / "x.zip")
    (tmp_path / "original" / "unpublished" / "cut.zip").write_bytes(b"PK\x03\x04cut short")
    formats = {"unpublished": "unpublished", "wiki": "wiki"}
    salted_corpus.write_salted(tmp_path / "original", formats, 2, tmp_path / "salted")
    documents, report = read(tmp_path / "salted", "unpublished")
    assert [document.id for document in documents] == ["full-0", "full-1", "bare-0", "bare-1"]
    assert documents[1].paragraphs == (("하나 사본1",),)
    assert report.cleaned["empty document dropped"] == 2 and len(report.faults) == 5
    documents, report = read(tmp_path / "salted", "wiki")
    assert [document.id for document in documents] == ["14", "15"]
    assert documents[0].paragraphs == (("사본0",), ("본문이다.",))
    assert report.cleaned == {"empty document dropped": 2, "redirect dropped": 2}


def test_tables_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("file_id,sentence\na,가\n")
    with pytest.raises(UserError, match=r"x\.csv is a table"):
        salted_corpus.write_salted(tmp_path, {"unpublished": "unpublished"}, 2, tmp_path / "salted")
