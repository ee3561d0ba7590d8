"""The embedded corpus: its morphology, its determinism, its four containers."""
# ruff: noqa: E501 -- ruff counts a Hangul syllable as two columns

from __future__ import annotations

import bz2
import hashlib
import json
import re
import xml.etree.ElementTree as ET
import zipfile
from pathlib import Path

import pytest

from daramgpt.errors import UserError
from daramgpt.quickstart import corpus, write_corpus
from daramgpt.quickstart.archive import write_stored_zip
from daramgpt.quickstart.grammar import PLAIN, Scene
from daramgpt.quickstart.lexicon import inflect
from daramgpt.quickstart.morphology import copula, final_of, join, particle, split
from daramgpt.quickstart.topics import TOPICS
from daramgpt.quickstart.world import Chance, World

SIZE_MEGABYTES = 0.3


@pytest.mark.parametrize(
    ("lemma", "past"),
    [
        line.split()
        for line in """가다 갔다/서다 섰다/보다 봤다/배우다 배웠다/먹다 먹었다/앉다 앉았다/마시다 마셨다/보내다 보냈다/켜다 켰다/되다 됐다/쉬다 쉬었다
        돕다 도왔다/곱다 고왔다/굽다 구웠다/맵다 매웠다/아름답다 아름다웠다/듣다 들었다/걷다 걸었다/묻다 물었다/싣다 실었다/받다 받았다/짓다 지었다
        낫다 나았다/붓다 부었다/웃다 웃었다/부르다 불렀다/고르다 골랐다/흐르다 흘렀다/마르다 말랐다/귀담아듣다 귀담아들었다/빠르다 빨랐다/따르다 따랐다/쓰다 썼다/크다 컸다/바쁘다 바빴다
        예쁘다 예뻤다/하다 했다/공부하다 공부했다/파랗다 파랬다/하얗다 하얬다/만들다 만들었다/놀다 놀았다/놓다 놓았다/있다 있었다/얇다 얇았다/주다 줬다""".replace("\n", "/").split("/")
        if line.strip()
    ],
)  # fmt: skip
def test_past_tense(lemma: str, past: str) -> None:
    assert inflect(lemma, "았다") == past


@pytest.mark.parametrize(
    ("lemma", "ending", "form"),
    [
        ("가다", "는다", "간다"), ("먹다", "는다", "먹는다"), ("만들다", "는다", "만든다"), ("크다", "는다", "크다"), ("있다", "는다", "있다"),
        ("가다", "습니다", "갑니다"), ("먹다", "습니다", "먹습니다"), ("만들다", "습니다", "만듭니다"), ("춥다", "습니다", "춥습니다"),
        ("가다", "은", "간"), ("먹다", "은", "먹은"), ("만들다", "은", "만든"), ("돕다", "은", "도운"), ("듣다", "은", "들은"), ("짓다", "은", "지은"),
        ("파랗다", "은", "파란"), ("춥다", "는", "추운"), ("먹다", "는", "먹는"), ("만들다", "는", "만드는"), ("재미있다", "는", "재미있는"),
        ("크다", "는데", "큰데"), ("듣다", "는데", "듣는데"), ("가다", "으면", "가면"), ("먹다", "으면", "먹으면"), ("만들다", "으면", "만들면"),
        ("돕다", "으면", "도우면"), ("듣다", "으면", "들으면"), ("짓다", "으면", "지으면"), ("부르다", "으면", "부르면"), ("파랗다", "으면", "파라면"),
        ("만들다", "을", "만들"), ("먹다", "을", "먹을"), ("걷다", "을", "걸을"), ("만들다", "으니", "만드니"), ("만들다", "으려고", "만들려고"),
        ("돕다", "아서", "도와서"), ("눕다", "아서", "누워서"), ("하다", "아서", "해서"), ("부르다", "아요", "불러요"), ("쓰다", "아요", "써요"),
        ("만들다", "음", "만듦"), ("가다", "음", "감"), ("만들다", "네요", "만드네요"), ("만들다", "고", "만들고"), ("먹다", "았습니다", "먹었습니다"),
        ("가다", "았어요", "갔어요"), ("어렵다", "았지만", "어려웠지만"), ("새롭다", "아요", "새로워요"), ("다르다", "아요", "달라요"), ("못하다", "는다", "못한다"),
    ],
)  # fmt: skip
def test_other_endings(lemma: str, ending: str, form: str) -> None:
    assert inflect(lemma, ending) == form


