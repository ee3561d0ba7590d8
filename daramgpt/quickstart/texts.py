"""Diaries and letters, encyclopaedia articles, stories and essays."""
# ruff: noqa: E501 -- ruff counts a Hangul syllable as two columns

from __future__ import annotations

from daramgpt.quickstart import lexicon
from daramgpt.quickstart.grammar import INTIMATE, PLAIN, POLITE, Scene, Text
from daramgpt.quickstart.morphology import copula, particle
from daramgpt.quickstart.topics import TOPICS
from daramgpt.quickstart.web_texts import bind_person, called
from daramgpt.quickstart.world import Chance, Organisation, Person, Town, World, topic_of

_WEATHER = (
    ("날씨가 맑다", "햇살이 따뜻하다", True), ("하루 종일 비가 내리다", "빗소리가 크다", False), ("바람이 세게 불다", "창문이 덜컹거리다", False),
    ("첫눈이 내리다", "온 세상이 하얗다", True), ("안개가 짙게 끼다", "앞이 잘 보이지 않다", False), ("구름 한 점 없이 개다", "하늘이 파랗다", True),
    ("아침부터 무척 덥다", "그늘이 그립다", False), ("바람이 선선하다", "걷기에 좋다", True),
)  # fmt: skip
_MEETINGS = (
    "{friend:이} 우리 집에 놀러 오다", "{friend}에게서 오랜만에 전화가 오다", "{family:과} 함께 저녁을 먹다", "{place}에서 {friend:을} 우연히 만나다",
    "{family:이} {thing} 이야기를 꺼내다", "{friend:과} {thing} 이야기를 하다", "{home}에 계신 {family} 생각이 나다",
    "{friend:이} {tool:을} 빌려주다",
)  # fmt: skip
_REPLIES = (
    "{friend:은} {hobby} 이야기만 나오면 눈이 반짝거리다", "{friend:은} 내 말을 끝까지 들어 주다", "{family:은} 걱정하지 말라고 하다",
    "{friend:은} 다음에는 같이 하자고 하다", "{family:은} 말없이 어깨를 두드려 주다", "{friend:이} 웃으면서 고개를 끄덕이다",
)  # fmt: skip
_RESOLVES = (
    "내일은 더 일찍 일어나다", "다음에는 {tool:을} 꼭 챙기다", "{friend}에게 먼저 연락하다", "이번 주말에는 {place}에 다시 가다", "{thing:을} 끝까지 포기하지 않다",
    "{family}에게 더 잘하다", "날마다 조금씩 연습하다", "작은 일에도 고마워하다",
)  # fmt: skip


def diary(world: World, chance: Chance) -> Text:
    """One day in the first person, plain style: weather, what was done, who was met, how it felt, what is resolved."""
    friend = chance.skewed(world.people, 1.5)
    scene = Scene(chance, topic_of(friend.hobby) if chance.flip(0.5) else chance.skewed(TOPICS, 1.2), PLAIN)
    bind_person(scene, friend, 2010)
    scene.bound.update(friend=called(friend), family=chance.skewed(lexicon.FAMILY))
    sky, detail, bright = chance.pick(_WEATHER)
    opening = [chance.pick(("오늘은 ", "")) + scene.past(sky)]
    if chance.flip(0.5):
        opening.append(scene.past(detail))
    if chance.flip(0.4):
        opening.append(
            chance.pick(("그래서 ", "덕분에 ") if bright else ("그래서 ", "그런데도 "))
            + scene.past("{place}에 가 보기로 하다")
        )
    scene.subject = "나"
    opening += scene.acts(chance.between(2, 4))
    good, events = scene.cause()
    middle = [scene.past(chance.pick(_MEETINGS)), scene.past(chance.pick(_REPLIES)), *events, scene.feeling(good)]
    if chance.flip(0.5):
        middle.append(scene.state(past=True))
    resolve = chance.pick(_RESOLVES)
    closing = (
        scene.say(resolve, chance.pick(("아야겠다", "기로 마음먹다:았다", "으면 좋다:겠다", "을 것=이다:는다"))) + "."
    )
    return Text(chance.pick(("일기", "오늘 하루", scene.fill("{thing}"), scene.fill("{friend:과} 만난 날"))),
                (tuple(opening), (*middle, closing)))  # fmt: skip


