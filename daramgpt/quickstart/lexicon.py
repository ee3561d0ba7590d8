"""What the grammar talks about: topics with their nouns and clauses, names, and how each predicate inflects.

A clause is Korean with its last predicate in the dictionary form and with slots in braces: ``{thing:을} 잘게 썰다``.
A slot names a set of nouns of the topic at hand, after the colon stands the particle in the form it has after a
consonant. The verb is chosen with the noun in mind, so selection (밥을 먹다, 노래를 부르다) is in the data, not in code.
``=이다`` marks the copula.
"""
# ruff: noqa: E501 -- ruff counts a Hangul syllable as two columns

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from daramgpt.quickstart.morphology import conjugate, copula


@dataclass(frozen=True, slots=True)
class Cause:
    """Something that happens, and what may follow from it.

    Attributes:
        good: whether it ends well; feelings and judgements that come after agree with it.
        clause: the cause.
        effects: possible effects, the likeliest first.
    """

    good: bool
    clause: str
    effects: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Topic:
    """One field of life: its nouns by slot, its acts in their usual order, its causes, its qualities."""

    name: str
    kind: str
    nouns: dict[str, tuple[str, ...]]
    definitions: tuple[str, ...]
    acts: tuple[str, ...]
    causes: tuple[Cause, ...]
    states: tuple[str, ...]
    wishes: tuple[str, ...]


def _lines(text: str) -> tuple[str, ...]:
    return tuple(part.strip() for part in text.split("/") if part.strip())


def topic(
    name: str,
    kind: str,
    *,
    thing: str,
    place: str,
    tool: str,
    role: str,
    event: str,
    definitions: str,
    acts: str,
    causes: str,
    states: str,
    wishes: str,
) -> Topic:
    """Build a topic from slash-separated lists; a cause reads ``+ clause > effect | effect``, one a line."""
    parsed = []
    for line in filter(None, (line.strip() for line in causes.splitlines())):
        clause, effects = line[1:].split(">")
        parsed.append(Cause(line[0] == "+", clause.strip(), tuple(e.strip() for e in effects.split("|"))))
    lists = {"thing": thing, "place": place, "tool": tool, "role": role, "event": event}
    nouns = {slot: _lines(text) for slot, text in lists.items()}
    return Topic(name, kind, nouns, _lines(definitions), _lines(acts), tuple(parsed), _lines(states), _lines(wishes))