def test_particles_agree_with_the_final_consonant() -> None:
    assert [particle(w, "은") for w in ("책", "나무", "물")] == ["책은", "나무는", "물은"]
    assert [particle(w, "이") for w in ("책", "나무", "3", "2")] == ["책이", "나무가", "3이", "2가"]
    assert [particle(w, "과") for w in ("책", "나무")] == ["책과", "나무와"]
    assert [particle(w, "으로") for w in ("책", "나무", "물", "1", "6")] == ["책으로", "나무로", "물로", "1로", "6으로"]
    assert particle("『푸른 숲』", "을") == "『푸른 숲』을"
    assert particle("학교", "에서") == "학교에서"
    assert final_of("abc") == " "


def test_copula() -> None:
    assert [copula("책", e) for e in ("는다", "았다", "아요", "습니다", "고", "는")] == [
        "책이다", "책이었다", "책이에요", "책입니다", "책이고", "책인"]  # fmt: skip
    assert [copula("나무", e) for e in ("는다", "았다", "아요", "습니다", "고", "는다고")] == [
        "나무다", "나무였다", "나무예요", "나무입니다", "나무고", "나무라고"]  # fmt: skip


def test_every_syllable_comes_apart_and_together() -> None:
    for code in range(0xAC00, 0xD7A4, 7):
        assert join(*split(chr(code))) == chr(code)


def test_lexicon_is_large_and_its_slots_are_known() -> None:
    nouns = {noun for topic in TOPICS for names in topic.nouns.values() for noun in names}
    clauses = [
        clause
        for topic in TOPICS
        for clause in (
            *(*topic.acts, *topic.states, *topic.wishes, *topic.definitions),
            *(clause for cause in topic.causes for clause in (cause.clause, *cause.effects)),
        )
    ]
    predicates = {clause.split()[-1] for clause in clauses}
    assert len(TOPICS) >= 12
    assert len(nouns) >= 300
    assert len(predicates) >= 120
    assert all(predicate.endswith("다") for predicate in predicates)
    slots = {slot for clause in clauses for slot in re.findall(r"\{(\w+)", clause)}
    assert slots <= {"thing", "place", "tool", "role", "event", "tool2"}
    for topic in TOPICS:
        scene = Scene(Chance("slots"), topic, PLAIN)
        for sentence in [*scene.acts(5), *scene.cause()[1], scene.state(), scene.feeling(True)]:
            assert "{" not in sentence
            assert sentence.endswith("다.")


def test_facts_of_the_world_are_consistent() -> None:
    world = World(3, num_people=60)
    assert len({person.name for person in world.people}) == 60
    for person in world.people:
        assert person.topic is person.organisation.topic
        assert person.job in person.topic.nouns["role"]
        assert 18 <= person.debut_year - person.birth_year <= 30


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, int]]:
    folder = tmp_path_factory.mktemp("quickstart") / "corpus"
    return folder, write_corpus(folder, SIZE_MEGABYTES)


def _digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_sizes_are_as_asked(made: tuple[Path, dict[str, int]]) -> None:
    _, sizes = made
    assert list(sizes) == ["web", "unpublished", "wiki", "written"]
    assert abs(sum(sizes.values()) / 1e6 - SIZE_MEGABYTES) < 0.03


def test_same_arguments_same_bytes_and_seed_matters(made: tuple[Path, dict[str, int]], tmp_path: Path) -> None:
    folder, sizes = made
    assert write_corpus(tmp_path / "again", SIZE_MEGABYTES) == sizes
    assert _digests(tmp_path / "again") == _digests(folder)
    write_corpus(tmp_path / "other", SIZE_MEGABYTES, seed=1)
    assert _digests(tmp_path / "other") != _digests(folder)


def test_a_complete_corpus_is_kept_and_another_size_replaces_it(tmp_path: Path) -> None:
    folder = tmp_path / "corpus"
    sizes = write_corpus(folder, 0.05)
    (folder / "witness").touch()
    assert write_corpus(folder, 0.05) == sizes
    assert (folder / "witness").exists()
    write_corpus(folder, 0.06)
    assert not (folder / "witness").exists()


def test_an_interrupted_writing_leaves_no_corpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    folder = tmp_path / "corpus"
    with monkeypatch.context() as patch:
        patch.setattr(corpus.containers, "write_written", fail)
        with pytest.raises(KeyboardInterrupt):
            write_corpus(folder, 0.05)
    assert not folder.exists()
    write_corpus(folder, 0.05)
    assert [path.name for path in tmp_path.iterdir()] == ["corpus"]


def test_a_folder_of_the_users_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("내 글")
    with pytest.raises(UserError, match="no quickstart corpus"):
        write_corpus(tmp_path, 0.05)
    assert (tmp_path / "mine.txt").exists()