def letter(world: World, chance: Chance) -> Text:
    """A letter between friends in the intimate style."""
    friend, sender = chance.skewed(world.people, 1.5), chance.skewed(world.people, 1.5)
    scene = Scene(chance, sender.topic, INTIMATE)
    bind_person(scene, sender, 2010)
    scene.bound.update(family=chance.skewed(lexicon.FAMILY), friend="너")
    name = particle(friend.given_name, "아")
    opening = [
        f"{name}, "
        + chance.pick(("잘 지내?", "그동안 잘 있었어?", "오랜만이야.", "보고 싶다.", "편지가 늦어서 미안해.")),
        scene.tell(
            chance.pick(
                (
                    "나는 요즘 {home}에서 지내고 있다",
                    "나는 {org}에서 {job:으로} 일하고 있다",
                    "지난달에 {home:으로} 이사하다",
                    "{region}에 있는 {home:은} 여전히 조용한 곳=이다",
                    "요즘 나는 {hobby}에 푹 빠져 있다",
                )
            )
        ),
    ]
    middle = scene.acts(chance.between(2, 4))
    good, events = scene.cause()
    middle += [*events, scene.feeling(good), scene.state()]
    town = friend.town
    closing = [
        chance.pick(
            (
                f"네가 사는 {particle(town.name, '은')} 어때? {town.founded % 7 + 2}월에 내려갈게.",
                f"{particle(friend.hobby, '은')} 아직도 좋아하지?",
                f"{town.name} {particle(town.speciality, '이')} 무척 그리워.",
                f"네가 보내 준 {town.speciality} 잘 먹었어.",
                f"{particle(friend.job, '으로')} 일하는 네 모습이 궁금해.",
            )
        ),
        scene.say(
            chance.pick(("꼭 답장을 쓰다", "건강 잘 챙기다", "언제든 놀러 오다", "{family}에게도 안부를 전하다")),
            "아 주다:아" if chance.flip(0.4) else "아",
        )
        + ".",
    ]
    return Text("편지", (tuple(opening), tuple(middle), (*closing, f"{called(sender)}가.")))


_ESSAY_THESES = (
    "{thing:은} 우리 삶과 가까운 {kind}=이다", "좋은 {thing:은} 하루아침에 이루어지지 않다", "사람들이 {thing:을} 찾는 까닭은 여러 가지=이다",
    "{thing:을} 이해하려면 먼저 {tool:을} 알아야 하다", "{role:의} 하루는 {tool}에서 시작되다", "오늘날 {thing:의} 뜻은 예전과 다르다",
)  # fmt: skip
_ESSAY_TURNS = (
    "그러나 모든 일에는 양면이 있다", "여기에서 한 가지를 더 생각해 볼 필요가 있다", "물론 반대하는 의견도 있다", "{p:의} 경우를 보면 이 점이 더욱 분명하다",
    "{home:의} 예는 이를 잘 보여 주다", "이러한 변화는 {debut}년 무렵부터 나타나다",
)  # fmt: skip
_ESSAY_ENDS = (
    "결국 중요한 것은 꾸준한 마음=이다", "작은 {tool} 하나에도 오랜 정성이 담겨 있다", "그래서 우리는 {thing:을} 다시 보아야 하다",
    "{thing:의} 앞날은 우리 손에 달려 있다", "앞으로도 {role:의} 구실은 줄어들지 않을 것=이다",
)  # fmt: skip