# Predicates that describe; all others act. 있다 and 없다 are seen from the stem.
ADJECTIVES = frozenset(
    [
        "크다",
        "작다",
        "좋다",
        "나쁘다",
        "많다",
        "적다",
        "높다",
        "낮다",
        "깊다",
        "얕다",
        "길다",
        "짧다",
        "넓다",
        "좁다",
        "무겁다",
        "가볍다",
        "두껍다",
        "얇다",
        "굵다",
        "가늘다",
        "맵다",
        "짜다",
        "싱겁다",
        "달다",
        "쓰디쓰다",
        "시다",
        "고소하다",
        "담백하다",
        "부드럽다",
        "딱딱하다",
        "뜨겁다",
        "차갑다",
        "덥다",
        "춥다",
        "따뜻하다",
        "시원하다",
        "서늘하다",
        "포근하다",
        "맑다",
        "흐리다",
        "밝다",
        "어둡다",
        "빠르다",
        "느리다",
        "세다",
        "약하다",
        "강하다",
        "단단하다",
        "튼튼하다",
        "건강하다",
        "아프다",
        "피곤하다",
        "바쁘다",
        "한가하다",
        "배고프다",
        "기쁘다",
        "슬프다",
        "즐겁다",
        "괴롭다",
        "외롭다",
        "무섭다",
        "두렵다",
        "반갑다",
        "고맙다",
        "그립다",
        "부럽다",
        "아쉽다",
        "안타깝다",
        "뿌듯하다",
        "속상하다",
        "답답하다",
        "편하다",
        "편안하다",
        "불편하다",
        "든든하다",
        "허전하다",
        "행복하다",
        "미안하다",
        "궁금하다",
        "놀랍다",
        "어렵다",
        "쉽다",
        "복잡하다",
        "간단하다",
        "단순하다",
        "새롭다",
        "낡다",
        "젊다",
        "오래다",
        "싸다",
        "비싸다",
        "저렴하다",
        "귀하다",
        "흔하다",
        "드물다",
        "다르다",
        "같다",
        "비슷하다",
        "곱다",
        "예쁘다",
        "아름답다",
        "멋지다",
        "화려하다",
        "소박하다",
        "귀엽다",
        "착하다",
        "친절하다",
        "다정하다",
        "정직하다",
        "성실하다",
        "부지런하다",
        "게으르다",
        "엄격하다",
        "조용하다",
        "시끄럽다",
        "고요하다",
        "분명하다",
        "뚜렷하다",
        "확실하다",
        "정확하다",
        "중요하다",
        "필요하다",
        "충분하다",
        "부족하다",
        "넉넉하다",
        "가득하다",
        "완벽하다",
        "훌륭하다",
        "뛰어나다",
        "유명하다",
        "특별하다",
        "독특하다",
        "안전하다",
        "위험하다",
        "깨끗하다",
        "더럽다",
        "지저분하다",
        "신선하다",
        "싱싱하다",
        "향긋하다",
        "촉촉하다",
        "바삭하다",
        "쫄깃하다",
        "빨갛다",
        "파랗다",
        "노랗다",
        "하얗다",
        "까맣다",
        "활발하다",
        "심하다",
        "가깝다",
        "멀다",
        "무사하다",
        "어색하다",
        "서투르다",
        "서툴다",
        "능숙하다",
        "자연스럽다",
        "만족스럽다",
        "자랑스럽다",
        "사랑스럽다",
        "실망스럽다",
        "지루하다",
        "흥미롭다",
        "재미있다",
        "재미없다",
        "생생하다",
        "섬세하다",
        "따분하다",
        "간결하다",
        "뻔하다",
        "막막하다",
        "선선하다",
        "아깝다",
        "익숙하다",
        "푸짐하다",
        "차분하다",
        "순하다",
        "사납다",
        "날렵하다",
        "후련하다",
        "미끄럽다",
        "가파르다",
        "한산하다",
        "빽빽하다",
        "선명하다",
        "또렷하다",
        "은은하다",
        "알맞다",
        "싶다",
        "심심하다",
    ]
)

_IRREGULAR = {
    "ㅂ": """맵다 싱겁다 부드럽다 무겁다 가볍다 두껍다 뜨겁다 차갑다 덥다 춥다 어둡다 즐겁다 괴롭다 외롭다 무섭다 두렵다 반갑다
    고맙다 그립다 부럽다 아쉽다 안타깝다 놀랍다 어렵다 쉽다 새롭다 곱다 아름답다 귀엽다 시끄럽다 더럽다 가깝다 자연스럽다
    만족스럽다 자랑스럽다 사랑스럽다 실망스럽다 흥미롭다 사납다 미끄럽다 돕다 굽다 눕다 줍다 깁다 아깝다""",
    "ㄷ": "듣다 귀담아듣다 걷다 묻다 깨닫다 싣다 긷다",
    "ㅅ": "짓다 붓다 낫다 잇다 긋다 젓다",
    "ㅎ": "빨갛다 파랗다 노랗다 하얗다 까맣다 그렇다 이렇다",
    "르": """부르다 고르다 모르다 흐르다 오르다 자르다 기르다 나르다 바르다 누르다 다르다 빠르다 서두르다 서투르다 이르다
    머무르다 게으르다 가파르다 찌르다 마르다 타오르다 떠오르다 무르다 벼르다 저지르다""",
}
IRREGULAR = {lemma: kind for kind, lemmas in _IRREGULAR.items() for lemma in lemmas.split()}