def test_web_holds_the_same_articles_raw_and_labelled(made: tuple[Path, dict[str, int]]) -> None:
    root = made[0] / "web" / "030.웹데이터 기반 한국어 말뭉치 데이터" / "01.데이터" / "1.Training"
    with (
        zipfile.ZipFile(root / "원천데이터/TS1.zip") as raw,
        zipfile.ZipFile(root / "라벨링데이터/TL1.zip") as labelled,
    ):
        assert raw.testzip() is None
        assert raw.namelist() == labelled.namelist()[:-1]
        assert labelled.read(labelled.namelist()[-1]) == b""
        categories = [name.split("/")[0] for name in raw.namelist()]
        assert categories == sorted(categories)
        glued = masked = 0
        for name in raw.namelist():
            assert raw.getinfo(name).flag_bits & 0x800
            articles = json.loads(raw.read(name))["SJML"]["text"]
            cut = json.loads(labelled.read(name))["named_entity"]
            assert len(articles) == len(cut)
            for article, entity in zip(articles, cut, strict=True):
                sentences = [piece["sentence"] for piece in entity["content"]]
                content = article["content"]
                assert content.endswith(" .")
                assert content.removesuffix(" .").replace(" . . ", "") == "".join(sentences)
                glued += content.count(" . . ") + 1 > len(sentences)
                masked += "(이름)" in content
        assert glued
        assert masked


def test_unpublished_has_cp949_names_and_few_malformed_files(made: tuple[Path, dict[str, int]]) -> None:
    with zipfile.ZipFile(made[0] / "unpublished" / "NIKL_NP_v1.2.zip", metadata_encoding="cp949") as archive:
        infos = [info for info in archive.infolist() if info.filename.endswith(".sjml")]
        malformed = 0
        for info in infos:
            assert info.flag_bits & 0x800 == 0
            assert info.filename.startswith("NIKL_NP_v1.2/국립국어원 비출판물 말뭉치(버전 1.2)/WDRW19")
            try:
                tree = ET.fromstring(archive.read(info))
            except ET.ParseError:
                malformed += 1
                continue
            assert tree.findtext("header/fileInfo/category") in ("비출판물 > 일기", "비출판물 > 편지")
            assert tree.find("text/p") is not None
    assert 1 <= malformed <= 2


def test_wiki_is_an_export_with_redirects_and_other_namespaces(made: tuple[Path, dict[str, int]]) -> None:
    data = bz2.decompress((made[0] / "wiki" / "kowiki-latest-pages-articles.xml.bz2").read_bytes())
    pages = ET.fromstring(data).findall("{*}page")
    titles = [page.findtext("{*}title") for page in pages]
    assert len(set(titles)) == len(titles)
    assert {page.findtext("{*}ns") for page in pages} == {"0", "10", "14"}
    redirects = [page for page in pages if page.find("{*}redirect") is not None]
    assert redirects
    assert all((p.findtext("{*}revision/{*}text") or "").startswith("#넘겨주기 [[") for p in redirects)
    text = data.decode()
    for trap in ("{{정보상자", "[[분류:", "&lt;ref name=", "[[파일:", "== 각주 ==", "{|"):
        assert trap in text


def test_written_has_books_of_paragraphs(made: tuple[Path, dict[str, int]]) -> None:
    with zipfile.ZipFile(made[0] / "written" / "NIKL_WRITTEN_v1.2_JSON.zip") as archive:
        names = archive.namelist()
        assert names[0].endswith(".pdf")
        forms = []
        for name in names[1:]:
            assert re.fullmatch(r"W[ABCZ]RW19\d{8}\.json", name)
            book = json.loads(archive.read(name))
            forms += [p["form"] for document in book["document"] for p in document["paragraph"]]
    assert any(not form.strip() for form in forms)
    assert any(form.startswith("01") for form in forms)
    assert not any("{" in form for form in forms)
    bodies = [form for form in forms if len(form) > 150]
    assert len(set(bodies)) > 0.98 * len(bodies)


def test_archive_guesses_nothing(tmp_path: Path) -> None:
    write_stored_zip(tmp_path / "a.zip", [("가/나.txt", "다".encode()), ("empty", b"")], name_encoding="cp949")
    with zipfile.ZipFile(tmp_path / "a.zip", metadata_encoding="cp949") as archive:
        assert archive.namelist() == ["가/나.txt", "empty"]
        assert archive.read("가/나.txt").decode() == "다"
        assert archive.testzip() is None