def essay(world: World, chance: Chance) -> Text:
    """An expository piece: a claim, causes and consequences, an example with a person, a conclusion."""
    person = chance.skewed(world.people, 1.5)
    topic = person.topic
    scene = Scene(chance, topic, PLAIN)
    bind_person(scene, person, 2015)
    thing = scene.noun("thing")
    scene.bound.update(kind=topic.kind, thing=thing)
    meaning = scene.say(chance.pick(topic.definitions), "는") + " " + topic.kind
    first = [
        scene.present(chance.pick(_ESSAY_THESES)),
        f"{particle(thing, '은')} {copula(meaning, '다')}.",
        *_general(scene, chance),
    ]
    second = [scene.present(chance.pick(_ESSAY_TURNS)), *_general(scene, chance), *_general(scene, chance)]
    third = _life(scene, chance, person)
    scene.subject = person.name
    third += [*scene.acts(chance.between(1, 3)), *scene.cause()[1]]
    last = [
        scene.state(),
        scene.say(chance.pick(topic.wishes), "아야 하다:는다") + ".",
        scene.present(chance.pick(_ESSAY_ENDS)),
    ]
    paragraphs = [tuple(first), tuple(second), tuple(third), tuple(last)]
    return Text(
        scene.fill(chance.pick(("{thing:과} 우리", "{thing:의} 뜻", "{role:과} {tool}", "{thing}에 대하여"))),
        tuple(paragraphs),
    )


def _general(scene: Scene, chance: Chance) -> list[str]:
    """A cause and its effect as a general truth."""
    cause = chance.skewed(scene.topic.causes, 1.4)
    effect = chance.skewed(cause.effects, 1.5)
    style = chance.between(0, 4)
    if style == 0:
        return [scene.say(cause.clause, "으면") + " " + scene.present(effect)]
    if style == 1:
        return [scene.say(cause.clause, "을 때") + " " + scene.present(effect)]
    if style == 2:
        return [scene.say(cause.clause, "는 것은 흔한 일=이다:는다") + ".", "그러면 " + scene.present(effect)]
    if style == 3:
        return [scene.say(cause.clause, "는다고 하다:자") + ".", "그러면 " + scene.say(effect, "기 쉽다:는다") + "."]
    return [scene.say(effect, "는 까닭은") + " " + scene.say(cause.clause, "기 때문=이다:는다") + "."]


def _life(scene: Scene, chance: Chance, person: Person) -> list[str]:
    """A person's facts in a few sentences of the plain style, always true to the world."""
    facts = (
        "{p:은} {born}년 {home}에서 태어나다", "{p:은} {debut}년부터 {job:으로} 일하다", "{p:은} {org}에 몸담고 있다",
        "{p:의} 대표작은 {work}=이다", "{p:은} {favourite:으로} 널리 알려져 있다", "{p:의} 고향은 {region}에 있는 {home}=이다",
    )  # fmt: skip
    start = chance.between(0, len(facts) - 2)
    return [scene.tell(fact) for fact in facts[start : start + 2]]