@lru_cache(maxsize=200_000)
def inflect(lemma: str, ending: str) -> str:
    """A dictionary form in the given ending; ``noun=이다`` is the copula. Endings: :mod:`.morphology`."""
    if lemma.endswith("=이다"):
        return copula(lemma[:-3], ending)
    descriptive = lemma in ADJECTIVES
    return conjugate(lemma[:-1], ending, IRREGULAR.get(lemma, ""), descriptive)


SURNAMES = tuple("김이박최정강조윤장임한오서신권황안송류홍전고문양손배백허남심노하곽성차주우구민")
GIVEN_FIRST = tuple("민지서하도준은수현예유태승재연진성영주채가소시윤해다건동규원")
GIVEN_LAST = tuple("준우서윤민현진호영수연아은희경빈훈석철미나리라담솔찬규혁")
TOWN_STEMS = tuple(
    [
        "한별",
        "솔내",
        "달뫼",
        "새봄",
        "은샘",
        "가람",
        "너른들",
        "버들",
        "소금",
        "물빛",
        "바람재",
        "갈대",
        "대숲",
        "늘푸른",
        "해오름",
        "꽃재",
        "참나무",
        "두물",
        "검바위",
        "여울",
        "모래내",
        "안개골",
        "하늘못",
        "돌담",
        "능금",
        "매화",
        "진달래",
        "밤나무",
        "노을",
        "잔디",
        "범바위",
        "학여울",
        "감나무",
        "우물",
        "느티",
        "온달",
        "파도",
        "억새",
        "서리",
        "눈꽃",
        "오름",
        "샛별",
        "이슬",
        "돌샘",
        "푸른솔",
        "고래",
        "연꽃",
        "무지개",
        "보리",
        "찔레",
    ]
)
TOWN_SUFFIXES = ("군", "읍", "시", "면", "마을", "동")
REGIONS = _lines(
    "남쪽 바닷가/동쪽 바닷가/서쪽 섬/북쪽 산골/큰 강가/넓은 들판 한가운데/호숫가/높은 고개 아래/오래된 항구 옆"
)
SPECIALITIES = _lines(
    "사과/배/포도/복숭아/감귤/딸기/수박/참외/인삼/버섯/녹차/쌀/고구마/감자/마늘/양파/미역/굴/멸치/오징어/한우/꿀/밤/대추/곶감"
)
ORGANISATION_STEMS = tuple(
    [
        "한빛",
        "새길",
        "다솜",
        "미르",
        "푸른터",
        "온누리",
        "가온",
        "두레",
        "해솔",
        "나래",
        "샘터",
        "한울",
        "바른",
        "늘봄",
        "아라",
        "마루",
    ]
)
TITLE_FIRST = tuple(
    [
        "푸른",
        "붉은",
        "하얀",
        "오래된",
        "잃어버린",
        "조용한",
        "마지막",
        "첫",
        "작은",
        "먼",
        "깊은",
        "느린",
        "낯선",
        "흐린",
        "따뜻한",
        "비밀의",
        "겨울의",
        "여름의",
        "새벽의",
        "젖은",
        "달콤한",
        "외로운",
    ]
)
TITLE_LAST = tuple(
    [
        "언덕",
        "편지",
        "골목",
        "바다",
        "정원",
        "창문",
        "기차",
        "계단",
        "우산",
        "등대",
        "섬",
        "숲",
        "다리",
        "식탁",
        "시계",
        "노래",
        "거울",
        "우체통",
        "여행",
        "약속",
        "밤",
        "강",
        "마당",
        "서랍",
    ]
)
# Topics that people take up for pleasure.
HOBBIES = _lines("요리/운동/음악/영화/책/여행/동물/미술")
FAMILY = _lines("어머니/아버지/할머니/할아버지/누나/형/동생/이모/삼촌/사촌")
