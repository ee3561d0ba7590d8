"""Texts of the web: news and petitions in the first part, reviews and forum posts in the second."""
# ruff: noqa: E501 -- ruff counts a Hangul syllable as two columns

from __future__ import annotations

from daramgpt.quickstart import lexicon
from daramgpt.quickstart.grammar import FORMAL, PLAIN, POLITE, Scene, Text
from daramgpt.quickstart.morphology import final_of, particle
from daramgpt.quickstart.topics import TOPICS
from daramgpt.quickstart.world import Chance, Person, World, topic_of

_YEARS = (2016, 2021)
_NEWS_OPENINGS = (
    "{town}에서 {month}월 {day}일 {event:이} 열리다",
    "{org:이} {month}월 {day}일 {town} {place}에서 {event:을} 열다",
    "{town:이} 올해 처음으로 {event:을} 마련하다",
    "{town} 주민들이 {month}월 {day}일 {place}에서 {event:을} 치르다",
    "{org:은} {town:과} 손을 잡고 {event:을} 준비하다",
    "{thing:을} 주제로 한 {event:이} {month}월 {day}일 {town}에서 막을 올리다",
    "{org:이} 오는 {month}월 {day}일 {town}에서 {event:을} 연다고 알리다",
)
_NEWS_FIGURES = (
    ("이번 {event}에는 모두 {n}명이 참가하다", "이는 지난해보다 {d}명 {trend} 수치=이다"),
    ("{event:을} 찾은 사람은 {n}명에 달하다", "한 해 전에는 {before}명에 머무르다"),
    ("주최 측은 {n}명이 다녀간 것으로 보다", "지난해의 {before}명보다 {d}명이 {trend} 셈=이다"),
    ("참가자 {n}명 가운데 절반인 {half}명은 다른 고장에서 오다", "나머지 {half}명은 {town} 주민=이다"),
    ("예산은 {money}만 원=이다", "이 가운데 {part}만 원을 {org:이} 내다"),
)
_NEWS_PEOPLE = (
    "{p} 씨는 {home}에서 태어나 {debut}년부터 {job:으로} 일하다",
    "올해 {age}세인 {p} 씨는 {home} 출신=이다",
    "{p} 씨는 {debut}년에 처음 {job:이} 되다",
    "{org}에서 일하는 {p} 씨는 {favourite:을} 가장 아끼는 사람=이다",
    "{region}에 있는 {home:은} {p} 씨의 고향=이다",
)
_NEWS_CLOSINGS = (
    "다음 {event:은} {nextmonth}월에 열리다",
    "{org:은} 해마다 {event:을} 이어 가다",
    "{org:은} {speciality:을} 나누어 주는 자리도 마련하다",
    "자세한 일정은 {org} 누리집에서 확인하다",
)
_MOOD = ("회장 곳곳에서 웃음이 끊이지 않다", "행사는 늦은 밤까지 이어지다", "참가자들은 {speciality:을} 선물로 받다",
         "어린이들도 {tool:을} 손에 들다", "주민들은 자리를 뜨지 않고 박수를 보내다", "{role:이} 직접 나와 손님을 맞다")  # fmt: skip
_REVIEW_OPENINGS = (
    "지난 {weekday}에 {town}에 있는 {place}에 다녀오다",
    "{family:이} 추천해서 {thing:을} 알아보다",
    "{thing} 이야기를 하도 많이 들어서 직접 확인하다",
    "{town}까지 가서 {event:을} 구경하다",
    "{month}개월 동안 {thing:을} 지켜본 뒤에 후기를 쓰다",
    "{p} 씨가 나온 방송을 보고 {thing}에 관심이 생기다",
    "친구 {k}명과 함께 {town} {place:을} 찾다",
)
_REVIEW_FACTS = (
    "값은 {money}원=이다", "{town} {place}까지 차로 {minutes}분쯤 걸리다", "{weekday}에는 쉬는 날=이다",
    "{role:이} 처음부터 끝까지 챙겨 주다", "기다리는 사람이 {k}명쯤 있다", "{family:도} 같이 가서 좋아하다",
)  # fmt: skip
_REVIEW_CLOSINGS_GOOD = ("다음에 또 가고 싶다", "별점 다섯 개를 주고 싶다", "{family:과} 꼭 다시 오고 싶다", "주변에 자신 있게 권하고 싶다",
                         "{money}원이 전혀 아깝지 않다", "{p} 씨의 팬이 되다")  # fmt: skip