_SAYINGS = (
    ("“{state}.”", "“그래도 {wish}.”"), ("“왜 이렇게 늦었어?”", "“{cause}.”"), ("“{cause}.”", "“{effect}?”"), ("“무슨 일이야?”",
    "“{cause}.”"),
    ("“정말 {state}.”", "“나도 그렇게 생각해.”"), ("“이제 어떻게 하지?”", "“{wish}.”"), ("“{speciality:은} 다 먹었어?”", "“아니, 아직 남았어.”"),
    ("“{home}에는 언제 가?”", "“다음 달에 갈 거야.”"), ("“{act}?”", "“응, 조금 전에 끝났어.”"), ("“{act}?”", "“아니, 내일 할 거야.”"),
)  # fmt: skip
_SCENERY = (
    "창밖에는 비가 소리 없이 내리다", "골목에는 아무도 없다", "멀리서 개 짖는 소리가 들리다", "해는 이미 산 너머로 지다", "바람이 나뭇가지를 흔들다", "방 안에는 시계 소리만 가득하다",
    "{town:의} 밤은 길고 고요하다", "{region:은} 늘 바람이 많다", "{place}에는 희미한 불빛이 남아 있다", "{speciality} 냄새가 온 마을에 퍼지다",
    "달빛이 마당을 하얗게 비추다",
)  # fmt: skip
_STORY_OPENINGS = (
    "{hero:은} {home}에서 태어나 {region}의 바람을 맞으며 자라다", "그해 겨울 {hero:은} 처음으로 {town:을} 찾다",
    "{hero:이} {job:이} 된 것은 {debut}년의 일=이다",
    "{hero:과} {other:은} 어릴 때부터 한동네에서 자라다", "{hero:은} 십 년 만에 {home:으로} 돌아오다", "{town}에는 {hero:이라는} {job:이} 살고 있다",
    "{other:이} 떠난 뒤 {hero:은} 혼자 {place:을} 지키다", "{hero:은} {other}에게 줄 {tool:을} 품에 안고 집을 나서다",
)  # fmt: skip
_SAID = (
    "{a:이} 묻다",
    "{a:이} 조용히 말하다",
    "{a:은} 고개를 들다",
    "{a:이} 웃으면서 말하다",
    "{a:은} 한숨을 쉬다",
    "{a:이} 나직하게 말하다",
)
_ANSWERED = (
    "{a:이} 대답하다",
    "{a:은} 고개를 저으며 말하다",
    "{a:은} 잠시 생각하다가 입을 열다",
    "{a:이} 짧게 답하다",
    "{a:은} 창밖을 보며 중얼거리다",
)
_STORY_ENDS = (
    "{hero:은} 오래도록 그 자리를 떠나지 못하다", "{other:은} 아무 말 없이 {hero:의} 손을 잡다", "그날 이후 {hero:은} {tool:을} 볼 때마다 {other:을} 떠올리다",
    "{hero:은} {home:으로} 가는 첫차를 타다", "두 사람은 나란히 {place:을} 나서다", "{hero:은} 다시 {job:의} 길을 걷기로 하다",
)  # fmt: skip


def story(world: World, chance: Chance) -> Text:
    """A narrative with two people whose names, trades and home towns stay the same, with dialogue."""
    hero, other = chance.skewed(world.people, 1.5), chance.skewed(world.people, 1.5)
    while other.given_name == hero.given_name:
        other = chance.pick(world.people)
    scene = Scene(chance, hero.topic, PLAIN)
    bind_person(scene, hero, 2015)
    names = [called(p) for p in (hero, other)]
    scene.bound.update(
        hero=names[0], other=names[1], town=other.town.name, place=scene.noun("place"), tool=scene.noun("tool")
    )
    paragraphs: list[tuple[str, ...]] = []
    opening = [scene.past(chance.pick(_STORY_OPENINGS)), scene.past(scene.fresh(_SCENERY))]
    scene.subject = names[0]
    paragraphs.append((*opening, *scene.acts(chance.between(1, 3))))
    for _ in range(chance.between(1, 3)):
        paragraphs.append(_dialogue(scene, chance, names))
        scene.subject = chance.pick(names)
        good, events = scene.cause()
        scenery = [scene.past(scene.fresh(_SCENERY))] if chance.flip(0.5) else []
        paragraphs.append((*scenery, *scene.acts(chance.between(2, 4)), *events, scene.feeling(good)))
    paragraphs.append((scene.past(scene.fresh(_SCENERY)), scene.past(chance.pick(_STORY_ENDS))))
    title = scene.fill(chance.pick(("{work}", "{home:의} {job}", "{tool}", "{hero:과} {other}")))
    return Text(title.strip("『』"), tuple(paragraphs))


def _dialogue(scene: Scene, chance: Chance, names: list[str]) -> tuple[str, ...]:
    """A question or remark and its answer, in a paragraph."""
    register, scene.register = scene.register, chance.pick((INTIMATE, INTIMATE, POLITE))
    topic = scene.topic
    cause = chance.pick([cause for cause in topic.causes if not cause.good])
    ending = "아" if scene.register is INTIMATE else "아요"
    past = "았" + ("어" if ending == "아" else "어요")
    scene.bound.update(
        state=scene.say(chance.pick(topic.states).lstrip("-"), ending), cause=scene.say(cause.clause, past),
        effect=scene.say(cause.effects[0], past),
        wish=scene.say(chance.pick(topic.wishes), "아야 하다:" + ending), act=scene.say(chance.pick(topic.acts), past),
    )  # fmt: skip
    remark, answer = chance.pick(_SAYINGS)
    remark, answer = scene.fill(remark), scene.fill(answer)
    if ending == "아요":
        remark, answer = (line.replace("늦었어", "늦었어요").replace("일이야", "일이에요").replace("생각해.",
        "생각해요.").replace("하지?", "하죠?")
                          .replace("먹었어?", "먹었어요?").replace("남았어.", "남았어요.").replace("에는 언제 가?",
                          "에는 언제 가요?").replace("거야.", "거예요.")
                          .replace("끝났어.", "끝났어요.").replace("아니,", "아니요,").replace("“응,", "“네,").replace("나도",
                          "저도") for line in (remark, answer))  # fmt: skip
    scene.register = register
    first, second = names if chance.flip(0.5) else names[::-1]
    scene.bound["a"] = first
    lines = [remark, scene.past(chance.pick(_SAID))]
    scene.bound["a"] = second
    lines += [answer, scene.past(chance.pick(_ANSWERED))] if chance.flip(0.7) else [answer]
    return tuple(lines)


def person_article(world: World, chance: Chance, person: Person) -> Text:
    """The encyclopaedia's article on a person of the world."""
    scene = Scene(chance, person.topic, PLAIN, person.name)
    bind_person(scene, person, 2020)
    org = person.organisation
    scene.bound.update(
        orgtown=org.town.name,
        joined=str(person.debut_year + 3),
        prize=str(min(2019, person.debut_year + chance.between(4, 20))),
    )
    lead = [f"{particle(person.name, '은')} 대한민국의 {copula(person.job, '다')}.",
            scene.fill("{born}년 {region}에 있는 {home}에서 태어났다."), scene.present("대표작으로 {work:이} 있다")]  # fmt: skip
    facts = [
        "{debut}년 {work:으로} 이름을 알리다", "{joined}년부터 {orgtown}에 있는 {org}에서 일하다", "{prize}년 {event}에서 큰 상을 받다",
        "{favourite:을} 새롭게 해석했다는 평가를 받다", "어린 시절에는 {hobby}에 관심이 많다", "스승에게서 {tool} 다루는 법을 배우다",
    ]  # fmt: skip
    career = [scene.past(fact) for fact in facts if chance.flip(0.75)] + scene.cause(True)[1]
    rest = [
        scene.fill("{age}세가 된 2020년에도 {home}에 살고 있다."),
        *scene.acts(chance.between(1, 2), reflective=False),
        scene.state(past=True),
    ]
    return Text(person.name, (tuple(lead), tuple(career), tuple(rest)))


_TOWN_FACTS = (
    "{year}년에는 {place:이} 새로 들어서다", "{season}이면 {event:을} 보러 오는 사람이 많다", "가까운 도시까지 버스로 {minutes}분이 걸리다",
    "{season:은} 짧고 바람이 세다", "예부터 이름난 {role:이} 많이 나오다", "마을 한가운데에는 {year}년에 지은 {place:이} 있다",
    "주민의 절반은 {speciality} 농사나 장사로 살아가다", "최근에는 {thing:을} 찾는 발길이 늘다",
)  # fmt: skip