_REVIEW_CLOSINGS_BAD = ("다시는 가고 싶지 않다", "별점은 두 개만 주고 싶다", "{money}원이 무척 아깝다", "좀 더 나아지면 다시 생각해 보고 싶다",
                        "{family}에게는 권하지 않을 것 같다", "솔직히 기대가 너무 크다")  # fmt: skip
_ANSWERS = ("처음에는 {tool}부터 준비하다", "{town} {place:을} 먼저 찾아가다", "{role}에게 꼭 묻다", "무리하지 말고 하루에 {minutes}분만 하다",
            "비싼 {tool}보다 싼 것을 고르다", "{event}에 한번 가다")  # fmt: skip
_REVIEWED = ("영화", "책", "요리", "여행", "시장", "기술", "음악", "미술", "운동", "동물")
_COMPLAINED_OF = ("교통", "건강", "시장", "책", "운동", "학교", "여행", "영화", "동물", "미술", "음악", "농사")
_WEEKDAYS = ("월요일", "화요일", "수요일", "목요일", "금요일", "토요일", "일요일")


def called(person: Person) -> str:
    """The given name as friends say it: 이 after a consonant (준영이), bare after a vowel (민호)."""
    name = person.given_name
    return name if final_of(name) == " " else name + "이"


def bind_person(scene: Scene, person: Person, year: int) -> None:
    """Make a person's facts available to the templates as p, job, age, home, region, speciality, debut, org …"""
    scene.bound.update(
        p=person.name,
        job=person.job,
        age=str(year - person.birth_year),
        born=str(person.birth_year),
        home=person.town.name,
        region=person.town.region,
        speciality=person.town.speciality,
        debut=str(person.debut_year),
        favourite=person.thing,
        hobby=person.hobby,
        org=person.organisation.name,
        work=f"『{person.work}』",
    )
    epithets = (
        f"{person.town.name} 출신인", f"{person.birth_year}년생인", f"{particle(person.job, '으로')} 일하는",
        f"{particle(person.hobby, '을')} 좋아하는",
        f"{particle(person.thing, '을')} 아끼는",
        f"『{person.work}』{particle(person.work, '으로')[len(person.work):]} 이름난", f"{person.topic.name}에 밝은",
        f"{person.town.speciality}의 고장에서 온",
    )  # fmt: skip
    for name in (person.name, f"{person.name} 씨", called(person)):
        scene.epithets[name] = epithets


def _bind_numbers(scene: Scene, chance: Chance) -> None:
    before, change = chance.between(4, 60) * 10, chance.between(1, 12) * 10
    now = before + change if chance.flip(0.7) or change >= before else before - change
    money = chance.between(2, 40) * 100
    month = chance.between(1, 12)
    scene.bound.update(
        n=str(now), before=str(before), half=str(now // 2), d=str(abs(now - before)),
        trend="늘어난" if now > before else "줄어든", money=str(money), part=str(money // 2), month=str(month),
        nextmonth=str(month % 12 + 1), day=str(chance.between(1, 28)), minutes=str(chance.between(2, 12) * 5),
        k=str(chance.between(2, 9)), weekday=chance.pick(_WEEKDAYS), family=chance.skewed(lexicon.FAMILY),
    )  # fmt: skip


def news(world: World, chance: Chance) -> Text:
    """A report of an event in the plain written style, with figures that agree and a person who is quoted."""
    person = chance.skewed(world.people, 1.5)
    scene = Scene(chance, person.topic, PLAIN)
    bind_person(scene, person, chance.between(*_YEARS))
    _bind_numbers(scene, chance)
    town = person.organisation.town
    event = scene.noun("event")
    scene.bound.update(town=town.name, event=event)
    first = [scene.past(chance.pick(_NEWS_OPENINGS))]
    for clause in chance.pick(_NEWS_FIGURES):
        first.append(scene.tell(clause))
    first.append(scene.past(chance.pick(_MOOD)))
    _, events = scene.cause()
    second = [_statement(scene, chance), *events, scene.tell(chance.pick(_NEWS_PEOPLE))]
    if chance.flip(0.6):
        second.append(_statement(scene, chance))
    third = [scene.state(past=True)] if chance.flip(0.5) else []
    if chance.flip(0.6):
        scene.subject = f"{person.name} 씨"
        third += scene.acts(chance.between(1, 3), reflective=False)
    plan = scene.say(chance.pick(scene.topic.wishes), "을")
    third.append(particle(person.organisation.name, "은") + f" 앞으로 {plan} " + scene.present("계획=이다"))
    third.append(scene.present(chance.pick(_NEWS_CLOSINGS)))
    heading = chance.pick(
        ("{town}, {event} 열어", "{event} {n}명 참가", '{p} 씨 "{thing:은} 나의 힘"', "{org}, {town}에서 {event}")
    )
    return Text(scene.fill(heading), (tuple(first), tuple(second), tuple(third)))


def _statement(scene: Scene, chance: Chance) -> str:
    """A sentence that reports what the person said, directly or indirectly."""
    speaker = f"{scene.bound['p']} 씨" if chance.flip(0.7) else f"{scene.bound['job']} {scene.bound['p']} 씨"
    verb = chance.pick(("말하다", "밝히다", "설명하다", "덧붙이다", "강조하다", "전하다"))
    topic = scene.topic
    style = chance.between(0, 3)
    if style == 0:
        state = chance.pick(topic.states).lstrip("-")
        return f"{particle(speaker, '은')} {scene.say(state, '는다고')} {scene.past(verb)}"
    if style == 1:
        cause = chance.skewed(topic.causes, 1.4)
        reported = f"{scene.say(cause.clause, '아서')} {scene.say(cause.effects[0], '았다고')}"
        return f"{particle(speaker, '은')} {reported} {scene.past(verb)}"
    if style == 2:
        wish = scene.say(chance.pick(topic.wishes), "아야 하다:습니다")
        return f'{particle(speaker, "은")} "{wish}"라고 {scene.past(verb)}'
    state = scene.say(chance.pick(topic.states).lstrip("-"), "습니다")
    wish = scene.say(chance.pick(topic.wishes), "으면 좋다:겠습니다")
    return f'{particle(speaker, "은")} "{state}. {wish}"라고 {scene.past(verb)}'


def petition(world: World, chance: Chance) -> Text:
    """A complaint in the formal spoken style: who writes, what went wrong, what is asked for."""
    person = chance.skewed(world.people, 1.5)
    topic = topic_of(chance.skewed(_COMPLAINED_OF, 1.5))
    scene = Scene(chance, topic, FORMAL)
    bind_person(scene, person, chance.between(*_YEARS))
    _bind_numbers(scene, chance)
    scene.bound.update(town=person.town.name, place=scene.noun("place"))
    greeting = chance.pick(("안녕하십니까.", "안녕하세요.", "수고가 많으십니다.", "늘 애써 주셔서 고맙습니다."))
    opening = [
        greeting,
        scene.tell(
            chance.pick(
                (
                    "저는 {town}에 사는 {age}세 {job}=이다",
                    "{town}에서 {job:으로} 일하는 {p}=이다",
                    "저는 {region} {town}에 살고 있다",
                    "{family:과} 함께 {town}에 사는 주민=이다",
                )
            )
        ),
        scene.past(
            chance.pick(
                (
                    "{month}월 {day}일에 {town} {place:을} 찾다",
                    "지난 {weekday}에 {place}에서 겪은 일을 적어 보다",
                    "벌써 {k}년째 {place:을} 이용해 오다",
                    "{place} 문제로 이 글을 쓰게 되다",
                )
            )
        ),
    ]
    middle = scene.acts(chance.between(1, 3), reflective=False)
    _, trouble = scene.cause(False)
    middle += [*trouble, scene.feeling(False)]
    if chance.flip(0.6):
        middle.append(scene.past(chance.pick(("같은 일을 겪은 사람이 {k}명이나 되다", "{role}에게 {k}번이나 이야기하다",
                                              "전화를 걸 때마다 {minutes}분 넘게 기다려야 하다", "{family:도} 같은 말을 하다"))))  # fmt: skip
    wishes = [
        scene.say(wish, "아 주시다:기") + " 바랍니다."
        for wish in (chance.pick(topic.wishes), chance.pick(topic.wishes))
    ]
    closing = list(dict.fromkeys(wishes))[: chance.between(1, 2)]
    closing.append(
        chance.pick(
            (
                "긴 글을 읽어 주셔서 고맙습니다.",
                "빠른 답변을 기다리겠습니다.",
                "꼭 도와주시기를 부탁드립니다.",
                "고맙습니다.",
            )
        )
    )
    return Text(scene.fill(chance.pick(("{town} {place:을} 고쳐 주세요", "{place} 이용 불편", "{thing} 관련 민원", ""))),
                (tuple(opening), tuple(middle), tuple(closing)))  # fmt: skip


def review(world: World, chance: Chance) -> Text:
    """A review in the polite informal style; praise and blame agree with what happened."""
    person = chance.skewed(world.people, 1.5)
    topic = person.topic if person.topic.name in _REVIEWED else topic_of(chance.skewed(_REVIEWED, 1.5))
    scene = Scene(chance, topic, POLITE)
    bind_person(scene, person, chance.between(*_YEARS))
    _bind_numbers(scene, chance)
    scene.bound.update(town=person.organisation.town.name, money=str(chance.between(4, 60) * 500))
    sentences = [scene.past(chance.pick(_REVIEW_OPENINGS))]
    sentences += [scene.state() for _ in range(chance.between(1, 2))]
    if chance.flip(0.5):
        sentences.append(scene.tell(chance.pick(_REVIEW_FACTS)))
    sentences += scene.acts(chance.between(0, 2))
    good, events = scene.cause()
    sentences += events
    if chance.flip(0.6):
        sentences.append(scene.feeling(good))
    sentences.append(scene.tell(chance.pick(_REVIEW_CLOSINGS_GOOD if good else _REVIEW_CLOSINGS_BAD)))
    title = scene.fill(chance.pick(("{thing} 후기", "{town} {place}", "{event} 다녀온 이야기", "", "")))
    return Text(title, (tuple(sentences),))


def forum_post(world: World, chance: Chance) -> Text:
    """A question with answers."""
    person = chance.skewed(world.people, 1.5)
    topic = topic_of(person.hobby) if chance.flip(0.5) else chance.pick(TOPICS)
    scene = Scene(chance, topic, POLITE)
    bind_person(scene, person, chance.between(*_YEARS))
    _bind_numbers(scene, chance)
    scene.bound["town"] = person.town.name
    thing = scene.noun("thing")
    act = chance.pick(topic.acts)
    question = [
        chance.pick(("안녕하세요.", "질문이 있어요.", "처음 글을 써요.", "고민이 생겼어요.")),
        scene.tell(
            chance.pick(
                (
                    "저는 {town}에 사는 {age}살 {job}=이다",
                    "{town}에 이사 온 지 {k}년이 되다",
                    "{k}개월 전에 {hobby}에 빠지다",
                )
            )
        ),
        scene.cause(False)[1][0],
        scene.say(
            act, chance.pick(("을 때 무엇이 필요하다:을까요", "으려면 어떻게 하다:아야 할까요", "는 것이 좋다:을까요"))
        )
        + "?",
    ]
    answers = []
    for _ in range(chance.between(1, 3)):
        answer = [
            scene.say(chance.pick(_ANSWERS), chance.pick(("아 보다:세요", "는 것이 좋다:아요", "으면 되다:아요"))) + "."
        ]
        _, events = scene.cause(True)
        answer += ["저도 그랬는데 " + events[0], *events[1:]] if chance.flip(0.5) else events
        if chance.flip(0.5):
            answer.append(scene.state())
        answers.append(tuple(answer))
    return Text(f"{thing} 질문이요" if chance.flip(0.6) else "", (tuple(question), *answers))