def town_article(world: World, chance: Chance, town: Town) -> Text:
    """The encyclopaedia's article on a town."""
    neighbour = chance.pick(world.towns)
    people = [p for p in world.people if p.town is town]
    topic = chance.pick(TOPICS)
    scene = Scene(chance, topic, PLAIN)
    scene.bound.update(
        town=town.name,
        speciality=town.speciality,
        month=str(town.festival_month),
        place=chance.pick(topic.nouns["place"]),
    )
    lead = (f"{particle(town.name, '은')} {town.region}에 있는 {copula('고장', '다')}.",
    f"{town.founded}년에 지금의 이름을 얻었으며, 인구는 약 {town.population}명이다.",
            f"{particle(town.speciality, '이')} 많이 나는 곳으로 알려져 있다.")  # fmt: skip
    scene.bound.update(
        year=str(town.founded + chance.between(4, 20)),
        season=chance.pick(("봄", "여름", "가을", "겨울")),
        minutes=str(chance.between(2, 9) * 10),
    )
    second = [f"해마다 {town.festival_month}월에 {town.speciality} 축제가 열린다."]
    second += [scene.tell(fact) for fact in _TOWN_FACTS if chance.flip(0.5)]
    if neighbour is not town:
        second.append(f"이웃한 {particle(neighbour.name, '과')} 버스로 이어져 있다.")
    third = [
        f"{particle(p.job, '으로')} 이름난 {particle(p.name, '이')} 이곳에서 태어났다."
        for p in people[: chance.between(1, 3)]
    ]
    return Text(town.name, (lead, tuple(second), tuple(third) or (scene.state(past=True),)))


def organisation_article(world: World, chance: Chance, organisation: Organisation) -> Text:
    """The encyclopaedia's article on an organisation."""
    members = [p for p in world.people if p.organisation is organisation][: chance.between(1, 3)]
    scene = Scene(chance, organisation.topic, PLAIN)
    scene.bound.update(org=organisation.name, town=organisation.town.name)
    lead = (
        f"{particle(organisation.name, '은')} {organisation.town.name}에 있는 단체이다.",
        f"{organisation.founded}년에 세워졌으며, 회원은 {organisation.members}명이다.",
    )
    second = [
        scene.past("{thing:과} 관련된 {event:을} 해마다 열어 오다"),
        *scene.cause()[1],
        scene.say(chance.pick(organisation.topic.wishes), "는 데 힘쓰다:고") + " 있다.",
    ]
    third = [f"{particle(p.name, '이')} 이곳에서 {particle(p.job, '으로')} 일한다." for p in members]
    return Text(organisation.name, (lead, tuple(second), tuple(third) or (scene.state(past=True),)))


def concept_article(world: World, chance: Chance, thing: str, topic_name: str) -> Text:
    """The encyclopaedia's article on a thing of a topic."""
    topic = topic_of(topic_name)
    town, person = (
        chance.skewed(world.towns),
        chance.skewed([p for p in world.people if p.topic is topic] or world.people),
    )
    scene = Scene(chance, topic, PLAIN)
    bind_person(scene, person, 2020)
    scene.bound.update(thing=thing, town=town.name)
    # What a thing is stays the same in every edition: it hangs on the thing, not on the chance of this article.
    own = topic.definitions[topic.nouns["thing"].index(thing) % len(topic.definitions)]
    lead = [
        f"{particle(thing, '은')} {scene.say(own, '는')} {copula(topic.kind, '다')}.",
        scene.present("{role:과} {tool:을} 함께 떠올리는 사람이 많다"),
        scene.state(),
    ]
    second = [*_general(scene, chance), *_general(scene, chance), *scene.cause()[1]]
    third = [
        scene.fill("{town}에서는 {debut}년 무렵부터 널리 알려졌다."),
        scene.fill("{job} {p:은} {thing}에 얽힌 이야기를 책으로 남겼다."),
        *_general(scene, chance),
    ]
    return Text(f"{thing}", (tuple(lead), tuple(second), tuple(third)))
